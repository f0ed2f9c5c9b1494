"""Each cell's layers in one run, interleaved, on the same tokens and routing; L2 is cold of weights.

A layer's first tokens are checked before its time counts, against a float32 MoE of the weights that it really has. Then
rounds: in each, every layer is timed once (kernel_gen.timing), so that a clock that falls
falls on all; a latency is the median of the rounds.
"""

from __future__ import annotations

import gc
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from bench.layer.building import Plan
from bench.layer.cells import COLUMNS, Cell
from bench.layer.contenders import Context, Entry, Maker
from bench.layer.others import OtherLayers
from bench.layer.ours import OurLayers
from bench.layer.tuning import TunedLibrary
from bench.layer.weights import LayerWeights
from kernel_gen.measure import LaunchError
from kernel_gen.timing import GpuClock, SampleRule, Timing, monotonic_s, utc_now
from profiles.atomic import replacing
from profiles.errors import DataError, UserError
from profiles.gpus import GpuSpec

RULE = SampleRule(min_samples=5, max_samples=10, batch=5)
LARGEST_DIFFERENCE = 0.03
"""Relative, in the Frobenius norm: what the linears pass on is bf16, and 8-bit codes next to a boundary differ."""
NUM_STREAMS = 4
DEVICE = "cuda"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Device:
    """What a run needs of a GPU. `failures`: what its libraries raise on purpose."""

    gpu: GpuSpec
    clock: GpuClock
    kernels: TunedLibrary
    l2_bytes: int
    versions: Mapping[str, str]
    failures: tuple[type[Exception], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A cell's rows, and the seconds that making its contenders and timing them took."""

    cell: Cell
    rows: list[dict[str, Any]]
    preparing_s: float
    timing_s: float

    @property
    def context_lost(self) -> bool:
        """Whether the process can run nothing more."""
        return any(row["context_lost"] for row in self.rows)


def measure(plan: Plan, device: Device, path: Path, *, rounds: int, compiled: bool) -> Iterator[Measured]:
    """Measures the cells that the Parquet file lacks; a cell's rows are in the file when they are given.

    Ends after a cell that lost the CUDA context: a second run goes on with the next. DataError: another kind of file.
    """
    rows: list[dict[str, Any]] = read_measured(path).to_dict("records") if path.exists() else []  # type: ignore[assignment]
    done = {tuple(row[name] for name in COLUMNS) for row in rows}
    weights: dict[str, LayerWeights] = {}
    for cell in plan.cells:
        if cell.key in done:
            continue
        of_model = weights.setdefault(cell.model, LayerWeights(cell.shape, DEVICE))
        found = measure_cell(cell, plan, device, of_model, rounds=rounds, compiled=compiled)
        _release()
        rows += found.rows
        with replacing(path) as temporary:
            pd.DataFrame(rows).to_parquet(temporary, index=False)
        yield found
        if found.context_lost:
            return


def measure_cell(
    cell: Cell, plan: Plan, device: Device, weights: LayerWeights, *, rounds: int, compiled: bool
) -> Measured:
    """A row an entry."""
    started = monotonic_s()
    context = Context(
        cell=cell,
        plan=plan,
        given=cell.given(DEVICE),
        weights=weights,
        kernels=device.kernels,
        l2_bytes=device.l2_bytes,
        time_single=device.clock.time_single,
        streams=_streams(),
        compiled=compiled,
    )
    rows: list[dict[str, Any]] = []
    ready: list[Entry] = []
    for maker in _makers(context):
        try:
            entry = maker.make()
            if problem := _check(entry):
                rows.append(_failure(cell, maker, problem, device))
            else:
                ready.append(entry)
        except device.failures as error:
            rows.append(_failure(cell, maker, error, device))
            if rows[-1]["context_lost"]:
                return Measured(cell=cell, rows=rows, preparing_s=monotonic_s() - started, timing_s=0.0)
    prepared = monotonic_s()
    rows += _timed(cell, ready, device, rounds)
    return Measured(cell=cell, rows=rows, preparing_s=prepared - started, timing_s=monotonic_s() - prepared)


def _streams() -> tuple[torch.cuda.Stream, ...]:
    make: Callable[[], torch.cuda.Stream] = torch.cuda.Stream
    return tuple(make() for _ in range(NUM_STREAMS))


def _makers(context: Context) -> Iterator[Maker]:
    for allocation in context.plan.of(context.cell):
        yield from OurLayers(allocation, context).makers()
    yield from OtherLayers(context).makers()


def _check(entry: Entry) -> str | None:
    """What is wrong with its values, if anything. Also warms up whatever compiles at the first call."""
    for layer in entry.layers:
        found = layer()
    if entry.expected is None:
        return None
    assert isinstance(found, torch.Tensor)
    first = found[: len(entry.expected)].float()
    difference = float((first - entry.expected).norm() / entry.expected.norm())
    return None if difference <= LARGEST_DIFFERENCE else f"its output is {difference:.3g} off, relative"


def _timed(cell: Cell, ready: Sequence[Entry], device: Device, rounds: int) -> list[dict[str, Any]]:
    """Rounds over all, each timed once a round."""
    timings: dict[int, list[Timing]] = {index: [] for index in range(len(ready))}
    failed: dict[int, dict[str, Any]] = {}
    for _ in range(rounds):
        for index, entry in enumerate(ready):
            if index in failed:
                continue
            try:
                timings[index].append(device.clock.time_launches(entry.layers, RULE))  # type: ignore[arg-type]
            except device.failures as error:
                failed[index] = _failure(cell, entry, error, device)
                if failed[index]["context_lost"]:
                    return list(failed.values())
    done = [_row(cell, ready[index], timings[index], device) for index in timings if index not in failed]
    return [*failed.values(), *done]


def _row(cell: Cell, entry: Entry, timings: Sequence[Timing], device: Device) -> dict[str, Any]:
    medians = sorted(timing.median_us for timing in timings)
    return {
        **_base(cell, entry, device),
        "group": entry.group.value,
        "configs": entry.configs,
        "avg_bits": entry.avg_bits,
        "status": "ok",
        "error": "",
        "context_lost": False,
        "latency_us": statistics.median(medians),
        "least_us": medians[0],
        "most_us": medians[-1],
        "num_samples": sum(timing.num_samples for timing in timings),
        "sm_clock_mhz": statistics.median(timing.sm_clock_mhz for timing in timings),
        "reference_ratio": statistics.median(timing.reference_ratio for timing in timings),
    }


def _failure(cell: Cell, of: Entry | Maker, error: Exception | str, device: Device) -> dict[str, Any]:
    first = (str(error).strip().splitlines() or [""])[0]
    return {
        **_base(cell, of, device),
        **dict.fromkeys(("group", "configs"), ""),
        "avg_bits": math.nan,
        "status": "wrong" if isinstance(error, str) else "failed",
        "error": first if isinstance(error, str) else f"{type(error).__name__}: {first}",
        "context_lost": isinstance(error, (torch.AcceleratorError, LaunchError)),
        **dict.fromkeys(("latency_us", "least_us", "most_us", "sm_clock_mhz", "reference_ratio"), math.nan),
        "num_samples": 0,
    }


def _base(cell: Cell, of: Entry | Maker, device: Device) -> dict[str, Any]:
    return {
        **dict(zip(COLUMNS, cell.key, strict=True)),
        "allocation": of.allocation,
        "variant": of.variant.value,
        "part": of.part,
        "fusions": of.fusions,
        "gpu": device.gpu.name,
        "versions": json.dumps(dict(device.versions), sort_keys=True),
        "timestamp": utc_now().isoformat(),
    }


def _release() -> None:
    """Memory that only cycles still hold, too."""
    gc.collect()
    torch.cuda.empty_cache()


def read_measured(path: Path) -> pd.DataFrame:
    """The rows of an earlier run. DataError: not such a file."""
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable file of measured layers ({error}); remove it") from error
    missing = [
        name
        for name in (*COLUMNS, "allocation", "variant", "part", "fusions", "latency_us")
        if name not in frame.columns
    ]
    if missing:
        raise DataError(f"{path}: not a file of measured layers, it lacks {', '.join(missing)}; remove it")
    return frame


FAILURES: tuple[type[Exception], ...] = (RuntimeError, UserError, ModuleNotFoundError)
