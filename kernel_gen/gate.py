"""The gate: what a kernel's machine code shows, and the reasons for which a build refuses a kernel.

`inspect_cubin` reads the machine code with cuobjdump and nvdisasm; pip's wheels nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm are enough. A refusal is data: `rejections` returns every reason with its numbers, and raises
nothing.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from costmodel.facts import BuildFacts
from costmodel.occupancy import SMEM_RESERVED_PER_CTA_BYTES, occupancy
from kernel_gen import legality
from kernel_gen.kernels import KernelSpec
from kernel_gen.layouts import layout_of
from kernel_gen.smem import smem_bytes
from kernel_gen.smem_wgmma import multiplies_in_warps
from profiles.errors import DataError, UserError
from profiles.gpus import GpuSpec, Math
from profiles.kernels import Family

FIRST_REPORTED_RESERVE = 90
TOOL_SECONDS = 60.0
"""A disassembler that needs longer than this has hung: 0.2 s is usual."""

# The instruction that each math must become. ptxas accepts more PTX than the hardware runs: where a tensor core lacks a
# type it emulates, and the code then shows another instruction. Seen with ptxas 13.4, 2026-11: int4 on sm_90 and sm_120
# becomes IMMA.16832.S8.S8 in a called function, warp-level e4m3 on sm_90 becomes HMMA.16816.F32; on sm_89 both are
# native.
MEANT_INSTRUCTION: dict[tuple[Family, Math], re.Pattern[str]] = {
    (Family.MMA, Math.BF16): re.compile(r"HMMA\.16816\.F32\.BF16"),
    (Family.MMA, Math.INT8): re.compile(r"IMMA\.16832\.S8\.S8"),
    (Family.MMA, Math.E4M3): re.compile(r"QMMA\.16832\.F32\.E4M3\.E4M3"),
    (Family.MMA, Math.INT4): re.compile(r"IMMA\.16864\.S4\.S4"),
    (Family.WGMMA, Math.BF16): re.compile(r"HGMMA\.64x\d+x16\.F32\.BF16"),
    (Family.WGMMA, Math.INT8): re.compile(r"IGMMA\.64x\d+x32\.S8\.S8"),
    (Family.WGMMA, Math.E4M3): re.compile(r"QGMMA\.64x\d+x32\.F32\.E4M3\.E4M3"),
}

_OPCODE = re.compile(r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_PTXAS_WARNING = re.compile(r"\((C75\d\d)\) (.+?) (?:in|for) the function")
_LOCAL_WIDTH = re.compile(r"\.(128|64|U?S?16|U?S?8)\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeFacts:
    """What one kernel's machine code shows, whichever GPU of its architecture runs it.

    `spill_bytes` counts the bytes that the code's local stores and loads move when each runs once per thread: 0 when
    nothing is spilled. `mma_instructions` are the tensor-core opcodes found, sorted. `ptxas_warnings` are the C75xx
    lines (wgmma serialised, registers ran out).
    """

    registers_per_thread: int
    static_smem_bytes: int
    stack_bytes: int
    spill_bytes: int
    mma_instructions: tuple[str, ...]
    ptxas_warnings: tuple[str, ...] = ()


def inspect_cubin(cubin: Path, *, arch: str, ptxas_log: str = "") -> CodeFacts:
    """The facts of a cubin that holds one kernel. DataError when the tools cannot read it; UserError when a tool is not
    installed.
    """
    resources = _RESOURCES.findall(_run(find_tool("cuobjdump"), "--dump-resource-usage", cubin))
    if len(resources) != 1:
        raise DataError(f"{cubin.name} holds {len(resources)} kernels, not one")
    registers, stack, shared, _ = (int(number) for number in resources[0])
    opcodes = _OPCODE.findall(_run(find_tool("nvdisasm"), "--print-code", cubin))
    return CodeFacts(
        registers_per_thread=registers,
        static_smem_bytes=shared - _reserved_smem_bytes(arch),
        stack_bytes=stack,
        spill_bytes=sum(_local_bytes(opcode) for opcode in opcodes if opcode.split(".")[0] in ("LDL", "STL")),
        mma_instructions=tuple(sorted({opcode for opcode in opcodes if opcode.split(".")[0].endswith("MMA")})),
        ptxas_warnings=_ptxas_warnings(ptxas_log),
    )


def build_facts(code: CodeFacts, spec: KernelSpec, gpu: GpuSpec, *, compile_seconds: float) -> BuildFacts:
    """A kernel's facts on one GPU: the code's own, the launch's shared memory, and how many CTAs then fit an SM."""
    shared = code.static_smem_bytes + smem_bytes(spec.config, spec.schemes, spec.max_experts)
    threads = spec.config.num_threads
    resident = occupancy(gpu, registers_per_thread=code.registers_per_thread, num_threads=threads, smem_bytes=shared)
    return BuildFacts(
        registers_per_thread=code.registers_per_thread,
        smem_bytes=shared,
        stack_bytes=code.stack_bytes,
        spill_bytes=code.spill_bytes,
        num_threads=threads,
        ctas_per_sm=resident.ctas_per_sm,
        mma_instructions=code.mma_instructions,
        compile_seconds=compile_seconds,
        fingerprint=spec.fingerprint(),
    )


def rejections(code: CodeFacts, spec: KernelSpec, gpu: GpuSpec) -> tuple[str, ...]:
    """Every reason, with numbers, for which this kernel must not run on `gpu`; empty when it may.

    The limits are `kernel_gen.legality`'s, held against the compiler's numbers; what only the machine code can show is
    added here.
    """
    facts = build_facts(code, spec, gpu, compile_seconds=0.0)
    found = list(legality.reasons(spec.config, spec.schemes, gpu, max_experts=spec.max_experts, facts=facts))
    if spec.arch != gpu.arch:
        found.append(f"built for {spec.arch}, but {gpu.name} is {gpu.arch}")
    found.extend(_missing_instructions(code, spec))
    found.extend(f"ptxas warning {warning}" for warning in code.ptxas_warnings)
    return tuple(found)


def _missing_instructions(code: CodeFacts, spec: KernelSpec) -> list[str]:
    found = ", ".join(code.mma_instructions) or "no tensor-core instruction"
    missing = []
    for family, math in dict.fromkeys(_instruction_families(spec)):
        meant = MEANT_INSTRUCTION.get((family, math))
        if meant is None:
            missing.append(f"the {family.value} family has no {math.value} instruction")
        elif not any(meant.match(opcode) for opcode in code.mma_instructions):
            name = meant.pattern.replace("\\.", ".").replace("\\d+", "*")
            missing.append(
                f"{math.value} is emulated on {spec.arch}: {name} is not in the machine code, which has {found}"
            )
    return missing


def _instruction_families(spec: KernelSpec) -> Iterator[tuple[Family, Math]]:
    """Whose instruction each width of each slot's tile is multiplied with: wgmma's narrowest take mma.sync."""
    config = spec.config
    for scheme, width in itertools.product(spec.schemes, config.token_widths):
        in_warps = config.family is Family.WGMMA and multiplies_in_warps(layout_of(scheme), width)
        yield (Family.MMA if in_warps else config.family), scheme.math


def _ptxas_warnings(log: str) -> tuple[str, ...]:
    """The C75xx remarks of ptxas, each once; the DSL has wrapped their lines, and the kernel's mangled name is cut."""
    found = _PTXAS_WARNING.findall(" ".join(log.split()))
    return tuple(dict.fromkeys(f"{number}: {text}" for number, text in found))


def _reserved_smem_bytes(arch: str) -> int:
    """Shared memory that the system keeps for itself in every CTA and that cuobjdump reports as the kernel's from sm_90
    on; `costmodel.occupancy` adds it on every GPU.
    """
    return SMEM_RESERVED_PER_CTA_BYTES if int(arch.removeprefix("sm_").rstrip("af")) >= FIRST_REPORTED_RESERVE else 0


def _local_bytes(opcode: str) -> int:
    """Bytes per thread that one LDL or STL moves; without a width it is a 32-bit word."""
    width = _LOCAL_WIDTH.search(opcode)
    return int(width.group(1).lstrip("US")) // 8 if width else 4


@functools.cache
def find_tool(name: str) -> Path:
    """Where one of NVIDIA's binary tools is: in pip's wheel, else on PATH. UserError, naming the wheel, when it is in
    neither.
    """
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations if spec and spec.submodule_search_locations else ():
        for path in sorted(Path(root).glob(f"*/bin/{name}"), reverse=True):
            return path
    on_path = shutil.which(name)
    if on_path is None:
        raise UserError(f"{name} was not found: pip install nvidia-cuda-{name}")
    return Path(on_path)


def _run(tool: Path, option: str, cubin: Path) -> str:
    done = subprocess.run([tool, option, cubin], capture_output=True, text=True, timeout=TOOL_SECONDS, check=False)
    if done.returncode:
        raise DataError(f"{tool.name} cannot read {cubin}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout
