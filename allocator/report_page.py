"""The report as one HTML file that needs nothing else: styles and pictures are inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

from allocator.report_data import ReportData
from allocator.report_text import headline, tiles
from allocator.verify import Finalist, Verification

_STYLE = """
:root { --ink: #22303c; --soft: #5d6b78; --line: #dfe4e8; --accent: #0b6e8a; --back: #f6f7f8; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto,
  "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 25px; margin: 0 0 2px; } h2 { font-size: 18px; margin: 0 0 6px; }
.sub { color: var(--soft); margin: 0 0 18px; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 0 0 18px; }
.tile { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; flex: 1 1 150px; }
.tile b { display: block; font-size: 21px; } .tile span { color: var(--soft); font-size: 13px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 16px 18px; margin: 0 0 16px; }
section p { margin: 0 0 10px; color: var(--soft); max-width: 100ch; }
img { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); }
th, td { padding: 5px 10px; } td { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; color: var(--accent); }
.num { text-align: right; white-space: nowrap; } tr.this td { background: #e8f3f6; font-weight: 600; }
tr.over td { color: var(--soft); } code { font-size: 13px; }
@media print { body { background: #fff; } section, .tile { break-inside: avoid; } }
"""


def page(data: ReportData, pictures: Mapping[str, bytes]) -> str:
    """The HTML. pictures: PNG by name, as `report_plots.plots` makes them."""
    allocation = data.allocation
    on = f" on {allocation.gpu}" if allocation.gpu else ""
    sections = [
        _front(data, pictures),
        _section("Bits per expert and layer", _BITS, _image(pictures["bits"], "Bits per expert and layer")
                 + _per_scheme(data)),
        _time(data, pictures),
        _worth(data),
        *([_verified(data.verification)] if data.verification else []),
        _provenance(data),
    ]  # fmt: skip
    cells = "".join(f'<div class="tile"><b>{escape(b)}</b><span>{escape(t)}</span></div>' for b, t in tiles(data))
    title = f"{allocation.model}{on}: mixed-precision allocation"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        f'<h1>{escape(title)}</h1><p class="sub">{escape(headline(data))}</p>'
        f'<div class="tiles">{cells}</div>{"".join(sections)}</main></body></html>\n'
    )


_BITS = "Each cell is one linear of one expert; darker has fewer bits. Grey: no such linear in the allocation."
_FRONT = (
    "The curve is the least loss that was found at each size, within the same latency limits; squares are all linears"
    " in one scheme. Losses are those of the sensitivity, added up."
)


def _section(title: str, text: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{body}</section>"


def _image(png: bytes, alt: str) -> str:
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] | None = None) -> str:
    """Columns whose cells are numbers stand to the right."""
    right = [all(_is_number(row[i]) for row in rows) for i in range(len(head))]

    right_class = ' class="num"'

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{right_class if is_right else ''}>{escape(text)}</{tag}>"
            for text, is_right in zip(row, right, strict=True)
        )

    body = "".join(
        f'<tr class="{name}">{cells("td", row)}</tr>'
        for row, name in zip(rows, classes or [""] * len(rows), strict=True)
    )
    return f'<div class="scroll"><table><tr>{cells("th", head)}</tr>{body}</table></div>'


def _is_number(text: str) -> bool:
    return text == "-" or text[:1].isdigit() or (text[:1] in "+-" and text[1:2].isdigit())


def _front(data: ReportData, pictures: Mapping[str, bytes]) -> str:
    allocation = data.allocation
    names = list(allocation.predicted_latency_us)
    rows = [
        (
            "this allocation",
            f"{allocation.avg_weight_bits:.3f}",
            f"{allocation.predicted_loss:.4g}",
            *(f"{allocation.predicted_latency_us[name]:,.1f}" for name in names),
            "within",
        )
    ]
    classes = ["this"]
    for one in sorted(allocation.uniform, key=lambda u: (u.avg_weight_bits, u.loss)):
        latency = [f"{one.latency_us[name]:,.1f}" if name in one.latency_us else "-" for name in names]
        verdict = "within" if one.within_budget else "beyond"
        rows.append((one.scheme.name, f"{one.avg_weight_bits:.3f}", f"{one.loss:.4g}", *latency, verdict))
        classes.append("" if one.within_budget else "over")
    head = ("", "bits", "loss", *(f"{name}, us" for name in names), "budget")
    body = _image(pictures["front"], "Loss against bits") + _table(head, rows, classes)
    note = _FRONT if data.front else "No sensitivity was given, so the front is not drawn; squares are uniform schemes."
    return _section("Loss against size", note, body)


def _per_scheme(data: ReportData) -> str:
    total = sum(data.linears_per_scheme.values())
    rows = [(name, f"{count}", f"{count / total:.1%}") for name, count in data.linears_per_scheme.items()]
    return _table(("scheme", "linears", "share"), rows)


def _time(data: ReportData, pictures: Mapping[str, bytes]) -> str:
    if not data.time:
        return _section("Where the time goes", "No cost table was given: bits and losses alone decided.", "")
    text = (
        f"Latencies are {data.source}. Each expert is charged an even share of its launch in one scheme; solid bars are"
        " gate and up, hatched ones down."
    )
    rows = [
        (share.scenario, share.linear, share.scheme, f"{share.num_linears}", f"{share.latency_us:,.1f}")
        for share in sorted(data.time, key=lambda share: (share.scenario, -share.latency_us))
    ]
    table = _table(("scenario", "linear", "scheme", "linears", "us, all layers"), rows)
    body = _image(pictures["time"], "Shares of latency") + f"<details><summary>as a table</summary>{table}</details>"
    return _section("Where the time goes", text, body)


def _worth(data: ReportData) -> str:
    rows = [(name, f"{price:.4g}") for name, price in data.allocation.shadow_prices.items()]
    text = "A shadow price is how fast the loss falls with one more unit of a limit. A limit of price 0 does not bind."
    body = ""
    if data.next_bits is not None:
        step = data.next_bits
        most = "" if step.loss_by_price is None else f" ({step.loss_by_price:.4g} by the shadow price)"
        share = step.loss_saved / data.allocation.predicted_loss if data.allocation.predicted_loss > 0 else 0.0
        where = ", ".join(f"layer {layer}: {count}" for layer, count in step.changed.items()) or "none"
        body += (
            f"<p><b>{step.extra_bits:g} more bits a weight</b> save {step.loss_saved:.4g} of loss, {share:.1%} of it"
            f"{most}. Linears that would change: {escape(where)}.</p>"
        )
    body += _table(("limit", "loss a unit"), rows) if rows else ""
    return _section("What more budget buys", text, body)


def _verified(found: Verification) -> str:
    rank = (
        "" if found.rank_correlation is None else f" Rank correlation with the prediction {found.rank_correlation:.2f}."
    )
    text = (
        f"Measured on {found.data} with {found.quantizer}; the model's own perplexity is {found.exact_perplexity:.4f}."
        f" Best first.{rank} {found.latency_note[:1].upper()}{found.latency_note[1:]}."
    )
    names = list(dict.fromkeys(name for one in found.finalists for name in one.latency_us))
    is_measured = any(one.measured_us for one in found.finalists)
    rows = [
        (
            one.name,
            f"{one.avg_weight_bits:.3f}",
            "-" if one.predicted_loss is None else f"{one.predicted_loss:.4g}",
            f"{one.mean_kl:.5f}",
            f"{one.perplexity:.4f}",
            *(cell for name in names for cell in _latencies(one, name, is_measured)),
        )
        for one in found.finalists
    ]
    of_scenario = ("{}, us predicted", "{}, us measured", "off by") if is_measured else ("{}, us predicted",)
    head = ("", "bits", "predicted", "KL, nats", "perplexity", *(h.format(n) for n in names for h in of_scenario))
    return _section("Predicted and measured", text, _table(head, rows))


def _latencies(one: Finalist, scenario: str, is_measured: bool) -> tuple[str, ...]:
    """Cells of one scenario: launches predicted, measured, and the prediction's error."""
    predicted = one.launch_us.get(scenario, one.latency_us.get(scenario))
    first = "-" if predicted is None else f"{predicted:,.1f}"
    if not is_measured:
        return (first,)
    measured = one.measured_us.get(scenario)
    if measured is None or predicted is None:
        return first, "-" if measured is None else f"{measured:,.1f}", "-"
    return first, f"{measured:,.1f}", f"{predicted / measured - 1:+.1%}"


def _provenance(data: ReportData) -> str:
    allocation = data.allocation
    limits = [("average bits", allocation.budget.avg_weight_bits), ("bytes", allocation.budget.weight_bytes)]
    limits += [(f"latency in {name}, us", us) for name, us in allocation.budget.max_latency_us.items()]
    rows = [(f"budget: {name}", f"{value:g}") for name, value in limits if value is not None]
    rows += [("budget holds in", "every layer" if allocation.budget.per_layer else "all layers together")]
    rows += [("one scheme for each", allocation.granularity.value), ("weights, bytes", f"{allocation.weight_bytes:,}")]
    rows += [(f"losses: {key}", str(value)) for key, value in allocation.sensitivity.items()]
    rows += [("latencies", f"{allocation.cost_model_version} ({data.source or 'table not given'})")] * bool(
        allocation.cost_model_version
    )
    return _section("Where this is from", "", _table(("", ""), rows))
