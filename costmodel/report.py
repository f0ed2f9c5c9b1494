"""Pages of an evaluation: `report.html` (one file, plots inside), `report.md` and `report.json`."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from costmodel.evaluation import MODEL, Evaluation
from costmodel.fit import described
from costmodel.plots import figures
from costmodel.sessions import NoiseFloor
from profiles.atomic import replacing
from profiles.errors import DataError

COLUMNS = {
    "mean_ape": "mean error",
    "median_ape": "median error",
    "coverage_90": "90% interval covers",
    "interval_width": "interval width",
    "regret_mean": "regret, mean",
    "regret_p99": "regret, p99",
    "regret_top4_mean": "regret, best of top 4",
}
_FLOORS = {
    "mean_ape": "between_runs_mean",
    "median_ape": "between_runs_median",
    "regret_mean": "between_runs_regret_mean",
    "regret_p99": "between_runs_regret_p99",
}
"""Which number of the noise floor stands beside a column."""
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.3em .8em;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child{text-align:left}tr.model{font-weight:600;background:#eef4fb}img{max-width:100%}"
)


def as_json(found: Evaluation) -> str:
    """{"gpu", "num_rows", "held_out": {kind: {estimator: metrics}}, "skipped", "noise_floor"}; all are fractions."""
    data: dict[str, Any] = {
        "gpu": found.gpu,
        "num_rows": len(found.latency_us),
        "held_out": {
            kind.value: {name: dataclasses.asdict(metrics) for name, metrics in result.metrics.items()}
            for kind, result in found.results.items()
        },
        "skipped": {kind.value: why for kind, why in found.skipped.items()},
        "noise_floor": dataclasses.asdict(found.noise),
    }
    return json.dumps(data, indent=1)


def write_report(found: Evaluation, folder: Path) -> list[Path]:
    """The three files, each whole or not at all; their paths. DataError when they cannot be written."""
    pages = {"report.html": _html(found), "report.md": _markdown(found), "report.json": as_json(found) + "\n"}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in pages.items():
            with replacing(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{folder}: the report cannot be written ({error.strerror or error})") from error
    return [folder / name for name in pages]


def _tables(found: Evaluation) -> list[tuple[str, list[list[str]]]]:
    """(heading, rows) of each kind of group, the head first; then LatencyModel, the noise floor, and the baselines."""
    tables = []
    for kind, result in found.results.items():
        one = next(iter(result.metrics.values()))
        heading = f"Unseen {kind.value}: {one.num_groups} groups, {one.num_launches} launches, {one.num_rows} rows"
        rows = [["", *COLUMNS.values()]]
        for name, metrics in result.metrics.items():
            rows.append([name, *(_percent(getattr(metrics, column)) for column in COLUMNS)])
            if name == MODEL and found.noise.num_repeats:
                floors = (getattr(found.noise, _FLOORS[column]) if column in _FLOORS else None for column in COLUMNS)
                rows.append(["noise floor", *(_percent(floor) for floor in floors)])
        tables.append((heading, rows))
    return tables


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}%"


def _noise(noise: NoiseFloor) -> str:
    text = f"Noise floor: within a run (half of p80 - p20) {_percent(noise.within_run)}"
    if not noise.num_repeats:
        return text + "; between runs unknown, nothing was measured twice."
    return (
        f"{text}; the same launch and kernel measured in another session ({noise.num_repeats} of them) differs by"
        f" {_percent(noise.between_runs_mean)} (mean), {_percent(noise.between_runs_median)} (median),"
        f" {_percent(noise.between_runs_p90)} (90th percentile), and one session's best choice loses in the other"
        f" {_percent(noise.between_runs_regret_mean)} (mean), {_percent(noise.between_runs_regret_p99)} (p99)."
    )


def _intro(found: Evaluation) -> list[str]:
    lines = [
        f"{described(found.profile)}, on {found.gpu}. Each row is predicted by a model that saw no row of its"
        " group. Regret: how much slower than the best measured configuration the predicted best is.",
        _noise(found.noise),
    ]
    return lines + [f"Not held out by {kind.value}: {why}." for kind, why in found.skipped.items()]


def _markdown(found: Evaluation) -> str:
    lines = [f"# Latency model on {found.gpu}", ""]
    for line in _intro(found):
        lines += [line, ""]
    for heading, rows in _tables(found):
        lines += [f"## {heading}", "", _markdown_row(rows[0]), _markdown_row(["---"] * len(rows[0]))]
        lines += [*(_markdown_row(row) for row in rows[1:]), ""]
    return "\n".join(lines)


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _html(found: Evaluation) -> str:
    parts = [f"<h1>Latency model on {html.escape(found.gpu)}</h1>"]
    parts += [f"<p>{html.escape(line)}</p>" for line in _intro(found)]
    for heading, rows in _tables(found):
        parts.append(f"<h2>{html.escape(heading)}</h2><table>{_html_row(rows[0], 'th', '')}")
        parts += [_html_row(row, "td", "model" if row[0] == MODEL else "") for row in rows[1:]]
        parts.append("</table>")
    for title, png in figures(found):
        image = base64.b64encode(png).decode("ascii")
        name = html.escape(title)
        parts.append(f"<h2>{name}</h2><img alt='{name}' src='data:image/png;base64,{image}'>")
    title = f"Latency model on {html.escape(found.gpu)}"
    return f"<!doctype html><meta charset='utf-8'><title>{title}</title><style>{_STYLE}</style>{''.join(parts)}\n"


def _html_row(cells: Sequence[str], tag: str, css: str) -> str:
    inside = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
    return f"<tr class='{css}'>{inside}</tr>"
