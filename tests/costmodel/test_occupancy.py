import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodel.occupancy import Limit, occupancy, registers_per_cta, smem_per_cta
from profiles.errors import SpecError
from profiles.gpus import GPUS, gpu

KIB = 1024


# Worked by hand from the CUDA C++ Programming Guide's limits: 64 K registers an SM, allocated per warp in 256s; 1 KiB
# reserved a CTA.
@pytest.mark.parametrize(
    ("name", "registers", "threads", "smem", "ctas", "limit"),
    [
        ("rtx4090", 32, 256, 0, 6, Limit.THREADS),  # 1536 / 256
        ("rtx4090", 128, 256, 0, 2, Limit.REGISTERS),  # 65536 / (128 * 256)
        ("rtx4090", 255, 256, 0, 1, Limit.REGISTERS),  # 255 -> 8192 a warp, 8 warps are all 65536
        ("rtx4090", 32, 32, 0, 16, Limit.REGISTERS),  # one warp is allocated as four: 4096 a CTA
        ("rtx4090", 16, 32, 0, 24, Limit.CTA_SLOTS),
        ("rtx4090", 64, 256, 49 * KIB, 2, Limit.SHARED_MEMORY),  # 2 x 50 KiB are all 100 KiB
        ("rtx4090", 64, 256, 49 * KIB + 1, 1, Limit.SHARED_MEMORY),
        ("rtx4090", 64, 256, 99 * KIB, 1, Limit.SHARED_MEMORY),
        ("rtx4090", 64, 256, 99 * KIB + 1, 0, Limit.SHARED_MEMORY),
        ("h200", 32, 256, 0, 8, Limit.THREADS),  # 2048 / 256
        ("h200", 64, 128, 227 * KIB, 1, Limit.SHARED_MEMORY),
        ("h200", 168, 384, 0, 1, Limit.REGISTERS),  # 168 * 384 = 64512
        ("a100", 64, 256, 81 * KIB, 2, Limit.SHARED_MEMORY),  # 2 x 82 KiB are all 164 KiB
        ("rtx4090", 256, 32, 0, 0, Limit.REGISTERS),
        ("rtx4090", 32, 1025, 0, 0, Limit.THREADS),
    ],
)
def test_known_cases(name: str, registers: int, threads: int, smem: int, ctas: int, limit: Limit) -> None:
    found = occupancy(gpu(name), registers_per_thread=registers, num_threads=threads, smem_bytes=smem)
    assert (found.ctas_per_sm, found.limit) == (ctas, limit)


@given(
    name=st.sampled_from(sorted(GPUS)),
    registers=st.integers(1, 255),
    threads=st.integers(1, 1024),
    smem=st.integers(0, 99 * KIB),
)
def test_what_is_promised_fits(name: str, registers: int, threads: int, smem: int) -> None:
    spec = gpu(name)
    ctas = occupancy(spec, registers_per_thread=registers, num_threads=threads, smem_bytes=smem).ctas_per_sm
    assert ctas * smem_per_cta(smem) <= spec.smem_per_sm_bytes
    assert ctas * registers_per_cta(registers, threads) <= spec.regs_per_sm
    assert ctas * threads <= spec.max_threads_per_sm
    more = occupancy(spec, registers_per_thread=min(registers + 8, 255), num_threads=threads, smem_bytes=smem)
    assert more.ctas_per_sm <= ctas


def test_unknown_compute_capability_is_named() -> None:
    strange = dataclasses.replace(gpu("rtx4090"), name="strange", compute_capability=(7, 0))
    with pytest.raises(SpecError, match=r"7\.0 \(strange\)"):
        occupancy(strange, registers_per_thread=32, num_threads=128, smem_bytes=0)
