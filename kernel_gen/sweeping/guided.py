"""`--guided`: a latency model chooses what to measure next, and a sweep ends when little would be gained by going on.

The same rows come out as of any sweep, only fewer of them: what was measured, and what failed. Beside them is what was
chosen for each cell, by measurement or by prediction, with its uncertainty.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from costmodel.guide import Belief, Guide
from costmodel.model import LatencyModel
from costmodel.table import CostTable
from kernel_gen.sweeping import progress, report
from kernel_gen.sweeping.builds import Built
from kernel_gen.sweeping.candidates import Candidate, Measurement
from kernel_gen.sweeping.choices import Choices
from kernel_gen.sweeping.measuring import Bench, Pool
from kernel_gen.sweeping.plan import Cell, SweepRequest
from kernel_gen.sweeping.predict import package_version
from kernel_gen.timing import monotonic_s
from profiles.records import ProfileRecord, Source, Status

Codes = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]
_MOST_RATIO = 5.0
"""By how much one batch's seconds may correct the expected costs, either way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """How a guided sweep goes on, and when it ends.

    Attributes:
        base: a fitted model to begin from; None: the analytic core.
        base_name: what to call it.
        goal: the expected mean regret at which to stop, a fraction.
        max_measurements: of the sweep, those found in the profile counted; None: no limit.
        max_seconds: of compiling and measuring in this run; None: no limit.
        batch: measurements between two decisions.
    """

    base: LatencyModel | None = None
    base_name: str = "the analytic core"
    goal: float = 0.01
    max_measurements: int | None = None
    max_seconds: float | None = None
    batch: int = 32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """How a guided sweep ended: what was chosen for each cell, and how sure that is.

    Attributes:
        best: of each cell.
        table: the same for cells with one scheme, as an allocator reads it; None without any.
        num_candidates, num_measured: of all that could be measured, what was; failures counted.
        expected_regret: mean over cells, a fraction.
        seconds: of compiling and measuring in this run.
        why: it stopped.
    """

    best: tuple[report.Cell, ...]
    table: CostTable | None
    num_candidates: int
    num_measured: int
    expected_regret: float
    seconds: float
    why: str

    def __str__(self) -> str:
        return (
            f"{self.num_measured} of {self.num_candidates} candidates measured, {self.seconds:.0f} s of compiling and"
            f" measuring in this run; it stopped since {self.why}"
        )

    def summary(self) -> dict[str, object]:
        """The numbers, for JSON."""
        names = ("num_candidates", "num_measured", "expected_regret", "seconds", "why")
        return {name: getattr(self, name) for name in names}


@dataclass(slots=True)
class GuidedSweep:
    """One guided sweep over the cells of a plan, on a bench. `rows` makes its rows; after the last, `outcome` is set.

    `say` is told where it is, before each batch. `live`: draw progress bars.
    """

    request: SweepRequest
    cells: Sequence[Cell]
    guidance: Guidance
    bench: Bench
    say: Callable[[str], None]
    live: bool = False
    outcome: Outcome | None = None
    _seconds: float = field(default=0.0, init=False)

    def rows(self, had: Mapping[str, ProfileRecord]) -> Iterator[ProfileRecord]:
        """The rows that the profile has, then those measured now, batch by batch."""
        guidance = self.guidance
        choices = Choices.of(self.request, self.cells, guidance.base)
        guide = Guide.of(choices.candidates, guidance.base, batch=guidance.batch)
        measured, latency_us = np.zeros(len(choices), dtype=np.bool_), np.full(len(choices), np.nan)

        def known(row: int, record: ProfileRecord) -> ProfileRecord:
            measured[row] = True
            latency_us[row] = record.latency_us if record.status is Status.OK else np.nan
            return record

        for row, record in self._stored(choices, had):
            yield known(row, record)
        with ExitStack() as stack:
            pool: Pool | None = None
            while True:
                belief = guide.believe(measured, latency_us)
                regret = guide.expected_regret(belief)
                batch = guide.next(belief)[: self._left(measured)]
                why = self._why_stop(regret, measured, batch)
                if why is not None:
                    break
                self._tell(measured, f"expected regret {100 * regret:.2f}%")
                begun = monotonic_s()
                self.bench.build([choices.made[row] for row in batch], live=self.live)
                compiled = monotonic_s()
                if pool is None:
                    pool = stack.enter_context(self.bench.pool())
                for row, record in self._measured(choices, batch, pool):
                    yield known(row, record)
                guide = self._with_costs(guide, batch, measured, compiled - begun, monotonic_s() - compiled)
        self._tell(measured, f"stopped: {why}")
        self.outcome = self._outcome(choices, belief, regret, why)

    def _stored(self, choices: Choices, had: Mapping[str, ProfileRecord]) -> Iterator[tuple[int, ProfileRecord]]:
        """The candidates that the profile has, whether their kernels are built in this run or not."""
        gpu = self.request.gpu
        for row, candidate in enumerate(choices.made) if had else ():
            found = self.bench.find(candidate)
            fingerprint = found.fingerprint if found else candidate.spec(gpu).fingerprint()
            key = candidate.key(gpu=gpu.name, source=Source.MEASURED, kernel_fingerprint=fingerprint)
            if key in had:
                yield row, had[key]

    def _measured(self, choices: Choices, batch: Codes, pool: Pool) -> Iterator[tuple[int, ProfileRecord]]:
        """A row for each candidate of a batch; one whose kernel was refused has the reason."""
        runnable: dict[Candidate, int] = {}
        for row in batch.tolist():
            candidate = choices.made[row]
            found = self._built(candidate)
            if found.failure is not None:
                yield row, self._record(candidate, found.failure)
            else:
                runnable[candidate] = row
        with progress.phase("measured", len(runnable), live=self.live) as bar:
            for candidate, outcome in pool.run(list(runnable)):
                yield runnable[candidate], self._record(candidate, outcome)
                bar.step(f"{candidate.workload.label} {candidate.config.name}: {outcome.status.value}")

    def _record(self, candidate: Candidate, outcome: Measurement) -> ProfileRecord:
        return candidate.record(
            gpu=self.request.gpu.name,
            source=Source.MEASURED,
            outcome=outcome,
            kernel_fingerprint=self._built(candidate).fingerprint,
            versions={"bitile": package_version()},
        )

    def _built(self, candidate: Candidate) -> Built:
        found = self.bench.find(candidate)
        assert found is not None  # it was built before it is measured, or is of the bundle that the plan was made from
        return found

    def _tell(self, measured: Mask, what: str) -> None:
        self.say(f"{int(measured.sum())} of {len(measured)} candidates measured, {self._seconds:.0f} s; {what}")

    def _left(self, measured: Mask) -> int | None:
        most = self.guidance.max_measurements
        return None if most is None else max(0, most - int(measured.sum()))

    def _why_stop(self, regret: float, measured: Mask, batch: Codes) -> str | None:
        """Why no batch follows; None if one does. The goal does not count before this GPU was asked: the base may be of
        another, or of other times.
        """
        guidance, now = self.guidance, f"the expected regret is {100 * regret:.2f}%"
        if regret <= guidance.goal and measured.any():
            return f"{now}, the goal was {100 * guidance.goal:g}%"
        if guidance.max_measurements is not None and measured.sum() >= guidance.max_measurements:
            return f"{guidance.max_measurements} measurements were allowed; {now}"
        if guidance.max_seconds is not None and self._seconds >= guidance.max_seconds:
            return f"{guidance.max_seconds:g} s were allowed; {now}"
        return None if len(batch) else f"no measurement would help; {now}"

    def _with_costs(self, guide: Guide, batch: Codes, measured: Mask, compiling_s: float, measuring_s: float) -> Guide:
        """The guide with costs nearer to what this batch took: another machine compiles at another speed."""
        self._seconds += compiling_s + measuring_s
        candidates, costs = guide.candidates, guide.costs
        before = measured.copy()
        before[batch] = False
        new = np.unique(candidates.kernels[batch[~guide.built(before)[batch]]])
        compiling = _correction(compiling_s, costs.compile * len(new))
        measuring = _correction(measuring_s, costs.of(candidates, batch, guide.built(measured)))
        return dataclasses.replace(guide, costs=costs.scaled(measuring=measuring, compiling=compiling))

    def _outcome(self, choices: Choices, belief: Belief, regret: float, why: str) -> Outcome:
        built = np.asarray(
            [(found := self.bench.find(each)) is not None and not found.failure for each in choices.made]
        )
        return Outcome(
            best=tuple(choices.best(belief, built)),
            table=choices.table(self.request, belief, f"guided, {self.guidance.base_name}"),
            num_candidates=len(choices),
            num_measured=int(belief.measured.sum()),
            expected_regret=regret,
            seconds=self._seconds,
            why=why,
        )


def _correction(took_s: float, expected_s: float) -> float:
    """Half way, on a log scale, from what was expected to what was seen; 1 where nothing was to do."""
    if expected_s <= 0.0:
        return 1.0
    return float(np.sqrt(np.clip(took_s / expected_s, 1.0 / _MOST_RATIO, _MOST_RATIO)))
