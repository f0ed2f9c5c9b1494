"""One sweep from plan to finished profile: each row is on disk before the next begins, and the best of every cell comes
out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kernel_gen.sweeping import report
from kernel_gen.sweeping.candidates import Workload
from kernel_gen.sweeping.plan import Cell, SweepRequest
from kernel_gen.sweeping.predict import analytic_digest
from profiles.errors import DataError
from profiles.records import ProfileRecord, Source, Status
from profiles.store import ProfileStore

ESTIMATE_MARGIN = 0.05
"""Of a latency. Real facts change a prediction where the occupancy was estimated wrong: none of 804 for an RTX 4090
with the quick effort (2026-11-24).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResult:
    """What a sweep found: the best of each cell, how many rows are new, how all its rows ended (counts by status).

    `failures` are sentences, one for each way in which a kernel failed.
    """

    best: tuple[report.Cell, ...]
    num_new: int
    counts: Mapping[str, int]
    failures: tuple[str, ...] = ()


RowMaker = Callable[[Mapping[str, ProfileRecord]], Iterator[ProfileRecord]]
"""Given the rows that the profile has, by key: every row of the sweep in turn, those as they are, the others made when
they are asked for.
"""


def run(request: SweepRequest, cells: Sequence[Cell], make_rows: RowMaker, *, source: Source) -> SweepResult:
    """Append the rows that are new, one by one, each durably.

    DataError when the profile is refused, is being written by another process, or a row cannot be written; rows before
    it are kept.
    """
    rows: list[ProfileRecord] = []
    num_new = 0
    with ProfileStore(request.out, gpu=request.gpu.name) as store:
        had = _stored(store, request.out, source)
        for record in make_rows(had):
            if record.key not in had:
                num_new += store.append(record)
            rows.append(record)
    counts = Counter(record.status.value for record in rows)
    return SweepResult(
        best=tuple(best_of(cells, rows)), num_new=num_new, counts=dict(counts), failures=tuple(_failures(rows))
    )


def _failures(rows: Iterable[ProfileRecord]) -> list[str]:
    """What failed and how, a kernel's same failure under several loads once."""
    found: dict[str, None] = {}
    for row in rows:
        if row.status is not Status.OK:
            schemes = "+".join(dict.fromkeys(scheme.name for scheme in row.schemes))
            found[f"{schemes} {row.config.name}, {row.status.value}: {row.error}"] = None
    return list(found)


def best_of(cells: Iterable[Cell], rows: Iterable[ProfileRecord]) -> Iterator[report.Cell]:
    """The fastest row of each cell; a cell without a good row has none.

    A prediction over estimated build facts must be ESTIMATE_MARGIN faster to win over one with real ones: of many that
    are nearly equal, the fastest would else be the one whose estimate flatters it most.
    """
    fastest: dict[tuple[object, ...], ProfileRecord] = {}
    for row in rows:
        if row.status is Status.OK:
            place = row.model, row.linear, row.load.tokens_per_expert, row.schemes
            if place not in fastest or _weight(row) < _weight(fastest[place]):
                fastest[place] = row
    for cell in cells:
        work, case = cell.workload, cell.case
        found = fastest.get((work.model, work.linear, case.load.tokens_per_expert, _stored_schemes(work)))
        if found is not None:
            yield report.Cell(
                model=work.model,
                linear=work.linear,
                load=case.kind,
                tokens=case.tokens,
                tokens_per_expert=case.load.total / work.num_experts,
                scheme=work.label,
                latency_us=_latency_us(found),
                config=found.config.name,
                source=found.source,
                is_built=bool(found.kernel_fingerprint),
            )


def _stored(store: ProfileStore, path: Path, source: Source) -> dict[str, ProfileRecord]:
    """The rows of this kind by key. DataError for predictions of another version of the analytic model: old and new
    would be compared.
    """
    had = {record.key: record for record in store.load(source=source)}
    if source is Source.PREDICTED:
        for record in had.values():
            if record.versions.get("analytic") != analytic_digest():
                raise DataError(
                    f"{path} holds predictions of another version of the analytic model:"
                    " choose another --out, or move it away"
                )
    return had


def _stored_schemes(work: Workload) -> tuple[object, ...]:
    return work.schemes[:1] if len(work.slots) == 1 else work.schemes


def _weight(row: ProfileRecord) -> float:
    return _latency_us(row) * (1.0 if row.kernel_fingerprint else 1.0 + ESTIMATE_MARGIN)


def _latency_us(row: ProfileRecord) -> float:
    assert row.latency_us is not None  # a row that is OK has one: profiles.table
    return row.latency_us
