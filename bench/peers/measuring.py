"""`--measure`: each cell's contenders in one run, interleaved, on the same weights, tokens and routing.

A contender's values are checked before its time counts, with the sweep's check. Of our configurations the few that are
fastest alone go on. Then rounds: in each, every contender
is timed once (kernel_gen.timing: graph replays, L2 cold), so that a clock that falls falls on all; a latency is the
median of the rounds. Then each launch is timed alone, as the published peers were (`single_us`), and beside it one that
does nothing (`floor_us`), since what a replay costs is part of both. Who fails is a row
with the reason. After a CUDA error nothing more can run in the process: what is left of the cell becomes rows too, and
the run ends; a second run of the command goes on with the next cell.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch

from bench.kernel_sets import TRIES
from bench.peers.cells import CELL, Cell
from bench.peers.contenders import OURS, Contender, Entry, Kernels, contenders
from bench.peers.recorded import roofline_bar
from kernel_gen.measure import Inputs, Launch, LaunchError, Weights, verify
from kernel_gen.sweeping.candidates import Workload
from kernel_gen.timing import SampleRule, Timing, utc_now
from profiles.atomic import replacing
from profiles.errors import DataError, UserError
from profiles.gpus import GpuSpec
from profiles.kernels import KernelConfig
from profiles.records import Status

RULE = SampleRule(min_samples=10, max_samples=10)
ROUNDS = 3
FINALISTS = 2
"""Of our configurations so many take part in the rounds."""
CLOCKS = ("sm_clock_mhz", "reference_ratio")


class Clock(Protocol):
    """kernel_gen.timing.GpuClock, or a test's."""

    def time_launches(self, launches: Sequence[Launch], rule: SampleRule) -> Timing:
        """The latency of launches that take turns."""

    def time_single(self, launch: Launch, samples: int = 30) -> float:
        """Microseconds of a replay of one launch, the median of so many."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Device:
    """What a run needs of a GPU. `release` gives memory back that nothing holds; `failures` are the exceptions that its
    libraries raise on purpose.
    """

    gpu: GpuSpec
    torch_device: str
    clock: Clock
    kernels: Kernels
    synchronize: Callable[[], None]
    release: Callable[[], None]
    l2_bytes: int
    versions: Mapping[str, str]
    failures: tuple[type[Exception], ...] = (RuntimeError, UserError)


class Shelf:
    """The weights of the last workload, which the next cell may share."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._last: Weights | None = None

    def weights(self, work: Workload) -> Weights:
        """Random, quantised and packed. torch.OutOfMemoryError when they do not fit."""
        if self._last is None or self._last.workload != work:
            self._last = None
            self._device.release()
            self._last = Weights.make(work, self._device.torch_device)
        return self._last


def measure_cell(
    cell: Cell, configs: Sequence[KernelConfig], device: Device, shelf: Shelf, *, rounds: int = ROUNDS
) -> list[dict[str, Any]]:
    """A row a contender. `context_lost` rows mean that this process can run nothing more."""
    try:
        inputs = Inputs.make(shelf.weights(cell.workload), cell.load, device.l2_bytes)
    except device.failures as error:
        return [_failure(cell, "inputs", "", Status.LAUNCH_ERROR, error, device)]
    rows: list[dict[str, Any]] = []
    ready: list[tuple[Contender, Entry]] = []
    for contender in contenders(inputs, configs, device.kernels, device.l2_bytes):
        if culprit := _culprit(rows):
            rows.append(_lost(cell, contender, culprit, device))
            continue
        try:
            entry = contender.make()
            problem = verify(entry.check, inputs.output, inputs.expected, device.synchronize)
        except device.failures as error:
            rows.append(_failure(cell, contender.name, contender.config, Status.LAUNCH_ERROR, error, device))
            continue
        if problem:
            rows.append(_failure(cell, contender.name, contender.config, Status.WRONG, problem, device))
        else:
            ready.append((contender, entry))
    if culprit := _culprit(rows):
        return rows + [_lost(cell, contender, culprit, device) for contender, _ in ready]
    try:
        finalists = _finalists(ready, device.clock)
    except device.failures as error:  # what ran and was right cannot be timed: the device is lost
        return rows + [_failure(cell, one.name, one.config, Status.LAUNCH_ERROR, error, device) for one, _ in ready]
    return rows + _timed(cell, finalists, device, rounds)


def _finalists(ready: list[tuple[Contender, Entry]], clock: Clock) -> list[tuple[Contender, Entry]]:
    """Ours that are fastest alone, and all others."""
    ours = [pair for pair in ready if pair[0].name == OURS]
    if len(ours) > FINALISTS:
        alone = [clock.time_single(entry.launches[0], TRIES) for _, entry in ours]
        ours = [ours[index] for index in sorted(range(len(ours)), key=alone.__getitem__)[:FINALISTS]]
    return [*ours, *(pair for pair in ready if pair[0].name != OURS)]


def _timed(cell: Cell, ready: list[tuple[Contender, Entry]], device: Device, rounds: int) -> list[dict[str, Any]]:
    """Rounds over all, each timed once a round."""
    timings: dict[int, list[Timing]] = {index: [] for index in range(len(ready))}
    single: dict[int, tuple[float, float]] = {}
    one = torch.zeros(1, device=device.torch_device)

    def nothing() -> None:
        one.add_(1)

    failed: dict[int, dict[str, Any]] = {}
    for number in range(rounds + 1):
        for index, (contender, entry) in enumerate(ready):
            if index in failed:
                continue
            try:
                if number < rounds:
                    timings[index].append(device.clock.time_launches(entry.launches, RULE))
                else:
                    floor_us = device.clock.time_single(nothing)
                    single[index] = device.clock.time_single(entry.launches[0]), floor_us
            except device.failures as error:
                failed[index] = _failure(cell, contender.name, contender.config, Status.LAUNCH_ERROR, error, device)
                if failed[index]["context_lost"]:
                    others = [contender for other, (contender, _) in enumerate(ready) if other not in failed]
                    return [*failed.values(), *(_lost(cell, other, failed[index], device) for other in others)]
    done = [
        _row(cell, ready[index][0], timings[index], single[index], device) for index in timings if index not in failed
    ]
    return [*failed.values(), *done]


def _row(
    cell: Cell, contender: Contender, timings: Sequence[Timing], single: tuple[float, float], device: Device
) -> dict[str, Any]:
    medians = sorted(timing.median_us for timing in timings)
    latency = statistics.median(medians)
    return {
        **_base(cell, contender.name, contender.config, device),
        "status": Status.OK.value,
        "error": "",
        "context_lost": False,
        "latency_us": latency,
        "least_us": medians[0],
        "most_us": medians[-1],
        "single_us": single[0],
        "floor_us": single[1],
        "num_samples": sum(timing.num_samples for timing in timings),
        **{name: statistics.median(getattr(timing, name) for timing in timings) for name in CLOCKS},
        "fraction": cell.roofline_us / latency,
    }


def _failure(
    cell: Cell, name: str, config: str, status: Status, error: Exception | str, device: Device
) -> dict[str, Any]:
    first = (str(error).strip().splitlines() or [""])[0]
    text = first if isinstance(error, str) else f"{type(error).__name__}: {first}"
    return {
        **_base(cell, name, config, device),
        "status": status.value,
        "error": text,
        "context_lost": isinstance(error, (torch.AcceleratorError, LaunchError)),
        **dict.fromkeys(("latency_us", "least_us", "most_us", "single_us", "floor_us", *CLOCKS), math.nan),
        "num_samples": 0,
        "fraction": math.nan,
    }


def _culprit(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of who lost the CUDA context, if anybody did."""
    return next((row for row in rows if row["context_lost"]), None)


def _lost(cell: Cell, contender: Contender, by: Mapping[str, Any], device: Device) -> dict[str, Any]:
    reason = f"not run: the CUDA context was lost by {by['contender']} {by['config']}".strip()
    return {**_failure(cell, contender.name, contender.config, Status.CRASHED, reason, device), "context_lost": True}


def _base(cell: Cell, name: str, config: str, device: Device) -> dict[str, Any]:
    parts = list(cell.parts.values())
    return {
        **dict(zip(CELL, cell.key, strict=True)),
        "load_source": cell.load.source,
        "is_mix": cell.is_mix,
        "roofline_us": cell.roofline_us,
        "min_bytes": sum(part.min_bytes for part in parts),
        "is_memory_bound": all(part.is_memory_bound for part in parts),
        "bar": math.nan if cell.is_mix else roofline_bar(parts[0], cell.tokens),
        "contender": name,
        "config": config,
        "gpu": device.gpu.name,
        "versions": json.dumps(dict(device.versions), sort_keys=True),
        "timestamp": utc_now().isoformat(),
    }


def measure(
    cells: Mapping[Cell, Sequence[KernelConfig]], device: Device, path: Path, *, rounds: int = ROUNDS
) -> Iterator[tuple[Cell, list[dict[str, Any]]]]:
    """Measures the cells that the Parquet file lacks, each with these of our configurations; a cell's rows are in the
    file when they are given.

    Ends after a cell that lost the CUDA context: a second run goes on with the next. DataError: another kind of file.
    """
    rows: list[dict[str, Any]] = read_measured(path).to_dict("records") if path.exists() else []  # type: ignore[assignment]
    done, shelf = {tuple(row[name] for name in CELL) for row in rows}, Shelf(device)
    for cell, configs in cells.items():
        if cell.key in done:
            continue
        found = measure_cell(cell, configs, device, shelf, rounds=rounds)
        device.release()
        rows += found
        with replacing(path) as temporary:
            pd.DataFrame(rows).to_parquet(temporary, index=False)
        yield cell, found
        if any(row["context_lost"] for row in found):
            return


def read_measured(path: Path) -> pd.DataFrame:
    """The rows of an earlier run. DataError: no file, or not such a file."""
    if not path.exists():
        raise DataError(f"{path} is not there: --measure writes it")
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable file of measured peers ({error}); remove it") from error
    missing = [name for name in (*CELL, "contender", "status") if name not in frame.columns]
    if missing:
        raise DataError(f"{path}: not a file of measured peers, it lacks {', '.join(missing)}; remove it")
    return frame
