"""Launches as the analytic model takes them: one by one as objects, or thousands as columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from costmodel.constants import MMA_K
from costmodel.facts import BuildFacts
from costmodel.work import expert_weight_bytes, narrowest_work, part_k_tiles, split_load, tile_work, token_bytes
from profiles.errors import SpecError
from profiles.gpus import Math
from profiles.kernels import Family, GemmShape, KernelConfig, Raster
from profiles.loads import TokenLoad
from profiles.schemes import QuantScheme

FLOPS_PER_MMA_K1 = 2.0 * 16 * 8
"""Operations of an m16n8 MMA for each k."""
MAX_SLOTS = 4
OF_A_WIDTH = (
    *("k_tile_tensor_mmas", "k_tile_instructions", "instructions_of_a_warp", "k_tile_smem_bytes", "k_tile_bytes"),
    *("mmas_per_k_step_of_a_warp", "serial_instructions_of_a_warp", "epilogue_instructions", "stores_in_turn"),
    *("output_bytes", "partial_sum_bytes", "exposed_k_steps"),
)
"""Columns of one tile that depend on how many tokens it takes."""
_MATH_INDEX = {math: index for index, math in enumerate(Math)}
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
    `used` is false. `num_tiles` are what CTAs take one of at a time: with split-K parts of output tiles, the longest of
    which has `chain_k_tiles` of the tile's `num_k_tiles`. `num_full_tiles` counts a tile of fewer tokens as the part of
    a full one that it is; the narrowest is `least_width` of it. Columns of one tile are of a full one, those that begin
    with `narrow_` of the narrowest.
    """

    n: Array
    k: Array
    num_experts: Array
    ctas_per_sm: Array
    num_warps: Array
    num_stages: Array
    num_feature_tiles: Array
    split_k: Array
    tile_n: Array
    least_width: Array
    is_along_tokens: npt.NDArray[np.bool_]
    is_mma_family: npt.NDArray[np.bool_]
    used: npt.NDArray[np.bool_]
    math_index: npt.NDArray[np.intp]
    num_tokens: Array
    num_active: Array
    num_token_tiles: Array
    max_tokens: Array
    num_tiles: Array
    num_full_tiles: Array
    num_k_tiles: Array
    chain_k_tiles: Array
    mma_k: Array
    k_steps: Array
    k_tile_mmas: Array
    k_tile_tensor_mmas: Array
    k_tile_instructions: Array
    instructions_of_a_warp: Array
    k_tile_smem_bytes: Array
    k_tile_bytes: Array
    exposed_k_steps: Array
    mmas_per_k_step_of_a_warp: Array
    serial_instructions_of_a_warp: Array
    epilogue_instructions: Array
    stores_in_turn: Array
    output_bytes: Array
    partial_sum_bytes: Array
    expert_weight_bytes: Array
    token_bytes: Array
    narrow_k_tile_tensor_mmas: Array
    narrow_k_tile_instructions: Array
    narrow_instructions_of_a_warp: Array
    narrow_k_tile_smem_bytes: Array
    narrow_k_tile_bytes: Array
    narrow_mmas_per_k_step_of_a_warp: Array
    narrow_serial_instructions_of_a_warp: Array
    narrow_epilogue_instructions: Array
    narrow_stores_in_turn: Array
    narrow_output_bytes: Array
    narrow_partial_sum_bytes: Array
    narrow_exposed_k_steps: Array

    def __len__(self) -> int:
        return len(self.n)

    def rows(self, start: int, stop: int) -> LaunchTable:
        """Rows from `start` up to `stop`, as views."""
        names = (field.name for field in dataclasses.fields(self))
        return LaunchTable(**{name: getattr(self, name)[start:stop] for name in names})

    def take(self, rows: npt.NDArray[np.intp]) -> LaunchTable:
        """Some rows, copied."""
        return LaunchTable(**{field.name: getattr(self, field.name)[rows] for field in dataclasses.fields(self)})

    @property
    def has_tail(self) -> npt.NDArray[np.bool_]:
        """[R]: whether an expert's last tile may be narrower."""
        return np.asarray(self.least_width < 1.0, dtype=np.bool_)

    def narrowest(self) -> LaunchTable:
        """The same launches, the columns of one tile of the narrowest one."""
        return dataclasses.replace(self, **{name: getattr(self, f"narrow_{name}") for name in OF_A_WIDTH})

    @classmethod
    def of(cls, launches: Sequence[Launch]) -> LaunchTable:
        """The columns of these launches, in order."""
        slots = [launch.slots() for launch in launches]
        width = max((len(row) for row in slots), default=1)
        names = [field.name for field in dataclasses.fields(cls)]
        columns = {name: np.zeros((len(launches), width)) for name in names[names.index("num_tokens") :]}
        used = np.zeros((len(launches), width), dtype=np.bool_)
        math_index = np.zeros((len(launches), width), dtype=np.intp)
        for row, (launch, of_launch) in enumerate(zip(launches, slots, strict=True)):
            for slot, (scheme, tokens) in enumerate(of_launch):
                for name, value in _slot_values(launch, scheme, tokens).items():
                    columns[name][row, slot] = value
                math_index[row, slot] = _MATH_INDEX[scheme.math]
                used[row, slot] = True
        configs = [launch.config for launch in launches]
        return cls(
            n=_column([launch.shape.n for launch in launches]),
            k=_column([launch.shape.k for launch in launches]),
            num_experts=_column([len(launch.load.tokens_per_expert) for launch in launches]),
            ctas_per_sm=_column([launch.facts.ctas_per_sm for launch in launches]),
            num_warps=_column([config.warps.num_warps for config in configs]),
            num_stages=_column([config.num_stages for config in configs]),
            num_feature_tiles=_column([-(-launch.shape.n // launch.config.tile.m) for launch in launches]),
            split_k=_column([config.split_k for config in configs]),
            tile_n=_column([config.tile.n for config in configs]),
            least_width=_column([config.token_widths[0] / config.tile.n for config in configs]),
            is_along_tokens=np.asarray([config.raster is Raster.ALONG_TOKENS for config in configs], dtype=np.bool_),
            is_mma_family=np.asarray([config.family is Family.MMA for config in configs], dtype=np.bool_),
            used=used,
            math_index=math_index,
            **columns,
        )


def _column(values: Sequence[float]) -> Array:
    return np.asarray(values, dtype=np.float64)


def _slot_values(launch: Launch, scheme: QuantScheme, tokens: tuple[int, ...]) -> dict[str, float]:
    """A slot's entries in the [R, S] columns, from num_tokens on."""
    shape, config = launch.shape, launch.config
    work, split = tile_work(config, scheme), split_load(tokens, config.token_widths)
    narrow = narrowest_work(config, scheme)
    parts = -(-shape.n // config.tile.m) * config.split_k
    return {
        "num_tokens": split.num_tokens,
        "num_active": split.num_active_experts,
        "num_token_tiles": split.num_token_tiles,
        "max_tokens": split.max_tokens,
        "num_tiles": split.num_token_tiles * parts,
        "num_full_tiles": split.full_token_tiles * parts,
        "num_k_tiles": -(-shape.k // work.k_tile),
        "chain_k_tiles": part_k_tiles(scheme, shape.k, config.split_k),
        "mma_k": MMA_K[scheme.math],
        "k_steps": work.k_steps,
        "k_tile_mmas": work.k_tile_mmas,
        "k_tile_tensor_mmas": work.k_tile_tensor_mmas,
        "k_tile_instructions": work.k_tile_instructions,
        "instructions_of_a_warp": work.instructions_of_a_warp,
        "k_tile_smem_bytes": work.k_tile_smem_bytes,
        "k_tile_bytes": work.k_tile_bytes,
        "exposed_k_steps": work.exposed_k_steps,
        "mmas_per_k_step_of_a_warp": work.mmas_per_k_step_of_a_warp,
        "serial_instructions_of_a_warp": work.serial_instructions_of_a_warp,
        "epilogue_instructions": work.epilogue_instructions,
        "stores_in_turn": work.stores_in_turn,
        "output_bytes": work.output_bytes,
        "partial_sum_bytes": work.partial_sum_bytes,
        "expert_weight_bytes": expert_weight_bytes(scheme, shape.n, shape.k),
        "token_bytes": token_bytes(scheme, shape.k),
        **{f"narrow_{name}": getattr(narrow, name) for name in OF_A_WIDTH},
    }
