import dataclasses
from pathlib import Path

import pytest

from kernel_gen import gate
from kernel_gen.cache import KernelCache
from kernel_gen.compiler import Artifact
from profiles.errors import DataError, UserError
from profiles.gpus import gpu
from tests.kernel_gen.build.conftest import compiled
from tests.kernel_gen.build.specs import EMULATED, RTX4090, SERIALISED, SMALL, SPILLING


def test_good_kernel_passes(small: Artifact) -> None:
    assert gate.rejections(small.code, SMALL, RTX4090) == ()
    assert small.code.mma_instructions == ("HMMA.16816.F32.BF16",)
    assert 32 <= small.code.registers_per_thread <= 255


def test_spilling_kernel_is_rejected_with_its_numbers(shared_cache: KernelCache) -> None:
    code = compiled(shared_cache, SPILLING).code
    assert code.stack_bytes > 0
    assert code.spill_bytes >= code.stack_bytes  # what lies on the stack is written and read at least once
    reasons = " ".join(gate.rejections(code, SPILLING, RTX4090))
    assert f"spills {code.spill_bytes} bytes" in reasons
    assert f"stack of {code.stack_bytes} bytes" in reasons


def test_emulated_instruction_is_found_in_the_machine_code(shared_cache: KernelCache) -> None:
    code = compiled(shared_cache, EMULATED).code
    assert code.mma_instructions == ("IMMA.16832.S8.S8",)
    reasons = gate.rejections(code, EMULATED, gpu("h200"))
    assert any("int4 is emulated on sm_90a" in reason and "IMMA.16832.S8.S8" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"spill_bytes": 24}, "spills 24 bytes"),
        ({"stack_bytes": 16}, "stack of 16 bytes"),
        ({"static_smem_bytes": 90 * 1024}, "KiB > 99 KiB per block on rtx4090"),
        ({"mma_instructions": ()}, "bf16 is emulated on sm_89: HMMA.16816.F32.BF16 is not in the machine code"),
        ({"mma_instructions": ("HMMA.16816.F32",)}, "which has HMMA.16816.F32"),
        ({"ptxas_warnings": ("C7510: Potential Performance Loss",)}, "ptxas warning C7510"),
    ],
)
def test_every_reason_has_its_numbers(small: Artifact, change: dict[str, object], reason: str) -> None:
    code = dataclasses.replace(small.code, **change)
    assert any(reason in found for found in gate.rejections(code, SMALL, RTX4090))


def test_all_reasons_are_listed_at_once(small: Artifact) -> None:
    code = dataclasses.replace(small.code, spill_bytes=8, stack_bytes=8, mma_instructions=(), ptxas_warnings=("C7512",))
    assert len(gate.rejections(code, SMALL, RTX4090)) == 4


def test_kernel_of_another_architecture_is_rejected(small: Artifact) -> None:
    assert "built for sm_89, but a100 is sm_80" in gate.rejections(small.code, SMALL, gpu("a100"))


def test_facts_depend_on_the_gpu(small: Artifact) -> None:
    on_4090, on_a100 = small.facts(RTX4090), small.facts(gpu("a100"))
    assert on_4090.smem_bytes == on_a100.smem_bytes > small.code.static_smem_bytes
    assert 1 <= on_4090.ctas_per_sm <= on_a100.ctas_per_sm
    assert on_4090.num_threads == SMALL.config.num_threads
    assert on_4090.fingerprint == SMALL.fingerprint()


def test_what_is_no_cubin_is_refused(tmp_path: Path) -> None:
    cubin = tmp_path / "broken.cubin"
    cubin.write_bytes(b"\x7fELF and nothing else")
    with pytest.raises(DataError, match=r"broken\.cubin"):
        gate.inspect_cubin(cubin, arch="sm_89")


@pytest.mark.parametrize(
    ("opcode", "num_bytes"), [("LDL", 4), ("STL.64", 8), ("LDL.LU.128", 16), ("STL.U8", 1), ("LDL.S16", 2)]
)
def test_bytes_of_local_accesses(opcode: str, num_bytes: int) -> None:
    assert gate._local_bytes(opcode) == num_bytes


def test_serialised_wgmma_is_found_in_the_compilers_log(shared_cache: KernelCache) -> None:
    code = compiled(shared_cache, SERIALISED).code
    assert [warning.split(":")[0] for warning in code.ptxas_warnings] == ["C7511"]
    assert any("C7511" in reason for reason in gate.rejections(code, SERIALISED, gpu("h200")))


@pytest.mark.parametrize("where", ["in the function 'f'", "for the function 'f'"])
def test_every_wording_of_serialised_is_known(where: str) -> None:
    """ptxas says "in" of C7510 and C7511, "for" of C7512: registers ran out."""
    log = f"ptxas info : (C7512) Potential Performance Loss: wgmma.mma_async instructions are\n  serialized {where}"
    (warning,) = gate._ptxas_warnings(log)
    assert warning.startswith("C7512: Potential Performance Loss")


def test_shared_memory_that_the_system_reserves_is_not_the_kernels(shared_cache: KernelCache, small: Artifact) -> None:
    """Neither has static shared memory; on Hopper cuobjdump reports the system's 1 KiB."""
    assert small.code.static_smem_bytes == compiled(shared_cache, EMULATED).code.static_smem_bytes == 0


def test_missing_tool_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="pip install nvidia-cuda-nvdisasm"):
        gate.find_tool.__wrapped__("nvdisasm")
