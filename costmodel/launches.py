"""Launches as the analytic model takes them: one by one as objects, or thousands as columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from costmodel.constants import MMA_K
from costmodel.facts import BuildFacts
from costmodel.splits import split_load
from costmodel.work import expert_weight_bytes, tile_work, token_bytes
from profiles.errors import SpecError
from profiles.kernels import GemmShape, KernelConfig, Raster
from profiles.loads import TokenLoad
from profiles.schemes import QuantScheme

FLOPS_PER_MMA_K1 = 2.0 * 16 * 8
"""Operations of an m16n8 MMA for each k."""
MAX_SLOTS = 4
Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One grouped GEMM: `schemes` is one scheme per expert of the load, or a single one for all. `shape.m` is not
    read: the load holds the tokens.
    """

    shape: GemmShape
    load: TokenLoad
    schemes: tuple[QuantScheme, ...]
    config: KernelConfig
    facts: BuildFacts

    def __post_init__(self) -> None:
        experts = len(self.load.tokens_per_expert)
        if len(self.schemes) not in (1, experts):
            raise SpecError(f"{len(self.schemes)} schemes for {experts} experts: give one per expert, or one for all")
        if len(set(self.schemes)) > MAX_SLOTS:
            raise SpecError(
                f"{len(set(self.schemes))} different schemes in a launch: a kernel holds at most {MAX_SLOTS}"
            )
        if self.facts.ctas_per_sm < 1:
            raise SpecError(f"{self.config.name}: build facts say that no CTA fits an SM, so it has no latency")

    def slots(self) -> list[tuple[QuantScheme, tuple[int, ...]]]:
        """Each distinct scheme and its experts' tokens."""
        tokens = self.load.tokens_per_expert
        if len(self.schemes) == 1:
            return [(self.schemes[0], tokens)]
        by_scheme: dict[QuantScheme, list[int]] = {}
        for scheme, count in zip(self.schemes, tokens, strict=True):
            by_scheme.setdefault(scheme, []).append(count)
        return [(scheme, tuple(counts)) for scheme, counts in by_scheme.items()]


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchTable:
    """R launches in columns: [R], or [R, S] with S slots (distinct schemes of a launch); unused slots hold zeros and
    `used` is false. `num_tiles` are what CTAs take one of at a time: with split-K parts of output tiles.
    `num_full_tiles` counts a tile of fewer tokens as the part of a full one that it is; the narrowest is `least_width`
    of it. `tile_flops` are multiplied for an output tile of full width, padding included.
    """

    n: Array
    k: Array
    num_experts: Array
    ctas_per_sm: Array
    num_feature_tiles: Array
    split_k: Array
    tile_n: Array
    least_width: Array
    is_along_tokens: npt.NDArray[np.bool_]
    used: npt.NDArray[np.bool_]
    num_tokens: Array
    num_active: Array
    num_token_tiles: Array
    max_tokens: Array
    num_tiles: Array
    num_full_tiles: Array
    tile_flops: Array
    expert_weight_bytes: Array
    token_bytes: Array

    def __len__(self) -> int:
        return len(self.n)

    def rows(self, rows: slice) -> LaunchTable:
        """Some rows, as views."""
        names = (field.name for field in dataclasses.fields(self))
        return LaunchTable(**{name: getattr(self, name)[rows] for name in names})

    @classmethod
    def of(cls, launches: Sequence[Launch]) -> LaunchTable:
        """The columns of these launches, in order."""
        slots = [launch.slots() for launch in launches]
        width = max((len(row) for row in slots), default=1)
        names = [field.name for field in dataclasses.fields(cls)]
        columns = {name: np.zeros((len(launches), width)) for name in names[names.index("num_tokens") :]}
        used = np.zeros((len(launches), width), dtype=np.bool_)
        for row, (launch, of_launch) in enumerate(zip(launches, slots, strict=True)):
            for slot, (scheme, tokens) in enumerate(of_launch):
                for name, value in _slot_values(launch, scheme, tokens).items():
                    columns[name][row, slot] = value
                used[row, slot] = True
        configs = [launch.config for launch in launches]
        return cls(
            n=column([launch.shape.n for launch in launches]),
            k=column([launch.shape.k for launch in launches]),
            num_experts=column([len(launch.load.tokens_per_expert) for launch in launches]),
            ctas_per_sm=column([launch.facts.ctas_per_sm for launch in launches]),
            num_feature_tiles=column([-(-launch.shape.n // launch.config.tile.m) for launch in launches]),
            split_k=column([config.split_k for config in configs]),
            tile_n=column([config.tile.n for config in configs]),
            least_width=column([config.token_widths[0] / config.tile.n for config in configs]),
            is_along_tokens=np.asarray([config.raster is Raster.ALONG_TOKENS for config in configs], dtype=np.bool_),
            used=used,
            **columns,
        )


def column(values: Sequence[float]) -> Array:
    """A column of numbers."""
    return np.asarray(values, dtype=np.float64)


def _slot_values(launch: Launch, scheme: QuantScheme, tokens: tuple[int, ...]) -> dict[str, float]:
    """A slot's entries in the [R, S] columns, from num_tokens on."""
    shape, config = launch.shape, launch.config
    work, split = tile_work(config, scheme), split_load(tokens, config.token_widths)
    parts = -(-shape.n // config.tile.m) * config.split_k
    return {
        "num_tokens": split.num_tokens,
        "num_active": split.num_active_experts,
        "num_token_tiles": split.num_token_tiles,
        "max_tokens": split.max_tokens,
        "num_tiles": split.num_token_tiles * parts,
        "num_full_tiles": split.full_token_tiles * parts,
        "tile_flops": -(-shape.k // work.k_tile) * work.k_tile_mmas * MMA_K[scheme.math] * FLOPS_PER_MMA_K1,
        "expert_weight_bytes": expert_weight_bytes(scheme, shape.n, shape.k),
        "token_bytes": token_bytes(scheme, shape.k),
    }
