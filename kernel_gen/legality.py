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
from kernel_gen import registers, smem, smem_wgmma
from kernel_gen.layouts import UNIT_ROWS, layout_of
from profiles.errors import UnsupportedError
from profiles.gpus import GpuSpec, Math
from profiles.kernels import Family, KernelConfig
from profiles.schemes import QuantScheme

MAX_SLOTS = 4
MIN_THREADS = 64
ARCHITECTURES = {Family.MMA: ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120"), Family.WGMMA: ("sm_90a",)}
"""Targets that each family is generated for; on sm_90a `mma` is right but slow, `wgmma` is meant for it."""
WARPS_PER_WARPGROUP = 4
MAX_CONSUMER_WARPGROUPS = 3
WGMMA_TILE_N = (8, *range(16, 257, 16))
"""Token widths: 8, or pairs of 8 for stmatrix to transpose."""
MAX_CLUSTER = 2
SPLITS = (1, 2, 4)
TAILS = (8, *range(16, 129, 16))
MAX_WIDTHS = 3
"""Each width of a token tile is a k loop of its own in every slot."""
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
    family = config.family
    structure = list(_wgmma_structure_reasons(config) if family is Family.WGMMA else _mma_structure_reasons(config))
    unpackable = [reason for scheme in schemes for reason in _layout_reasons(scheme, family)]
    found = [*_scheme_reasons(schemes, family, gpu, allow_emulated), *structure, *_target_reasons(family, gpu)]
    found += unpackable
    if schemes and not unpackable and gpu.arch in ARCHITECTURES[family]:
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
    """Dynamic shared memory of one CTA (`kernel_gen.smem` and `smem_wgmma` state the layouts)."""
    return smem.smem_bytes(config, schemes, max_experts)


def estimated_facts(
    config: KernelConfig, schemes: Sequence[QuantScheme], gpu: GpuSpec, *, max_experts: int = 256
) -> BuildFacts:
    """Facts for a prediction without a build, registers as the launch takes them; `is_estimated` is true."""
    held = registers.registers_at_launch(config, schemes, gpu)
    shared = smem_bytes(config, schemes, max_experts)
    fit = occupancy(gpu, registers_per_thread=held, num_threads=config.num_threads, smem_bytes=shared)
    return BuildFacts(
        registers_per_thread=held,
        smem_bytes=shared,
        stack_bytes=0,
        spill_bytes=0,
        num_threads=config.num_threads,
        ctas_per_sm=fit.ctas_per_sm,
        mma_instructions=(),
        compile_seconds=0.0,
        fingerprint="",
    )


def _scheme_reasons(
    schemes: Sequence[QuantScheme], family: Family, gpu: GpuSpec, allow_emulated: bool
) -> Iterator[str]:
    if not 1 <= len(schemes) <= MAX_SLOTS:
        yield f"{len(schemes)} schemes: a kernel holds 1 to {MAX_SLOTS}"
    repeated = sorted({scheme.name for scheme in schemes if list(schemes).count(scheme) > 1})
    if repeated:
        yield f"{', '.join(repeated)} twice: the schemes of a kernel are distinct"
    int4_scales = {scheme.group_size for scheme in schemes if scheme.math is Math.INT4}
    if len(int4_scales) > 1:
        yield "w4a4 per token and per group in one kernel: a launch has one int4 activation tensor"
    for math in sorted({scheme.math for scheme in schemes}, key=lambda item: item.value):
        if family is Family.MMA:
            yield from _mma_sync_reasons(math, gpu, allow_emulated)
        elif math is Math.INT4:
            yield "wgmma has no int4: 4-bit activations are for the mma family, on GPUs with int4 tensor cores"


def _mma_sync_reasons(math: Math, gpu: GpuSpec, allow_emulated: bool) -> Iterator[str]:
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


def _target_reasons(family: Family, gpu: GpuSpec) -> Iterator[str]:
    if gpu.arch not in ARCHITECTURES[family]:
        targets = ", ".join(ARCHITECTURES[family])
        yield f"the {family.value} family is generated for {targets}, {gpu.name} is {gpu.arch}"


def _layout_reasons(scheme: QuantScheme, family: Family) -> Iterator[str]:
    """What kernel_gen.layouts cannot pack, and what the family has no decoder for."""
    try:
        layout = layout_of(scheme)
    except UnsupportedError as error:
        for reason in error.reasons:
            yield f"{scheme.name}: {reason}"
        return
    if family is Family.MMA and layout.math is Math.E4M3 and layout.weight_bits != 8:
        yield f"{scheme.name}: the mma family has no {layout.weight_bits}-bit to e4m3 decoder, only wgmma has"


def _common_structure_reasons(config: KernelConfig) -> Iterator[str]:
    family, tile = config.family.value, config.tile
    if tile.k:
        yield f"tile.k is {tile.k}: it is 0 in a configuration, the k-tile follows from the scheme"
    if tile.m % UNIT_ROWS:
        yield f"tile.m {tile.m} is not a multiple of the packed unit's {UNIT_ROWS} rows"
    if config.warps.k != 1:
        yield f"slice-K {config.warps.k}: the {family} family generates warps.k = 1 only"
    if config.num_stages < 2:
        yield f"{config.num_stages} stages: the pipeline needs at least 2"
    if config.num_threads > MAX_THREADS_PER_CTA:
        yield f"{config.num_threads} threads > {MAX_THREADS_PER_CTA} per block"


def _mma_structure_reasons(config: KernelConfig) -> Iterator[str]:
    yield from _common_structure_reasons(config)
    tile, warps = config.tile, config.warps
    if config.split_k != 1:
        yield f"split-K {config.split_k}: the mma family generates split_k = 1 only"
    if config.cluster != 1 or config.tail:
        yield f"cluster {config.cluster}, tail {config.tail}: only the wgmma family has these"
    if tile.m % (16 * warps.m):
        yield f"tile.m {tile.m} does not split into 16-row blocks over {warps.m} warps: multiples of {16 * warps.m} do"
    if tile.n % (8 * warps.n):
        yield f"tile.n {tile.n} does not split into 8-token blocks over {warps.n} warps: multiples of {8 * warps.n} do"
    elif (blocks := tile.n // (8 * warps.n)) > 1 and blocks % 2:
        yield f"tile.n {tile.n} gives each of {warps.n} warps {blocks} token blocks: ldmatrix takes 1, or pairs"
    if config.num_threads < MIN_THREADS:
        yield f"{config.num_threads} threads: at least {MIN_THREADS}"
    if tile.m // 8 > config.num_threads:
        yield f"tile.m {tile.m} needs {tile.m // 8} threads to copy a scale strip, {config.num_threads} are there"


def _wgmma_structure_reasons(config: KernelConfig) -> Iterator[str]:
    yield from _common_structure_reasons(config)
    tile, warps = config.tile, config.warps
    warpgroups, left_over = divmod(warps.m, WARPS_PER_WARPGROUP)
    if warps.n != 1:
        yield f"{warps.n} warps along tokens: a wgmma has all tile.n tokens, warps.n is 1"
    if config.num_stages == 2 and min(config.token_widths) <= smem_wgmma.WARPS_UP_TO_TOKENS:
        yield f"2 stages: tiles of {smem_wgmma.WARPS_UP_TO_TOKENS} tokens hold two while a third is filled"
    if left_over or not 1 <= warpgroups <= MAX_CONSUMER_WARPGROUPS:
        yield f"{warps.m} warps along rows: a wgmma takes warpgroups of {WARPS_PER_WARPGROUP}, so 4, 8 or 12 warps"
    elif tile.m % (UNIT_ROWS * warpgroups):
        needed = UNIT_ROWS * warpgroups
        yield f"tile.m {tile.m} does not split over {warpgroups} warpgroups: multiples of {needed} do"
    if tile.n not in WGMMA_TILE_N:
        yield f"tile.n {tile.n}: the wgmma family takes 8 or multiples of 16 up to 256"
    if config.cluster > MAX_CLUSTER:
        yield f"cluster of {config.cluster}: at most {MAX_CLUSTER} CTAs share loads"
    if config.split_k not in SPLITS:
        yield f"split-K {config.split_k}: 1, 2 or 4 CTAs share a tile's reduction"
    if config.split_k > 1 and config.cluster > 1:
        yield (
            f"split-K {config.split_k} in a cluster of {config.cluster}: its CTAs share k-tiles or the loads of"
            " tokens, not both"
        )
    if config.tail and (config.tail not in TAILS or config.tail == tile.n or config.tail not in config.token_widths):
        yield f"tail {config.tail}: 8, or a multiple of 16, that is a half, a quarter, ... of tile.n {tile.n}"
    elif (widths := len(config.token_widths)) > MAX_WIDTHS:
        yield f"tail {config.tail}: {widths} widths of a tile of {tile.n}, at most {MAX_WIDTHS}"


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
    yield from _register_reasons(config, schemes, gpu)


def _register_reasons(config: KernelConfig, schemes: Sequence[QuantScheme], gpu: GpuSpec) -> Iterator[str]:
    """What can be said before a compiler has seen the kernel."""
    ctas, threads, margin = config.min_ctas_per_sm, config.num_threads, registers.margin(config)
    needed = registers.estimated_registers(config, schemes) + margin
    limit = registers.register_limit(config, gpu)
    if needed > limit:
        who = "consumer thread" if config.family is Family.WGMMA else "thread"
        why = f" with {ctas} CTAs of {threads} threads per SM" if limit < MAX_REGISTERS_PER_THREAD else ""
        parts = f"{needed - margin} for tiles, {margin} margin"
        yield f"registers: about {needed} a {who} ({parts}) > {limit}{why} on {gpu.name}"
    if config.family is not Family.WGMMA:
        return
    sums, at_launch = config.tile.n // 2, smem_wgmma.launch_registers(config)
    if sums + registers.BESIDE_A_WGMMAS_SUMS > at_launch:
        yield (
            f"tile.n {config.tile.n}: a wgmma's {sums} sums and {registers.BESIDE_A_WGMMAS_SUMS} registers beside them"
            f" > {at_launch} a thread, which {ctas} CTAs of {threads} threads leave at launch"
        )


def _fact_reasons(config: KernelConfig, gpu: GpuSpec, facts: BuildFacts) -> Iterator[str]:
    """What the compiler's numbers say about a kernel that was built."""
    if facts.spill_bytes:
        yield f"spills {facts.spill_bytes} bytes"
    if facts.stack_bytes:
        yield f"stack of {facts.stack_bytes} bytes"
    if facts.registers_per_thread > MAX_REGISTERS_PER_THREAD:
        yield f"{facts.registers_per_thread} registers a thread > {MAX_REGISTERS_PER_THREAD}"
    per_cta = registers_per_cta(facts.registers_per_thread, facts.num_threads)
    if config.family is Family.WGMMA and (wanted := registers.setmaxnreg_registers(config)) > per_cta:
        consumer, producer = smem_wgmma.consumer_registers(config), smem_wgmma.producer_registers(config)
        yield (
            f"setmaxnreg deals out {wanted} registers a CTA ({consumer} a consumer thread, {producer} a producer"
            f" thread), the launch takes {per_cta} ({facts.registers_per_thread} a thread): it would wait for ever"
        )
    fit = occupancy(
        gpu, registers_per_thread=facts.registers_per_thread, num_threads=facts.num_threads, smem_bytes=facts.smem_bytes
    )
    if fit.ctas_per_sm < config.min_ctas_per_sm and fit.limit is Limit.REGISTERS:
        each = f"{per_cta} ({facts.registers_per_thread} a thread)"
        yield f"registers {config.min_ctas_per_sm} x {each} > {gpu.regs_per_sm} per SM on {gpu.name}"


def _kib(num_bytes: int) -> str:
    return f"{num_bytes / 1024:.4g} KiB"
