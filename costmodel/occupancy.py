"""How many CTAs of a kernel one SM holds, by NVIDIA's allocation rules.

Source of the rules: the CUDA C++ Programming Guide, "Compute Capabilities" (technical specifications per compute
capability), and the occupancy calculator of Nsight Compute (registers are allocated per warp in units of 256, warps
in groups of 4, shared memory in units of 128 bytes, and every CTA pays 1 KiB of shared memory reserved by the
system).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from profiles.errors import SpecError
from profiles.gpus import GpuSpec

WARP_SIZE = 32
REGISTER_UNIT_PER_WARP = 256
WARP_UNIT = 4
SMEM_UNIT_BYTES = 128
SMEM_RESERVED_PER_CTA_BYTES = 1024
MAX_REGISTERS_PER_THREAD = 255
MAX_THREADS_PER_CTA = 1024

# Maximum resident CTAs per SM, by compute capability.
MAX_CTAS_PER_SM = {
    (8, 0): 32,
    (8, 6): 16,
    (8, 7): 16,
    (8, 9): 24,
    (9, 0): 32,
    (10, 0): 32,
    (10, 3): 32,
    (11, 0): 24,
    (12, 0): 24,
    (12, 1): 24,
}


class Limit(Enum):
    """The resource that bounds occupancy."""

    THREADS = "threads"
    REGISTERS = "registers"
    SHARED_MEMORY = "shared memory"
    CTA_SLOTS = "CTA slots"


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupancy:
    """CTAs that fit one SM, and which resource says so (the first of equals, in the order of `Limit`). Zero CTAs: it
    cannot launch.
    """

    ctas_per_sm: int
    limit: Limit


def max_ctas_per_sm(gpu: GpuSpec) -> int:
    """Resident-CTA slots of one SM. SpecError for a compute capability the table lacks."""
    try:
        return MAX_CTAS_PER_SM[gpu.compute_capability]
    except KeyError:
        known = ", ".join(f"{major}.{minor}" for major, minor in MAX_CTAS_PER_SM)
        major, minor = gpu.compute_capability
        raise SpecError(
            f"no occupancy limits for compute capability {major}.{minor} ({gpu.name}); known: {known}"
        ) from None


def registers_per_cta(registers_per_thread: int, num_threads: int) -> int:
    """Registers that a CTA takes from the register file, rounded as the hardware rounds them."""
    per_warp = round_up(max(registers_per_thread, 1) * WARP_SIZE, REGISTER_UNIT_PER_WARP)
    return per_warp * round_up(-(-num_threads // WARP_SIZE), WARP_UNIT)


def smem_per_cta(smem_bytes: int) -> int:
    """Shared memory that a CTA takes from its SM: its own, rounded, and the system's 1 KiB."""
    return round_up(smem_bytes + SMEM_RESERVED_PER_CTA_BYTES, SMEM_UNIT_BYTES)


def occupancy(gpu: GpuSpec, *, registers_per_thread: int, num_threads: int, smem_bytes: int) -> Occupancy:
    """CTAs per SM of a kernel with these resources; `smem_bytes` is static plus dynamic shared memory of one CTA."""
    warps = -(-num_threads // WARP_SIZE)
    by_limit = {
        Limit.THREADS: gpu.max_threads_per_sm // (warps * WARP_SIZE),
        Limit.REGISTERS: gpu.regs_per_sm // registers_per_cta(registers_per_thread, num_threads),
        Limit.SHARED_MEMORY: gpu.smem_per_sm_bytes // smem_per_cta(smem_bytes),
        Limit.CTA_SLOTS: max_ctas_per_sm(gpu),
    }
    if smem_bytes > gpu.smem_per_block_bytes:
        by_limit[Limit.SHARED_MEMORY] = 0
    if registers_per_thread > MAX_REGISTERS_PER_THREAD:
        by_limit[Limit.REGISTERS] = 0
    if num_threads > MAX_THREADS_PER_CTA:
        by_limit[Limit.THREADS] = 0
    limit = min(by_limit, key=lambda resource: by_limit[resource])
    return Occupancy(ctas_per_sm=by_limit[limit], limit=limit)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple
