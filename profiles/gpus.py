"""GPUs that are known, each with the source of its numbers.

Rates are dense (no structured sparsity) and with fp32 or int32 accumulation, since that is what the kernels use.
GeForce cards run bf16 and fp8 with fp32 accumulation at half the rate of fp16 accumulation, which data-centre and
professional cards do not. A math that is absent from `tensor_tops` has no tensor cores on that GPU: int4 exists on
sm_80, sm_86 and sm_89 only, e4m3 from sm_89 on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

from profiles.errors import SpecError

KIB = 1024
MIB = 1024 * KIB
REGS_PER_SM = 65_536  # the same on every architecture from sm_80 to sm_120
CUDA_GUIDE = (
    "CUDA C++ Programming Guide, technical specifications per compute capability: shared memory, registers, threads"
)
_SAME_CHIP = frozenset({"sxm", "sxm2", "sxm3", "sxm4", "sxm5", "pcie", "hbm2e", "hbm3", "hbm3e", "nvl"})


class Math(Enum):
    """Input type of the tensor cores; accumulation is fp32, or int32 for integers."""

    BF16 = "bf16"
    INT8 = "int8"
    E4M3 = "e4m3"
    INT4 = "int4"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpec:
    """What one GPU has.

    Attributes:
        name: as `--gpu` takes it.
        compute_capability: (major, minor).
        num_sms: streaming multiprocessors.
        smem_per_block_bytes: shared memory that one CTA may ask for.
        smem_per_sm_bytes: shared memory of an SM, 1 KiB of which each resident CTA costs on top of what it asks for.
        regs_per_sm: 32-bit registers of an SM.
        max_threads_per_sm: resident threads of an SM.
        l2_bytes: L2 cache.
        dram_gbps: 10^9 bytes per second of device memory, as the vendor states it.
        boost_clock_mhz: SM clock at which `tensor_tops` holds.
        tensor_tops: 10^12 operations per second per math, dense; absent where the GPU has no such tensor cores.
        sources: where the numbers are from.
    """

    name: str
    compute_capability: tuple[int, int]
    num_sms: int
    smem_per_block_bytes: int
    smem_per_sm_bytes: int
    regs_per_sm: int
    max_threads_per_sm: int
    l2_bytes: int
    dram_gbps: float
    boost_clock_mhz: float
    tensor_tops: Mapping[Math, float] = field(hash=False)
    sources: tuple[str, ...]

    @property
    def arch(self) -> str:
        """The compiler's target, e.g. `sm_89`; 9.0 and 10.0 are the architecture-specific `sm_90a` and `sm_100a`, as
        wgmma and TMA forms need.
        """
        major, minor = self.compute_capability
        return f"sm_{major}{minor}" + ("a" if major in (9, 10) else "")

    def is_called(self, driver_name: str, compute_capability: tuple[int, int]) -> bool:
        """Whether the driver's name of a card means this one: "rtx4090" is "NVIDIA GeForce RTX 4090".

        The name, without spaces and marks, stands in the driver's, and begins and ends where a word does: "h200" must
        not match a "GH200", nor "rtx4090" an "RTX 4090 D" or "RTX 4090 Laptop GPU", which have fewer SMs. Suffixes that
        change memory or form factor only ("HBM3", "80GB", "PCIE", "SXM4-40GB") are allowed.
        """
        if compute_capability != self.compute_capability:
            return False
        words = driver_name.lower().replace("-", " ").split()
        for start in range(len(words)):
            for end in range(start + 1, len(words) + 1):
                if "".join(words[start:end]) == self.name.lower():
                    return all(word in _SAME_CHIP or word.rstrip("gb").isdigit() for word in words[end:])
        return False

    def __str__(self) -> str:
        return self.name


_RTX4090 = GpuSpec(
    name="rtx4090",
    compute_capability=(8, 9),
    num_sms=128,
    smem_per_block_bytes=99 * KIB,
    smem_per_sm_bytes=100 * KIB,
    regs_per_sm=REGS_PER_SM,
    max_threads_per_sm=1536,
    l2_bytes=72 * MIB,
    dram_gbps=1008.0,
    boost_clock_mhz=2520.0,
    tensor_tops={Math.BF16: 165.2, Math.INT8: 660.6, Math.E4M3: 330.3, Math.INT4: 1321.2},
    sources=(
        "NVIDIA Ada GPU Architecture white paper, appendix A: GeForce RTX 4090; bf16 with fp32 accumulation 165.2,"
        " fp8 with fp32 accumulation 330.3 (660.6 with fp16 accumulation: not stored, the kernels accumulate in fp32)",
        CUDA_GUIDE,
    ),
)

_RTX5090 = GpuSpec(
    name="rtx5090",
    compute_capability=(12, 0),
    num_sms=170,
    smem_per_block_bytes=99 * KIB,
    smem_per_sm_bytes=100 * KIB,
    regs_per_sm=REGS_PER_SM,
    max_threads_per_sm=1536,
    l2_bytes=96 * MIB,
    dram_gbps=1792.0,
    boost_clock_mhz=2407.0,
    tensor_tops={Math.BF16: 209.5, Math.INT8: 838.0, Math.E4M3: 419.0},
    sources=(
        "NVIDIA RTX Blackwell GPU Architecture white paper, appendix A: GeForce RTX 5090; bf16 with fp32 accumulation"
        " 209.5, fp8 with fp32 accumulation 419 (838 with fp16 accumulation); int4 is no longer listed",
        CUDA_GUIDE,
    ),
)

_L40S = GpuSpec(
    name="l40s",
    compute_capability=(8, 9),
    num_sms=142,
    smem_per_block_bytes=99 * KIB,
    smem_per_sm_bytes=100 * KIB,
    regs_per_sm=REGS_PER_SM,
    max_threads_per_sm=1536,
    l2_bytes=96 * MIB,
    dram_gbps=864.0,
    boost_clock_mhz=2520.0,
    tensor_tops={Math.BF16: 362.05, Math.INT8: 733.0, Math.E4M3: 733.0, Math.INT4: 1466.0},
    sources=(
        "NVIDIA L40S data sheet, dense figures",
        "NVIDIA Ada GPU Architecture white paper: AD102's L2 cache and SM, and int4 at twice the rate of int8, as in"
        " the L40 data sheet; the L40S data sheet repeats the rate of int8",
        CUDA_GUIDE,
    ),
)

_A100 = GpuSpec(
    name="a100",
    compute_capability=(8, 0),
    num_sms=108,
    smem_per_block_bytes=163 * KIB,
    smem_per_sm_bytes=164 * KIB,
    regs_per_sm=REGS_PER_SM,
    max_threads_per_sm=2048,
    l2_bytes=40 * MIB,
    dram_gbps=2039.0,
    boost_clock_mhz=1410.0,
    tensor_tops={Math.BF16: 312.0, Math.INT8: 624.0, Math.INT4: 1248.0},
    sources=(
        "NVIDIA A100 Tensor Core GPU Architecture white paper: SMs, L2, clock, rates",
        "NVIDIA A100 data sheet: SXM4 80 GB, 2039 GB/s",
        CUDA_GUIDE,
    ),
)

_H100 = GpuSpec(
    name="h100",
    compute_capability=(9, 0),
    num_sms=132,
    smem_per_block_bytes=227 * KIB,
    smem_per_sm_bytes=228 * KIB,
    regs_per_sm=REGS_PER_SM,
    max_threads_per_sm=2048,
    l2_bytes=50 * MIB,
    dram_gbps=3350.0,
    boost_clock_mhz=1830.0,
    tensor_tops={Math.BF16: 989.4, Math.INT8: 1978.9, Math.E4M3: 1978.9},
    sources=(
        "NVIDIA H100 Tensor Core GPU Architecture white paper: H100 SXM5, SMs, L2, rates at 1830 MHz",
        "NVIDIA H100 data sheet: SXM, 3.35 TB/s",
        CUDA_GUIDE,
    ),
)

_H200 = GpuSpec(
    name="h200",
    compute_capability=(9, 0),
    num_sms=132,
    smem_per_block_bytes=227 * KIB,
    smem_per_sm_bytes=228 * KIB,
    regs_per_sm=REGS_PER_SM,
    max_threads_per_sm=2048,
    l2_bytes=50 * MIB,
    dram_gbps=4800.0,
    boost_clock_mhz=1830.0,
    tensor_tops={Math.BF16: 989.4, Math.INT8: 1978.9, Math.E4M3: 1978.9},
    sources=(
        "NVIDIA H200 data sheet: SXM, 4.8 TB/s; the chip, its rates and 1830 MHz as H100 SXM5 in the H100 white paper",
        "measured by this project on one H200, 2026-11-23, torch 2.11, CUDA 13: 4689 GB/s read by a streaming kernel,"
        " 4280 GB/s copy (read plus write); 8192^3 GEMMs: bf16 795, fp8 1505, int8 1151 TFLOP/s",
        CUDA_GUIDE,
    ),
)

_B200 = GpuSpec(
    name="b200",
    compute_capability=(10, 0),
    num_sms=148,
    smem_per_block_bytes=227 * KIB,
    smem_per_sm_bytes=228 * KIB,
    regs_per_sm=REGS_PER_SM,
    max_threads_per_sm=2048,
    l2_bytes=126 * MIB,
    dram_gbps=8000.0,
    boost_clock_mhz=1856.0,
    tensor_tops={Math.BF16: 2250.0, Math.INT8: 4500.0, Math.E4M3: 4500.0},
    sources=(
        "NVIDIA Blackwell (HGX B200) data sheet: one GPU's share, half of the with-sparsity figures; 8 TB/s",
        "NVIDIA Blackwell Tuning Guide: L2 126 MB, shared memory 228 KB an SM",
        "clock: what the bf16 rate implies with 148 SMs of 8192 operations a clock; the vendor states none",
        CUDA_GUIDE,
    ),
)

GPUS: Mapping[str, GpuSpec] = MappingProxyType(
    {spec.name: spec for spec in (_RTX4090, _RTX5090, _L40S, _A100, _H100, _H200, _B200)}
)
"""Every known GPU by name."""


def gpu(name: str) -> GpuSpec:
    """The GPU of a name.

    Raises:
        SpecError: no GPU of this name is known.
    """
    spec = GPUS.get(name)
    if spec is None:
        raise SpecError(f"unknown GPU {name!r}: known are {', '.join(GPUS)}")
    return spec
