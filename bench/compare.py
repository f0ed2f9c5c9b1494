"""Is it slower than it was? Compares two pytest-benchmark files and knows the noise.

A change of the median counts only when it is larger than the noise. Noise is the quadratic sum of both runs'
interquartile ranges (what a run sees of itself) and of a floor, a share of the baseline (what differs between two
runs of the same code, which no single run can see).

    python -m bench.compare BASELINE CURRENT            compare two files; exit code 1 when something is slower
    python -m bench.compare bench/baselines CURRENT     the same, with the baseline of CURRENT's kind of machine
    python -m bench.compare --store CURRENT             make CURRENT the baseline of its kind of machine
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from profiles.errors import DataError, UserError
from profiles.interrupt import interruptible

BASELINES = Path(__file__).parent / "baselines"
DEFAULT_FLOOR = 0.15
"""CPU times of the same code differed by up to 13 % between runs; 2 cores under a load of 4, 2026-11-24."""
KEPT_STATS = ("min", "q1", "median", "q3", "iqr", "max", "mean", "stddev", "rounds")


class Verdict(Enum):
    """What a benchmark's two medians say."""

    FASTER = "faster"
    SAME = "same"
    SLOWER = "slower"
    NEW = "new"
    GONE = "gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One benchmark's times in one run, seconds: the median and the distance between the quartiles."""

    median_s: float
    iqr_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One benchmark in two runs. A side is None where the benchmark did not run."""

    name: str
    baseline: Sample | None
    current: Sample | None
    floor: float

    @property
    def noise_s(self) -> float:
        """How far two medians of the same code may lie apart, seconds."""
        if self.baseline is None or self.current is None:
            return math.inf
        return math.hypot(self.baseline.iqr_s, self.current.iqr_s, self.floor * self.baseline.median_s)

    @property
    def ratio(self) -> float:
        """Current median over the baseline's: above 1 is slower, nan where a side is missing."""
        if self.baseline is None or self.current is None:
            return math.nan
        return self.current.median_s / self.baseline.median_s

    @property
    def verdict(self) -> Verdict:
        """What this benchmark's change amounts to."""
        if self.baseline is None:
            return Verdict.NEW
        if self.current is None:
            return Verdict.GONE
        change_s = self.current.median_s - self.baseline.median_s
        if abs(change_s) <= self.noise_s:
            return Verdict.SAME
        return Verdict.SLOWER if change_s > 0 else Verdict.FASTER


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One file: its kind of machine and its benchmarks by full name."""

    path: Path
    machine_kind: str
    samples: Mapping[str, Sample]


def read_json(path: Path) -> dict[str, Any]:
    """Return a benchmark file's document. DataError where it is missing or no benchmark file."""
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; `make bench` writes one") from None
    except (json.JSONDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise DataError(f"{path} is not a pytest-benchmark file: {error}") from None
    if not isinstance(document, dict) or not isinstance(document.get("benchmarks"), list):
        raise DataError(f"{path} is not a pytest-benchmark file: it has no list of benchmarks")
    return document


def read_run(path: Path) -> Run:
    """Return a benchmark file as a run. DataError where a median or an iqr is missing, negative or not a number."""
    document = read_json(path)
    samples = {}
    for row in document["benchmarks"]:
        try:
            name, stats = str(row["fullname"]), row["stats"]
            median_s, iqr_s = float(stats["median"]), float(stats["iqr"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} has a benchmark without fullname, median or iqr: {error!r}") from None
        if not (math.isfinite(median_s) and median_s > 0 and math.isfinite(iqr_s) and iqr_s >= 0):
            raise DataError(f"{path}: {name} has median {median_s} s and iqr {iqr_s} s; a time is a positive number")
        samples[name] = Sample(median_s=median_s, iqr_s=iqr_s)
    kind = document.get("machine_info", {}).get("kind")
    if not isinstance(kind, str) or not kind:
        raise DataError(f"{path} does not say its kind of machine; run the suites with `make bench`")
    return Run(path=path, machine_kind=kind, samples=samples)


def compare(baseline: Run, current: Run, *, floor: float = DEFAULT_FLOOR) -> list[Comparison]:
    """Compare every benchmark of either run, by name. DataError where the machines differ in kind."""
    if baseline.machine_kind != current.machine_kind:
        raise DataError(
            f"{current.path} ran on {current.machine_kind} and {baseline.path} on {baseline.machine_kind}: "
            "times of different machines do not compare"
        )
    names = sorted(baseline.samples.keys() | current.samples.keys())
    return [
        Comparison(name=name, baseline=baseline.samples.get(name), current=current.samples.get(name), floor=floor)
        for name in names
    ]


def store(path: Path, folder: Path = BASELINES) -> Path:
    """Keep a benchmark file as the baseline of its kind of machine: no host names, no raw data. Returns its path."""
    kind = read_run(path).machine_kind
    document = read_json(path)
    machine = document["machine_info"]
    kept = {
        "machine_info": {key: machine[key] for key in ("kind", "python_version", "versions") if key in machine},
        "datetime": document.get("datetime"),
        "benchmarks": [
            {
                "fullname": row["fullname"],
                "stats": {key: row["stats"][key] for key in KEPT_STATS if key in row["stats"]},
                "extra_info": row.get("extra_info", {}),
            }
            for row in sorted(document["benchmarks"], key=lambda row: str(row["fullname"]))
        ],
    }
    target = folder / f"{kind}.json"
    partial = target.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(kept, indent=1) + "\n")
    partial.replace(target)
    return target


def show(comparisons: Sequence[Comparison], console: Console) -> None:
    """Print one row a benchmark, those that changed most first, and the totals."""
    table = Table(title="Speed against the baseline")
    table.add_column("benchmark", overflow="fold")
    for heading in ("baseline us", "now us", "now / baseline", "noise", "verdict"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in sorted(comparisons, key=lambda row: -row.ratio if row.ratio == row.ratio else 0.0):
        table.add_row(
            escape(row.name.removeprefix("bench/test_")),
            micros(row.baseline),
            micros(row.current),
            *relative(row),
            row.verdict.value,
        )
    console.print(table)
    verdicts = [row.verdict for row in comparisons]
    console.print(", ".join(f"{verdicts.count(verdict)} {verdict.value}" for verdict in Verdict if verdict in verdicts))


def micros(sample: Sample | None) -> str:
    """Return a sample's median in microseconds, a dash where there is none."""
    return "-" if sample is None else f"{1e6 * sample.median_s:,.1f}"


def relative(row: Comparison) -> tuple[str, str]:
    """Return the ratio of the medians and the noise as a share of the baseline."""
    if row.baseline is None or row.current is None:
        return "-", "-"
    return f"{row.ratio:.2f}", f"+-{100 * row.noise_s / row.baseline.median_s:.0f} %"


def parse_floor(text: str) -> float:
    """Return a floor from its percentage, 0 to 100."""
    percent = float(text)
    if not 0 <= percent < 100:
        raise argparse.ArgumentTypeError(f"a floor is a percentage from 0 to 100, not {text}")
    return percent / 100


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parse = argparse.ArgumentParser(
        prog="python -m bench.compare", description="Compare two benchmark runs; exit code 1 on a regression."
    )
    parse.add_argument(
        "baseline", nargs="?", type=Path, help="a benchmark file, or a folder with one per kind of machine"
    )
    parse.add_argument("current", type=Path, help="a benchmark file that `make bench` wrote")
    parse.add_argument("--store", action="store_true", help="make CURRENT the baseline of its kind of machine instead")
    parse.add_argument(
        "--floor",
        type=parse_floor,
        default=DEFAULT_FLOOR,
        metavar="PERCENT",
        help="what two runs of the same code differ by",
    )
    return parse


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: 0 when nothing is slower, 1 when something is, 2 on a mistake."""
    args = parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        if args.store:
            console.print(f"stored {store(args.current, args.baseline or BASELINES)}")
            return 0
        current = read_run(args.current)
        baseline_path = args.baseline or BASELINES
        if baseline_path.is_dir():
            baseline_path = baseline_path / f"{current.machine_kind}.json"
            if not baseline_path.exists():
                console.print(f"there is no baseline for {current.machine_kind} yet; `make bench-baseline` stores one")
                return 0
        comparisons = compare(read_run(baseline_path), current, floor=args.floor)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    show(comparisons, console)
    return int(any(row.verdict is Verdict.SLOWER for row in comparisons))


if __name__ == "__main__":
    sys.exit(interruptible(main))
