"""The candidates of a guided sweep, among which `costmodel.guide` chooses, and its choices as a sweep's results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from costmodel.features import Kernels, as_frame
from costmodel.guide import Belief, Candidates
from costmodel.kernel_use import KernelUse
from costmodel.model import LatencyModel
from costmodel.table import CostTable, fastest
from kernel_gen.legality import estimated_facts
from kernel_gen.space import Effort
from kernel_gen.sweeping import report
from kernel_gen.sweeping.builds import bundled
from kernel_gen.sweeping.candidates import Candidate, Workload
from kernel_gen.sweeping.plan import Cell, SweepRequest
from profiles.kernels import KernelConfig
from profiles.loads import TokenLoad
from profiles.records import Source

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.intp]

CANDIDATES_PER_CELL = {Effort.QUICK: 12, Effort.FULL: 32}
"""Configurations of a cell that are considered: the best by the base's predictions."""
_PRICED_PER_CELL = 64
"""Configurations of a cell whose price the base is asked for: the best by the analytic model."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Choices:
    """`made` [R]: the sweep's candidates, in the order of the rows of `candidates`, in which a launch's number is its
    cell's place in `cells`.
    """

    cells: Sequence[Cell]
    made: tuple[Candidate, ...]
    candidates: Candidates

    def __len__(self) -> int:
        return len(self.made)

    @classmethod
    def of(cls, request: SweepRequest, cells: Sequence[Cell], base: LatencyModel | None) -> Choices:
        """Each cell's most promising configurations."""
        priced = [(index, config) for index, cell in enumerate(cells) for config in cell.configs[:_PRICED_PER_CELL]]
        cell_of = np.asarray([index for index, _ in priced], dtype=np.intp)
        X = _features(request, cells, priced)
        log_us = np.log(X["latency_us"].to_numpy(dtype=np.float64) if base is None else base.predict(X))
        order = np.lexsort((log_us, cell_of))
        rank = np.arange(len(order)) - np.searchsorted(cell_of[order], cell_of[order])
        kept = np.sort(order[rank < (request.tries or CANDIDATES_PER_CELL[request.effort])])
        made = tuple(cells[priced[row][0]].candidate(priced[row][1]) for row in kept)
        cell_of = cell_of[kept]
        candidates = Candidates(
            features=X.iloc[kept].reset_index(drop=True),
            launches=cell_of,
            kernels=_codes(made, lambda each: (each.config, each.workload.slots, each.workload.max_experts)),
            inputs=cell_of,
            weights=_codes(made, lambda each: each.workload),
        )
        return cls(cells=cells, made=made, candidates=candidates)

    def best(self, belief: Belief, built: npt.NDArray[np.bool_]) -> list[report.Cell]:
        """What was chosen for each cell; none where every candidate failed. `built` [R]: whose kernels are there."""
        found = []
        for row in belief.chosen[np.isfinite(belief.log_us[belief.chosen])].tolist():
            cell, candidate = self.cells[self.candidates.launches[row]], self.made[row]
            found.append(
                report.Cell(
                    model=cell.workload.model,
                    linear=cell.workload.linear,
                    load=cell.case.kind,
                    tokens=cell.case.tokens,
                    tokens_per_expert=cell.case.load.total / cell.workload.num_experts,
                    scheme=cell.workload.label,
                    latency_us=float(np.exp(belief.log_us[row])),
                    config=candidate.config.name,
                    source=_source(belief, row),
                    is_built=bool(built[row] or belief.measured[row]),
                )
            )
        return found

    def table(self, request: SweepRequest, belief: Belief, model_version: str) -> CostTable | None:
        """The same for the cells with one scheme, as an allocator reads it; None if there is no such cell."""
        deviation = np.sqrt(belief.posterior.variance())
        rows = [
            {
                "gpu": request.gpu.name,
                "model_version": model_version,
                "model": (work := self.made[row].workload).model,
                "linear": work.linear,
                "scheme": work.slots[0].name,
                "scenario": self.made[row].load.source,
                "tokens_per_expert": float(np.mean(self.made[row].load.tokens_per_expert)),
                "latency_us": (latency_us := float(np.exp(belief.log_us[row]))),
                "std_us": float(latency_us * deviation[row]),
                "config": self.made[row].config.name,
                "source": _source(belief, row).value,
            }
            for row in belief.chosen[np.isfinite(belief.log_us[belief.chosen])].tolist()
            if len(self.made[row].workload.slots) == 1
        ]
        return CostTable(fastest(pd.DataFrame(rows))) if rows else None


def _source(belief: Belief, row: int) -> Source:
    return Source.MEASURED if belief.measured[row] else Source.PREDICTED


def _codes(made: Sequence[Candidate], key: Callable[[Candidate], object]) -> Codes:
    known: dict[object, int] = {}
    return np.asarray([known.setdefault(key(each), len(known)) for each in made], dtype=np.intp)


def _features(request: SweepRequest, cells: Sequence[Cell], priced: Sequence[tuple[int, KernelConfig]]) -> pd.DataFrame:
    """The matrix of configurations in cells, with the facts known: those of the bundle, else estimates."""
    uses: dict[tuple[Workload, KernelConfig], int] = {}
    loads: dict[tuple[int, ...], int] = {}
    kernels, distinct = list[KernelUse](), list[TokenLoad]()
    use_of, load_of = np.empty(len(priced), dtype=np.intp), np.empty(len(priced), dtype=np.intp)
    occupancy = _Occupancy(request)
    for row, (index, config) in enumerate(priced):
        work, load = cells[index].workload, cells[index].case.load
        if (work, config) not in uses:
            uses[work, config] = len(kernels)
            kernels.append(
                KernelUse(n=work.n, k=work.k, schemes=work.schemes, config=config, ctas_per_sm=occupancy(work, config))
            )
        if load.tokens_per_expert not in loads:
            loads[load.tokens_per_expert] = len(distinct)
            distinct.append(load)
        use_of[row], load_of[row] = uses[work, config], loads[load.tokens_per_expert]
    return as_frame(Kernels(request.gpu, kernels).matrix(distinct, use_of, load_of))


class _Occupancy:
    """CTAs per SM of a kernel, from the bundle or estimated."""

    def __init__(self, request: SweepRequest) -> None:
        self._request = request

    def __call__(self, work: Workload, config: KernelConfig) -> int:
        request = self._request
        if request.bundle is not None and (facts := bundled(request.bundle, work)[config].facts):
            return facts.ctas_per_sm
        return estimated_facts(config, work.slots, request.gpu, max_experts=work.max_experts).ctas_per_sm
