"""The one legality function: why a kernel cannot be built for a GPU, every reason with its numbers.

Search, build, tests and documentation all call `reasons`; nothing else decides. Before a build, registers are
estimated; with `BuildFacts`, the compiler's numbers are used instead, and a spill is a reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from costmodel.facts import BuildFacts
from costmodel.occupancy import (
    MAX_REGISTERS_PER_THREAD,
    MAX_THREADS_PER_CTA,
    Limit,
    max_ctas_per_sm,
    occupancy,
    registers_per_cta,
    smem_per_cta,
)
from kernel_gen import smem
from kernel_gen.layouts import Layout, layout_of, round_up
from profiles.errors import UnsupportedError
from profiles.gpus import GpuSpec, Math
from profiles.kernels import THREADS_PER_WARP, Family, KernelConfig
from profiles.schemes import QuantScheme

MAX_SLOTS = 4
MIN_THREADS = 64
MMA_ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120")
"""Targets that the `mma` family is generated for; on sm_90a it is right but slow, `wgmma` is meant for it."""
REGISTER_MARGIN = 40
"""Addresses, loop counters, the load cursor, magic constants: not counted in the estimate, and in every kernel.

Of 66 builds near their limit (sm_89, 2026-11-24), 1 of the 48 that this lets through spilled, and 11 of the 18 that it
refuses; the build gate has the last word.
"""
FREE_REGISTERS = 64
"""The same where the compiler is not pressed: the median over those builds, most between 54 and 75."""
_FP8_MMA_SINCE = (8, 9)
_EMULATED_ON_HOPPER = {
    Math.INT4: "no int4 tensor cores on sm_90 ({gpu}): mma.sync is emulated, its times mean nothing",
    Math.E4M3: "no fp8 mma.sync on sm_90 ({gpu}): it becomes bf16 HMMA, its times mean nothing; wgmma has fp8 there",
}


def reasons(
    config: KernelConfig,
    schemes: Sequence[QuantScheme],
    gpu: GpuSpec,
    *,
    max_experts: int = 256,
    facts: BuildFacts | None = None,
    allow_emulated: bool = False,
) -> tuple[str, ...]:
    """Every reason why this kernel cannot be built or run; empty when it can.

    `facts` replaces the register estimate by the compiler's numbers. `allow_emulated` lets int4 and fp8 mma.sync pass
    on sm_90, where their values are right and their times meaningless: for value checks only.
    """
    if config.family is Family.WGMMA:
        return (f"the wgmma family is not generated yet ({config.name})",)
    found = [*_scheme_reasons(schemes, gpu, allow_emulated), *_structure_reasons(config), *_target_reasons(gpu)]
    unpackable = [reason for scheme in schemes for reason in _layout_reasons(scheme)]
    found += unpackable
    if schemes and not unpackable and gpu.arch in MMA_ARCHITECTURES:
        found += _resource_reasons(config, schemes, gpu, max_experts, facts)
    return tuple(found)


def require_legal(
    config: KernelConfig,
    schemes: Sequence[QuantScheme],
    gpu: GpuSpec,
    *,
    max_experts: int = 256,
    allow_emulated: bool = False,
) -> None:
    """Raise UnsupportedError with `reasons`, if there are any."""
    found = reasons(config, schemes, gpu, max_experts=max_experts, allow_emulated=allow_emulated)
    if found:
        raise UnsupportedError(
            f"{config.name} for {' + '.join(scheme.name for scheme in schemes)} on {gpu.name}", found
        )


def smem_bytes(config: KernelConfig, schemes: Sequence[QuantScheme], max_experts: int = 256) -> int:
    """Dynamic shared memory of one CTA: stages and the scheduler's table (`kernel_gen.smem` states the layout)."""
    return smem.smem_bytes(config, schemes, max_experts)


def estimated_registers(config: KernelConfig, schemes: Sequence[QuantScheme]) -> int:
    """Registers a thread needs before a compiler has seen the kernel, without `REGISTER_MARGIN`: accumulators,
    fragments, packed words.

    Integer math with group scales holds integer and float accumulators at once. The precision is chosen per tile, so
    slots share their registers.
    """
    return max(_scheme_registers(config, scheme) for scheme in schemes)


def estimated_facts(
    config: KernelConfig, schemes: Sequence[QuantScheme], gpu: GpuSpec, *, max_experts: int = 256
) -> BuildFacts:
    """Facts for a prediction without a build: the estimate, rounded to what the compiler allocates; `is_estimated` is
    true.
    """
    registers = min(round_up(estimated_registers(config, schemes) + FREE_REGISTERS, 8), _register_cap(config, gpu))
    shared = smem_bytes(config, schemes, max_experts)
    fit = occupancy(gpu, registers_per_thread=registers, num_threads=config.num_threads, smem_bytes=shared)
    return BuildFacts(
        registers_per_thread=registers,
        smem_bytes=shared,
        stack_bytes=0,
        spill_bytes=0,
        num_threads=config.num_threads,
        ctas_per_sm=fit.ctas_per_sm,
        mma_instructions=(),
        compile_seconds=0.0,
        fingerprint="",
    )


def _scheme_reasons(schemes: Sequence[QuantScheme], gpu: GpuSpec, allow_emulated: bool) -> Iterator[str]:
    if not 1 <= len(schemes) <= MAX_SLOTS:
        yield f"{len(schemes)} schemes: a kernel holds 1 to {MAX_SLOTS}"
    repeated = sorted({scheme.name for scheme in schemes if list(schemes).count(scheme) > 1})
    if repeated:
        yield f"{', '.join(repeated)} twice: the schemes of a kernel are distinct"
    int4_scales = {scheme.group_size for scheme in schemes if scheme.math is Math.INT4}
    if len(int4_scales) > 1:
        yield "w4a4 per token and per group in one kernel: a launch has one int4 activation tensor"
    for math in sorted({scheme.math for scheme in schemes}, key=lambda item: item.value):
        yield from _math_reasons(math, gpu, allow_emulated)


def _math_reasons(math: Math, gpu: GpuSpec, allow_emulated: bool) -> Iterator[str]:
    """Which tensor cores mma.sync finds on this GPU."""
    major, minor = gpu.compute_capability
    arch = f"sm_{major}{minor}"
    if major == 9 and math in _EMULATED_ON_HOPPER:
        if not allow_emulated:
            yield _EMULATED_ON_HOPPER[math].format(gpu=gpu.name)
    elif math is Math.E4M3 and gpu.compute_capability < _FP8_MMA_SINCE:
        yield f"fp8 mma needs sm_89, {gpu.name} is {arch}"
    elif math not in gpu.tensor_tops:
        yield f"no {math.value} tensor cores on {arch} ({gpu.name})"


def _target_reasons(gpu: GpuSpec) -> Iterator[str]:
    if gpu.arch not in MMA_ARCHITECTURES:
        yield f"the mma family is generated for {', '.join(MMA_ARCHITECTURES)}, {gpu.name} is {gpu.arch}"


def _layout_reasons(scheme: QuantScheme) -> Iterator[str]:
    """What kernel_gen.layouts cannot pack, and what the mma family has no decoder for."""
    try:
        layout = layout_of(scheme)
    except UnsupportedError as error:
        for reason in error.reasons:
            yield f"{scheme.name}: {reason}"
        return
    if layout.math is Math.E4M3 and layout.weight_bits != 8:
        yield f"{scheme.name}: the mma family has no {layout.weight_bits}-bit to e4m3 decoder, only wgmma will"


def _structure_reasons(config: KernelConfig) -> Iterator[str]:
    tile, warps = config.tile, config.warps
    if tile.k:
        yield f"tile.k is {tile.k}: it is 0 in a configuration, the k-tile follows from the scheme"
    if tile.m % 64:
        yield f"tile.m {tile.m} is not a multiple of the packed unit's 64 rows"
    if tile.m % (16 * warps.m):
        yield f"tile.m {tile.m} does not split into 16-row blocks over {warps.m} warps: multiples of {16 * warps.m} do"
    if tile.n % (8 * warps.n):
        yield f"tile.n {tile.n} does not split into 8-token blocks over {warps.n} warps: multiples of {8 * warps.n} do"
    elif (blocks := tile.n // (8 * warps.n)) > 1 and blocks % 2:
        yield f"tile.n {tile.n} gives each of {warps.n} warps {blocks} token blocks: ldmatrix takes 1, or pairs"
    if warps.k != 1:
        yield f"slice-K {warps.k}: the mma family generates warps.k = 1 only"
    if config.split_k != 1:
        yield f"split-K {config.split_k}: the mma family generates split_k = 1 only"
    if config.num_stages < 2:
        yield f"{config.num_stages} stages: the pipeline needs at least 2"
    if config.num_threads < MIN_THREADS:
        yield f"{config.num_threads} threads: at least {MIN_THREADS}"
    if config.num_threads > MAX_THREADS_PER_CTA:
        yield f"{config.num_threads} threads > {MAX_THREADS_PER_CTA} per block"
    if tile.m // 8 > config.num_threads:
        yield f"tile.m {tile.m} needs {tile.m // 8} threads to copy a scale strip, {config.num_threads} are there"


def _resource_reasons(
    config: KernelConfig, schemes: Sequence[QuantScheme], gpu: GpuSpec, max_experts: int, facts: BuildFacts | None
) -> Iterator[str]:
    shared = facts.smem_bytes if facts else smem_bytes(config, schemes, max_experts)
    ctas = config.min_ctas_per_sm
    if shared > gpu.smem_per_block_bytes:
        yield f"smem {_kib(shared)} > {_kib(gpu.smem_per_block_bytes)} per block on {gpu.name}"
    elif ctas * smem_per_cta(shared) > gpu.smem_per_sm_bytes:
        each, there = _kib(smem_per_cta(shared)), _kib(gpu.smem_per_sm_bytes)
        yield f"smem {ctas} x {each} (1 KiB reserved in each) > {there} per SM on {gpu.name}"
    if ctas * config.num_threads > gpu.max_threads_per_sm:
        yield f"threads {ctas} x {config.num_threads} > {gpu.max_threads_per_sm} per SM on {gpu.name}"
    if ctas > max_ctas_per_sm(gpu):
        yield f"{ctas} CTAs per SM > {max_ctas_per_sm(gpu)} on {gpu.name}"
    if facts is not None:
        yield from _fact_reasons(config, gpu, facts)
        return
    needed = estimated_registers(config, schemes) + REGISTER_MARGIN
    cap = _register_cap(config, gpu)
    if needed > cap:
        why = f" with {ctas} CTAs of {config.num_threads} threads per SM" if cap < MAX_REGISTERS_PER_THREAD else ""
        parts = f"{needed - REGISTER_MARGIN} for tiles, {REGISTER_MARGIN} margin"
        yield f"registers: about {needed} a thread ({parts}) > {cap}{why} on {gpu.name}"


def _fact_reasons(config: KernelConfig, gpu: GpuSpec, facts: BuildFacts) -> Iterator[str]:
    """What the compiler's numbers say about a kernel that was built."""
    if facts.spill_bytes:
        yield f"spills {facts.spill_bytes} bytes"
    if facts.stack_bytes:
        yield f"stack of {facts.stack_bytes} bytes"
    if facts.registers_per_thread > MAX_REGISTERS_PER_THREAD:
        yield f"{facts.registers_per_thread} registers a thread > {MAX_REGISTERS_PER_THREAD}"
    fit = occupancy(
        gpu, registers_per_thread=facts.registers_per_thread, num_threads=facts.num_threads, smem_bytes=facts.smem_bytes
    )
    if fit.ctas_per_sm < config.min_ctas_per_sm and fit.limit is Limit.REGISTERS:
        per_cta = registers_per_cta(facts.registers_per_thread, facts.num_threads)
        each = f"{per_cta} ({facts.registers_per_thread} a thread)"
        yield f"registers {config.min_ctas_per_sm} x {each} > {gpu.regs_per_sm} per SM on {gpu.name}"


def _register_cap(config: KernelConfig, gpu: GpuSpec) -> int:
    """Registers a thread may have so that min_ctas_per_sm CTAs fit: multiples of 8, at most 255."""
    threads = config.min_ctas_per_sm * round_up(config.warps.num_warps, 4) * THREADS_PER_WARP
    return min(gpu.regs_per_sm // threads // 8 * 8, MAX_REGISTERS_PER_THREAD)


def _scheme_registers(config: KernelConfig, scheme: QuantScheme) -> int:
    layout = layout_of(scheme)
    accumulators = config.tile.m * config.tile.n // config.num_threads
    if layout.has_group_scales and layout.math in (Math.INT8, Math.INT4):
        accumulators *= 2
    m_blocks = -(-config.tile.m // (16 * config.warps.m))
    n_blocks = -(-config.tile.n // (8 * config.warps.n))
    packed_words = _packed_words(layout)
    strips = (1 if layout.has_group_scales else 0) + (2 if layout.has_zero_points else 0)
    fragments = 4 + 2 * n_blocks + m_blocks * (packed_words + strips)
    return accumulators + fragments


def _packed_words(layout: Layout) -> int:
    """Words of one m16 block that the main loop holds at once: narrow bf16 codes for the whole k-tile, anything else
    for one k-step (two if widened).
    """
    if layout.math is Math.BF16 and layout.weight_bits != 16:
        return layout.words_per_lane
    return 8 if layout.math is Math.INT8 and layout.weight_bits == 4 else 4


def _kib(num_bytes: int) -> str:
    return f"{num_bytes / 1024:.4g} KiB"
