"""Which configuration to launch: the fastest by a latency model for so many rows, before anything is measured here.

Where launches of the GPU come with the package, the model is fitted on them (`costmodel.shipped`); elsewhere it is the
analytic core, and `ranking` says which. Torch-free.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING

from costmodel.analytic import launch_latencies
from costmodel.kernel_use import KernelUse
from kernel_gen.legality import estimated_facts
from kernel_gen.space import Effort, candidates, enumerate_configs, summarise
from profiles.errors import SpecError, UnsupportedError
from profiles.gpus import GpuSpec
from profiles.kernels import KernelConfig
from profiles.loads import TokenLoad
from profiles.places import committed_profiles
from profiles.schemes import QuantScheme

if TYPE_CHECKING:
    from costmodel.pricing import KernelChooser

MAX_EXPERTS = 1024
"""Of `KernelSpec.max_experts`."""


class Ranking(Enum):
    """What ranks configurations."""

    FITTED = "the model fitted on the launches that come with bitile"
    CORE = "the analytic core"


@functools.lru_cache(maxsize=64)
def ranking(gpu: GpuSpec) -> Ranking:
    """What `choose` goes by unless it is told: the fitted model where there are launches of this GPU to fit one on."""
    return Ranking.FITTED if committed_profiles(gpu.name) else Ranking.CORE


def choose(
    schemes: Sequence[QuantScheme],
    n: int,
    k: int,
    num_rows: int,
    gpu: GpuSpec,
    *,
    among: tuple[KernelConfig, ...] | None = None,
    without: frozenset[KernelConfig] = frozenset(),
    by: Ranking | None = None,
) -> KernelConfig:
    """The configuration for a launch of `num_rows` rows spread evenly over experts with these schemes, one each; one of
    `among`, which were built for them, by default of all that are legal but `without`, which a build refused.

    The host does not know the real load (that would wait for the GPU), so rows are rounded up to a power of two: a
    handful of kernels serve every batch size. By `ranking(gpu)`, or `by` what is given. The fitted model may have to be
    fitted first, once on a machine.

    Raises:
        UnsupportedError: no configuration runs these schemes together.
        DataError: `by` asks for the fitted model of a GPU without recorded launches.
    """
    if without:
        slots, size = tuple(dict.fromkeys(schemes)), table_size(len(schemes))
        every = candidates(slots, gpu, Effort.QUICK, max_experts=size) if among is None else among
        among = tuple(config for config in every if config not in without)
    return _choose(tuple(schemes), n, k, rounded_rows(num_rows), gpu, among, by or ranking(gpu))


def rounded_rows(num_rows: int) -> int:
    """The next power of two: batch sizes that share it share a choice."""
    return max(1, 1 << (num_rows - 1).bit_length())


@functools.lru_cache(maxsize=4096)
def _choose(
    schemes: tuple[QuantScheme, ...],
    n: int,
    k: int,
    rows: int,
    gpu: GpuSpec,
    among: tuple[KernelConfig, ...] | None,
    by: Ranking,
) -> KernelConfig:
    each, more = divmod(rows, len(schemes))
    load = TokenLoad(tokens_per_expert=tuple(each + (e < more) for e in range(len(schemes))), source="even")
    if by is Ranking.FITTED:
        return _chooser(schemes, n, k, gpu, among).choose(load).use.config
    uses = kernel_uses(schemes, n, k, gpu, among)
    return uses[int(launch_latencies(gpu, [use.launch(load) for use in uses])["latency_us"].to_numpy().argmin())].config


@functools.lru_cache(maxsize=256)
def _chooser(
    schemes: tuple[QuantScheme, ...], n: int, k: int, gpu: GpuSpec, among: tuple[KernelConfig, ...] | None
) -> KernelChooser:
    # What was learned needs scipy and scikit-learn, a second to import.
    from costmodel.pricing import KernelChooser
    from costmodel.shipped import fitted

    return KernelChooser(fitted(gpu).model, gpu, kernel_uses(schemes, n, k, gpu, among))


def kernel_uses(
    schemes: tuple[QuantScheme, ...],
    n: int,
    k: int,
    gpu: GpuSpec,
    among: tuple[KernelConfig, ...] | None = None,
) -> list[KernelUse]:
    """The kernels to choose among for experts [n, k] of these schemes, one each: `among`, or every legal one of the
    quick space. None of them is built yet: their occupancy is estimated. UnsupportedError where there is none.
    """
    slots = tuple(sorted(set(schemes), key=lambda scheme: scheme.name))
    max_experts = table_size(len(schemes))
    found = _legal(slots, gpu, max_experts) if among is None else _occupied(among, slots, gpu, max_experts)
    if not found:
        what = f"one launch of {', '.join(slot.name for slot in slots)} on {gpu.name}"
        if among is not None:
            raise UnsupportedError(what, ["the build refused every configuration that is legal by estimate"])
        why = summarise(enumerate_configs(slots, gpu, Effort.QUICK, max_experts=max_experts)).by_kind
        raise UnsupportedError(what, [example for _, _, example in why])
    of_experts = schemes if len(slots) > 1 else slots
    return [KernelUse(n=n, k=k, schemes=of_experts, config=config, ctas_per_sm=ctas) for config, ctas in found]


Occupied = tuple[tuple[KernelConfig, int], ...]
"""Configurations with how many CTAs of each an SM holds."""


@functools.lru_cache(maxsize=256)
def _legal(slots: tuple[QuantScheme, ...], gpu: GpuSpec, max_experts: int) -> Occupied:
    return _occupied(candidates(slots, gpu, Effort.QUICK, max_experts=max_experts), slots, gpu, max_experts)


def _occupied(
    configs: Sequence[KernelConfig], slots: tuple[QuantScheme, ...], gpu: GpuSpec, max_experts: int
) -> Occupied:
    return tuple(
        (config, estimated_facts(config, slots, gpu, max_experts=max_experts).ctas_per_sm) for config in configs
    )


def table_size(num_experts: int) -> int:
    """Experts that a kernel for so many is built with, its scheduler's table: a power of two, at least 256, so that one
    build serves most models. SpecError where no table holds them.
    """
    if num_experts > MAX_EXPERTS:
        raise SpecError(f"experts: expected at most {MAX_EXPERTS}, which a kernel's table holds, got {num_experts}")
    return max(256, 1 << (num_experts - 1).bit_length())
