"""The table of the paper on one model: `python -m bench.paper_table --model DIR --out FILE.json`.

bf16, rounding to nearest, GPTQ and rotated variants, uniform and mixed (the latter from a sensitivity of
`python -m allocator.calibrate`). Rows of one rounding are measured together. FILE.json holds every finished row, so
that a rerun measures only what is missing; FILE.csv and FILE.md beside it show the same.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from allocator import Sensitivity
from bench.evaluate import add_model_options, open_evaluator, write_text
from bench.evaluation import Evaluation, Evaluator
from bench.machine import cpu_name, gpu_name
from bench.paper_variants import VARIANTS, Mixed, Uniform, Variant, assignment_of
from profiles.errors import DataError, UserError
from profiles.interrupt import interruptible

KIND = "bitile paper table"
WIDTH = 120
COLUMNS = ("name", "setting", "schemes", "quantizer", "avg_weight_bits", "perplexity", "mean_kl")


@dataclass(slots=True, kw_only=True)
class Table:
    """Finished rows by name, and what they were measured on, which a rerun must share."""

    path: Path
    measured_on: dict[str, Any]
    rows: dict[str, dict[str, Any]]

    @classmethod
    def open(cls, path: Path, measured_on: dict[str, Any]) -> Table:
        """A file to go on with, or an empty table. DataError: another kind of file, or of another model or text."""
        if path.suffix != ".json":
            raise DataError(f"{path}: the table is JSON, with .csv and .md beside it; name it FILE.json")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            return cls(path=path, measured_on=measured_on, rows={})
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not a readable table ({error}); remove it") from error
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise DataError(f"{path}: not a table of this command; choose another --out")
        if content["measured_on"] != measured_on:
            before, now = content["measured_on"], measured_on
            differ = [f"{key} {before.get(key)!r}, now {now[key]!r}" for key in now if before.get(key) != now[key]]
            raise DataError(f"{path}: a table of {'; '.join(differ)}; choose another --out")
        return cls(path=path, measured_on=measured_on, rows={row["name"]: row for row in content["rows"]})

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """More rows, on disk when this returns."""
        self.rows |= {row["name"]: row for row in rows}
        content = {"kind": KIND, "measured_on": self.measured_on, "rows": self._ordered()}
        write_text(self.path, json.dumps(content, indent=1) + "\n")

    def show(self, command: str) -> str:
        """Writes the CSV and the Markdown; gives the latter."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._ordered())
        write_text(self.path.with_suffix(".csv"), text.getvalue())
        markdown = self._markdown(command)
        write_text(self.path.with_suffix(".md"), markdown)
        return markdown

    def _ordered(self) -> list[dict[str, Any]]:
        order = {variant.name: i for i, variant in enumerate(VARIANTS)}
        return sorted(self.rows.values(), key=lambda row: order.get(row["name"], len(order)))

    def _markdown(self, command: str) -> str:
        on = self.measured_on
        lines = [
            f"# {on['model']}: perplexity and KL of quantised experts",
            "",
            f"`{command}`",
            "",
            *textwrap.wrap(
                f"Measured {self._dates()}. Held out: {on['data']}. Calibration: {on['calibration']}. {on['dtype']} on"
                f" {on['device']}.",
                WIDTH,
            ),
            "",
            *textwrap.wrap(
                "Bits are of the MoE linears, scales and zero points counted. KL: from the logits of the model as it"
                " is, nats a token. Less KL: than the best uniform or blind rounding of the same setting.",
                WIDTH,
            ),
            "",
            "| setting | schemes | rounding | bits a weight | perplexity | KL | less KL |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in self._ordered():
            lines.append(
                f"| {row['setting']} | {row['schemes']} | {row['quantizer']} | {row['avg_weight_bits']:.3f} |"
                f" {row['perplexity']:.4f} | {row['mean_kl']:.5f} | {self._removed(row)} |"
            )
        return "\n".join(lines) + "\n"

    def _dates(self) -> str:
        days = sorted({row["measured"] for row in self.rows.values()})
        return " to ".join(dict.fromkeys((days[0], days[-1]))) if days else "never"

    def _removed(self, row: dict[str, Any]) -> str:
        """The share of the divergence that a mixed row has not."""
        if not row["is_mixed"]:
            return ""
        peers = [
            other["mean_kl"]
            for other in self.rows.values()
            if other["setting"] == row["setting"] and not other["is_mixed"]
        ]
        return f"{1 - row['mean_kl'] / min(peers):.0%}" if peers and min(peers) > 0 else ""


def measure_table(
    evaluator: Evaluator,
    table: Table,
    sensitivity: Sensitivity | None,
    *,
    variants: Sequence[Variant],
    console: Console,
) -> None:
    """Measures the variants that the table lacks, one rounding after the other."""
    for quantizer in dict.fromkeys(variant.quantizer for variant in variants):
        missing = [v for v in variants if v.quantizer == quantizer and v.name not in table.rows]
        if not missing:
            continue
        assignments = [assignment_of(v.rule, evaluator.linears, evaluator.model.shape, sensitivity) for v in missing]
        found = evaluator.measure_all(assignments, quantizer)
        table.add([_row(variant, one) for variant, one in zip(missing, found, strict=True)])
        for variant, one in zip(missing, found, strict=True):
            console.print(f"{variant.name}: perplexity {one.perplexity:.4f}, KL {one.mean_kl:.5f}")


def _row(variant: Variant, found: Evaluation) -> dict[str, Any]:
    return {
        "name": variant.name,
        "setting": variant.setting,
        "schemes": variant.rule.name,
        "quantizer": "" if variant.rule == Uniform(scheme=None) else variant.quantizer.name,
        "is_mixed": isinstance(variant.rule, Mixed),
        **asdict(found),
        "measured": datetime.now(UTC).date().isoformat(),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.paper_table", description=__doc__)
    add_model_options(parser)
    parser.add_argument("--sensitivity", type=Path, metavar="FILE", help="of allocator.calibrate, for the mixed rows")
    parser.add_argument("--settings", metavar="A,B", help="only rows of these settings and bf16, as in W2.25,W5A5")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE.json", help="the table; goes on if it is there"
    )
    return parser


def _wanted(settings: str | None, has_sensitivity: bool) -> tuple[Variant, ...]:
    names = list(dict.fromkeys(variant.setting for variant in VARIANTS))
    chosen = names if settings is None else settings.split(",")
    unknown = [name for name in chosen if name not in names]
    if unknown:
        raise DataError(f"--settings: no rows of {', '.join(unknown)}; there are {', '.join(names)}")
    return tuple(
        variant
        for variant in VARIANTS
        if (variant.setting in chosen or variant.rule == Uniform(scheme=None))
        and (has_sensitivity or not isinstance(variant.rule, Mixed))
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; gives the exit code."""
    arguments = _parser().parse_args(argv)
    console = Console(stderr=True)
    try:
        sensitivity = None if arguments.sensitivity is None else Sensitivity.read(arguments.sensitivity)
        variants = _wanted(arguments.settings, sensitivity is not None)
        evaluator, held_out, calibration = open_evaluator(arguments)
        for note in (*held_out.notes, *calibration.notes):
            console.print(f"note: {note}")
        if sensitivity is None:
            console.print("no --sensitivity: the mixed rows are left out")
        model = evaluator.model
        measured_on = {
            "model": model.shape.name,
            "data": held_out.source,
            "calibration": calibration.source,
            "device": cpu_name() if model.device.type == "cpu" else gpu_name(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "sensitivity": None if sensitivity is None else sensitivity.provenance,
        }
        table = Table.open(arguments.out, measured_on)
        measure_table(evaluator, table, sensitivity, variants=variants, console=console)
        print(table.show(f"python -m bench.paper_table {' '.join(argv if argv is not None else sys.argv[1:])}"), end="")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(interruptible(main))
