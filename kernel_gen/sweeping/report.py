"""What a sweep found: the best configuration per scheme and load, and where one scheme overtakes another. Written to
stdout as tables or JSON.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.console import Console
from rich.table import Table

from costmodel.table import crossover_tokens
from profiles.records import Source

CROSSOVER_PAIRS = (("w4a16", "w8a8"), ("w4a16", "w8a8_e4m3"), ("w2a16", "w4a4"))
"""(better with few tokens, better with many): the pairs that the MxMoE paper compares, and float8. A name stands for
its fastest variant.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The best configuration of one scheme (or mix of schemes) for one load of one linear.

    `load` names the kind of load, the token count apart: "uniform". `is_built`: the kernel's build facts were read from
    a build, or it was measured.
    """

    model: str
    linear: str
    load: str
    tokens: int
    tokens_per_expert: float
    scheme: str
    latency_us: float
    config: str
    source: Source
    is_built: bool

    @property
    def panel(self) -> tuple[str, str, str]:
        """What one table or picture holds: (model, linear, load)."""
        return self.model, self.linear, self.load


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossover:
    """`few` is faster below `tokens_per_expert` tokens an expert, `many` above. None: one is faster throughout,
    `winner`.
    """

    model: str
    linear: str
    load: str
    few: str
    many: str
    tokens_per_expert: float | None
    winner: str | None

    def __str__(self) -> str:
        where = f"{self.model} {self.linear}, {self.load} load"
        if self.tokens_per_expert is not None:
            return f"{where}: {self.few} beats {self.many} below {self.tokens_per_expert:.3g} tokens an expert"
        loser = self.many if self.winner == self.few else self.few
        return f"{where}: {self.winner} beats {loser} at every load swept"


def kind(scheme: str) -> str:
    """A scheme's bits and type, without group size and symmetry: "w4a16" of "w4a16_g128_asym"; a mix is itself."""
    if "+" in scheme:
        return scheme
    bits, *rest = scheme.split("_")
    return f"{bits}_e4m3" if "e4m3" in rest else bits


def panels(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Cells by (model, linear, load), in order of first appearance."""
    order: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        order.setdefault(cell.panel, []).append(cell)
    return list(order.values())


def crossovers(cells: Sequence[Cell]) -> list[Crossover]:
    """The crossover of each of CROSSOVER_PAIRS in each panel that holds both, from at least one token count."""
    found: list[Crossover] = []
    for panel in panels(cells):
        for few, many in CROSSOVER_PAIRS:
            crossover = _crossover(panel, few, many)
            if crossover is not None:
                found.append(crossover)
    return found


def _crossover(panel: Sequence[Cell], few: str, many: str) -> Crossover | None:
    ratios = _log_ratios(panel, few, many)
    if not ratios:
        return None
    model, linear, load = panel[0].panel
    at = crossover_tokens([tokens for tokens, _ in ratios], [ratio for _, ratio in ratios])
    winner = None if at is not None else (few if sum(ratio for _, ratio in ratios) < 0 else many)
    return Crossover(model=model, linear=linear, load=load, few=few, many=many, tokens_per_expert=at, winner=winner)


def _log_ratios(panel: Sequence[Cell], few: str, many: str) -> list[tuple[float, float]]:
    """(tokens an expert, log(latency of few / latency of many)), by tokens; a kind stands for its fastest variant."""
    best: dict[tuple[float, str], float] = {}
    for cell in panel:
        key = cell.tokens_per_expert, kind(cell.scheme)
        best[key] = min(cell.latency_us, best.get(key, math.inf))
    tokens = sorted({tokens for tokens, _ in best})
    return [
        (count, math.log(best[count, few] / best[count, many]))
        for count in tokens
        if (count, few) in best and (count, many) in best
    ]


def print_report(cells: Sequence[Cell], crossings: Sequence[Crossover], *, title: str, console: Console) -> None:
    """The closing tables: one a panel, a line per scheme and token count, then the crossovers."""
    for panel in panels(cells):
        model, linear, load = panel[0].panel
        heading = f"{model} {linear}, {load} load: best of each scheme, {title}"
        console.print(heading, style="bold", highlight=False, soft_wrap=True)  # a table's own title wraps at its width
        console.print(_table(panel))
    if crossings:
        console.print("Crossovers (fastest variant of each scheme):")
        for crossing in crossings:
            console.print(f"  {crossing}", highlight=False)


def _table(panel: Sequence[Cell]) -> Table:
    table = Table()
    for column, justify in (
        ("scheme", "left"),
        ("tokens", "right"),
        ("latency, us", "right"),
        ("vs w16a16", "right"),
        ("best configuration", "left"),
    ):
        table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]  # rich types justify as a Literal
    base = {cell.tokens: cell.latency_us for cell in panel if cell.scheme == "w16a16"}
    are_both = len({cell.source for cell in panel}) == 2
    for scheme, rows in groupby(panel, key=lambda cell: cell.scheme):
        for index, cell in enumerate(rows):
            speedup = f"{base[cell.tokens] / cell.latency_us:.2f}x" if cell.tokens in base else "-"
            config = cell.config if cell.is_built else f"{cell.config} (estimated facts)"
            if are_both and cell.source is Source.PREDICTED:
                config = f"{cell.config} (predicted)"
            table.add_row(scheme if index == 0 else "", str(cell.tokens), f"{cell.latency_us:.1f}", speedup, config)
        table.add_section()
    return table
