"""What a `--measure` run consists of: cells, in which order, and which configurations of ours each tries."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import pandas as pd

from bench.kernel_sets import Standing, ranked, standing
from bench.layer.allocations import Allocation
from bench.peers.report import REPRESENTATIVES
from bench.peers.roofline import Roofline, roofline
from bench.peers.routing import Draw, draw_load
from kernel_gen.kernels import KernelSpec
from kernel_gen.select import table_size
from kernel_gen.sweeping.candidates import Workload
from profiles import kernels
from profiles.gpus import GpuSpec
from profiles.kernels import KernelConfig
from profiles.loads import TokenLoad
from profiles.models import Linear, model
from profiles.schemes import QuantScheme

NUM_CONFIGS = 8
CELL = ("model", "linear", "tokens", "draw", "seed", "scheme")
PUBLISHED_TOKENS = (16, 512, 8192)
CALIBRATED_TOKENS = 8192
"""The batch that tells a mix which experts the router takes often."""
SEED_OF_ORDER = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One grouped GEMM: the experts of one linear under one load, all in one scheme or in a mix's."""

    model: str
    linear: Linear
    tokens: int
    draw: Draw
    what: QuantScheme | Allocation
    seed: int = 0

    @property
    def key(self) -> tuple[Any, ...]:
        """The values of the columns CELL."""
        return (self.model, self.linear.value, self.tokens, self.draw.value, self.seed, self.what.name)

    @property
    def is_mix(self) -> bool:
        """Whether experts differ."""
        return isinstance(self.what, Allocation)

    @property
    def schemes(self) -> tuple[QuantScheme, ...]:
        """Each expert's."""
        shape = model(self.model)
        if isinstance(self.what, QuantScheme):
            return (self.what,) * shape.num_experts
        often = draw_load(self.draw, shape.num_experts, CALIBRATED_TOKENS, shape.top_k, self.seed).tokens_per_expert
        return self.what.schemes(shape, often)[self.linear]

    @property
    def workload(self) -> Workload:
        """As the sweep has it."""
        shape = model(self.model)
        n, k = shape.gemm(self.linear)
        return Workload(
            model=self.model,
            linear=self.linear.value,
            num_experts=shape.num_experts,
            n=n,
            k=k,
            schemes=self.schemes if self.is_mix else self.schemes[:1],
            label=self.what.name,
        )

    @property
    def load(self) -> TokenLoad:
        """The tokens of each expert."""
        shape = model(self.model)
        return draw_load(self.draw, shape.num_experts, self.tokens, shape.top_k, self.seed)

    @property
    def parts(self) -> dict[QuantScheme, Roofline]:
        """The least time of each scheme's experts."""
        n, k = model(self.model).gemm(self.linear)
        given = list(zip(self.schemes, self.load.tokens_per_expert, strict=True))
        return {
            slot: roofline(slot, n, k, [count for scheme, count in given if scheme == slot])
            for slot in dict.fromkeys(self.schemes)
        }

    @property
    def roofline_us(self) -> float:
        """The least time of its parts, one after the other."""
        return sum(part.us for part in self.parts.values())


class Turn(IntEnum):
    """When a cell's turn comes."""

    PUBLISHED = 0
    LINES = 1
    BY_LOT = 2


def in_order(cells: Sequence[Cell]) -> list[Cell]:
    """A run may be cut by its time limit, so what matters most comes first, and what is left by lot has some of
    everything: first the cells that peers published, in the scheme of their bytes; then the same schemes' other numbers
    of tokens under the peers' draw, which the picture's lines need; then the others, one of each model, linear and
    scheme before a second of any, in an order drawn once.
    """
    lots = random.Random(SEED_OF_ORDER)
    rest = sorted((cell for cell in cells if _turn(cell) is Turn.BY_LOT), key=lambda cell: str(cell.key))
    lots.shuffle(rest)
    seen: dict[Workload, int] = {}
    rounds: dict[Cell, int] = {}
    for cell in rest:
        rounds[cell] = seen.get(cell.workload, 0)
        seen[cell.workload] = rounds[cell] + 1
    return [
        *(cell for cell in cells if _turn(cell) is Turn.PUBLISHED),
        *(cell for cell in cells if _turn(cell) is Turn.LINES),
        *sorted(rest, key=rounds.__getitem__),
    ]


def _turn(cell: Cell) -> Turn:
    if cell.draw is not Draw.PEERS or cell.what.name not in REPRESENTATIVES.values():
        return Turn.BY_LOT
    return Turn.PUBLISHED if cell.tokens in PUBLISHED_TOKENS else Turn.LINES


def our_configs(
    cell: Cell, gpu: GpuSpec, recorded: pd.DataFrame, number: int = NUM_CONFIGS, *, built_only: bool = False
) -> list[KernelConfig]:
    """At most `number` configurations that may be fastest, in turn: what the latency models rank first for these
    tokens, and the fastest recorded ones (bench.peers.recorded.read_launches) of this model, linear and scheme at the
    recorded tokens nearest to the cell's. None that the gate is known to refuse; built_only: of the kernels that the
    cache has.
    """
    work = cell.workload
    by_model = [config.name for config in ranked(cell.schemes, work.n, work.k, cell.load.tokens_per_expert, gpu)]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(by_model, _recorded_winners(cell, recorded)))
    allowed = {Standing.MAY_RUN} if built_only else {Standing.MAY_RUN, Standing.UNKNOWN}
    configs = (kernels.parse(name) for name in dict.fromkeys(name for name in in_turn if name))
    return list(
        itertools.islice((each for each in configs if standing(_spec(cell, each, gpu), gpu) in allowed), number)
    )


def specs_of(cells: Mapping[Cell, Sequence[KernelConfig]], gpu: GpuSpec) -> list[KernelSpec]:
    """Our kernels that the cells run."""
    found = (_spec(cell, config, gpu) for cell, configs in cells.items() for config in configs)
    return list(dict.fromkeys(found))


def _spec(cell: Cell, config: KernelConfig, gpu: GpuSpec) -> KernelSpec:
    slots = tuple(sorted(set(cell.schemes), key=lambda scheme: scheme.name))
    return KernelSpec(config=config, schemes=slots, arch=gpu.arch, max_experts=table_size(len(cell.schemes)))


def _recorded_winners(cell: Cell, recorded: pd.DataFrame) -> list[str]:
    """Of one scheme alone: other sizes' mixes are other mixes."""
    if cell.is_mix:
        return []
    same = recorded[
        (recorded["schemes"].map(len) == 1)
        & (recorded["schemes"].str[0] == cell.what.name)
        & (recorded["model"] == cell.model)
        & (recorded["linear"] == cell.linear.value)
    ]
    found: list[str] = []
    for near in (
        same[same["tokens"] >= cell.tokens]["tokens"].min(),
        same[same["tokens"] < cell.tokens]["tokens"].max(),
    ):
        at = same[same["tokens"] == near]
        found += [at.loc[rows["latency_us"].idxmin(), "config"] for _, rows in at.groupby("load")]
    return list(dict.fromkeys(found))
