"""Measured layers as Markdown: against the fastest bf16 layer, mixes against a launch a scheme, and their parts."""

from __future__ import annotations

import pandas as pd

from bench.layer.allocations import ALLOCATIONS, BF16, DECODE_TOKENS, MIX_BITS, MIXED, Group
from bench.layer.contenders import FUSIONS, Variant
from bench.layer.limits import with_limits
from kernel_gen.moe import Fusion

DECODE_BAR, PREFILL_BAR = 3.4, 1.7
CELL = ["model", "tokens", "seed"]
PARTS = ("gather", "gemm 1", "swiglu", "gemm 2", "combine")
BASE = "four"
"""What other choices of fusions are compared with."""


def main_fusions(rows: pd.DataFrame) -> str:
    """MoELayer's default, where it was timed; else the one that was timed first."""
    timed = [name for name in rows["fusions"].unique() if name]
    default = next(name for name, value in FUSIONS.items() if value == Fusion.MEASURED_FASTER)
    return default if default in timed or not timed else timed[0]


def whole_layers(rows: pd.DataFrame) -> pd.DataFrame:
    """Layers that ran, ours with the main choice of fusions; each with `best_bf16_us`, the fastest bf16 layer of its
    cell with any choice, and `speedup` over it.
    """
    whole = rows[(rows["status"] == "ok") & (rows["part"] == "")].copy()
    bf16 = whole[whole["group"] == Group.BF16.value]
    best = bf16.loc[bf16.groupby(CELL)["latency_us"].idxmin(), [*CELL, "latency_us", "variant"]]
    best = best.rename(columns={"latency_us": "best_bf16_us", "variant": "best_bf16"})
    whole = whole[whole["fusions"].isin(("", main_fusions(rows)))].merge(best, on=CELL, validate="many_to_one")
    whole["speedup"] = whole["best_bf16_us"] / whole["latency_us"]
    return whole


def choices(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a layer of ours, a column a choice of fusions: how many times as fast as with BASE."""
    ours = rows[(rows["status"] == "ok") & (rows["part"] == "") & (rows["variant"] == Variant.OURS.value)]
    table = ours.pivot_table(index=[*CELL[:2], "allocation"], columns="fusions", values="latency_us", sort=False)
    if BASE not in table:
        return pd.DataFrame()
    others = [name for name in FUSIONS if name in table and name != BASE]
    return table[others].rdiv(table[BASE], axis=0).reset_index()


def against_split(whole: pd.DataFrame) -> pd.DataFrame:
    """Mixes: one launch's time, a launch a scheme's, and how many times faster one is."""
    mixed = whole[whole["group"] == Group.MIXED.value]
    table = mixed.pivot_table(index=["model", "tokens", "allocation"], columns="variant", values="latency_us")
    for variant in (Variant.PER_SCHEME, Variant.STREAMS):
        if variant.value in table:
            table[f"gain, {variant.value}"] = table[variant.value] / table[Variant.OURS.value]
    return table.reset_index()


def parts(rows: pd.DataFrame) -> pd.DataFrame:
    """Microseconds of each part: the layer up to it less the layer up to the part before."""
    prefixes = rows[(rows["status"] == "ok") & rows["part"].str.startswith("up to ")].copy()
    prefixes["part"] = prefixes["part"].str.removeprefix("up to ")
    keys = ["model", "tokens", "allocation"]
    found = []
    for key, group in prefixes.groupby(keys, sort=False):
        times = group.set_index("part")["latency_us"].reindex(PARTS).dropna()
        found.append(
            dict(zip(keys, key, strict=True)) | times.diff().fillna(times).to_dict() | {"layer": times.iloc[-1]}
        )
    order = [*keys, *PARTS, "layer"]
    frame = pd.DataFrame(found)
    return frame[[name for name in order if name in frame.columns]]


def fusions(rows: pd.DataFrame) -> pd.DataFrame:
    """How many times slower a layer is with one step left to torch's operators."""
    done = rows[rows["status"] == "ok"]
    keys = [*CELL, "allocation"]
    ours = done[(done["part"] == "") & (done["variant"] == Variant.OURS.value)]
    ours = ours[ours["fusions"] == main_fusions(rows)][[*keys, "latency_us"]]
    left = done[done["part"].str.startswith("without ")].merge(ours, on=keys, suffixes=("", "_all"))
    left["slowdown"] = left["latency_us"] / left["latency_us_all"]
    return left.pivot_table(index=["model", "tokens", "allocation"], columns="part", values="slowdown").reset_index()


def headline(whole: pd.DataFrame) -> list[str]:
    """The bars and what was reached."""
    mixes = barred(whole)
    decode, prefill = mixes[mixes["tokens"] <= DECODE_TOKENS], mixes[mixes["tokens"] > DECODE_TOKENS]
    lines = []
    for name, frame, bar in (
        (f"a mix of at most {MIX_BITS} bits, up to {DECODE_TOKENS} tokens", decode, DECODE_BAR),
        ("a mix with 8-bit tokens, more tokens", prefill, PREFILL_BAR),
    ):
        if frame.empty:
            continue
        best = frame.loc[frame.groupby(["model", "tokens"])["speedup"].idxmax()]
        reached = int((best["speedup"] >= bar).sum())
        speed = best["speedup"]
        lines.append(
            f"* {name}: the fastest mix of each cell is {speed.min():.2f} to {speed.max():.2f} times as fast as the "
            f"fastest bf16 layer, median {speed.median():.2f}; the bar is {bar}, reached in {reached} of {len(best)} "
            "cells."
        )
    split = against_split(whole)
    for variant in (Variant.PER_SCHEME, Variant.STREAMS):
        if (column := f"gain, {variant.value}") in split:
            gains = split[column].dropna()
            lines.append(
                f"* one launch against {variant.value}: {gains.min():.2f} to {gains.max():.2f} times as fast, median "
                f"{gains.median():.2f}; faster in {int((gains > 1).sum())} of {len(gains)} mixed layers."
            )
    return lines


def against_limits(whole: pd.DataFrame) -> pd.DataFrame:
    """For each cell the fastest bf16 layer and our fastest mix that its bar is about: the least time that their GEMMs
    could take, the fraction of it that the layer reaches, and the speed-up if both reached it.
    """
    rows = []
    for (model, tokens), cell in with_limits(whole).groupby(["model", "tokens"], sort=False):
        mixes = barred(cell)
        if mixes.empty:
            continue
        bf16 = cell[cell["group"] == Group.BF16.value].nsmallest(1, "latency_us").iloc[0]
        mix = mixes.nsmallest(1, "latency_us").iloc[0]
        rows.append(
            {
                "model": model,
                "tokens": tokens,
                "mix": mix["allocation"],
                "speed-up": mix["best_bf16_us"] / mix["latency_us"],
                "bf16's limit, us": bf16["limit_us"],
                "reached": bf16["limit_us"] / mix["best_bf16_us"],
                "mix's limit, us": mix["limit_us"],
                "reached by the mix": mix["fraction"],
                "speed-up at the limits": bf16["limit_us"] / mix["limit_us"],
            }
        )
    return pd.DataFrame(rows)


def barred(whole: pd.DataFrame) -> pd.DataFrame:
    """Our mixes that the bars are about: of at most MIX_BITS up to DECODE_TOKENS, with 8-bit tokens above."""
    ours = whole[(whole["variant"] == Variant.OURS.value) & (whole["group"] == Group.MIXED.value)]
    eight = [item.name for item in MIXED if item.has_8bit_tokens]
    decode = (ours["tokens"] <= DECODE_TOKENS) & (ours["avg_bits"] <= MIX_BITS)
    return ours[decode | ((ours["tokens"] > DECODE_TOKENS) & ours["allocation"].isin(eight))]


def markdown(rows: pd.DataFrame, *, command: str) -> str:
    """The whole report."""
    whole = whole_layers(rows)
    text = [
        "# Whole layers, measured",
        "",
        f"`{command}` on {', '.join(sorted(set(rows['gpu'])))}, {rows['timestamp'].min()[:16]} to "
        f"{rows['timestamp'].max()[:16]} UTC; SM clock {whole['sm_clock_mhz'].min():.0f} to "
        f"{whole['sm_clock_mhz'].max():.0f} MHz. Router's output in, layer's output out; graph replays, weights from "
        "DRAM, all layers of a cell in one run, interleaved; the median of the rounds.",
        "",
        *headline(whole),
        "",
        "## Against the fastest bf16 layer",
        "",
        "Microseconds at so many tokens, and how many times as fast as the fastest bf16 layer (named).",
        "",
        *_speedups(whole),
        "## bf16 layers",
        "",
        _table(
            whole[whole["group"] == Group.BF16.value]
            .pivot_table(index=["model", "tokens"], columns="variant", values="latency_us")
            .reset_index(),
            1,
        ),
        "",
        "## What bounds the speed-up",
        "",
        "The least time of both GEMMs on the card (bench/peers/roofline.py), and the fraction of it that the whole "
        "layer, steps and all, reaches.",
        "",
        _table(against_limits(whole), 2),
        "",
        *_section(
            "Choices of fusions",
            f"How many times as fast as with {BASE}: route, gather, swiglu and combine. epilogue adds SwiGLU in the "
            "first GEMM, overlap programmatic dependent launches, both both, all the second GEMM's prefetch besides. "
            "The median, least and most.",
            _choice_medians(choices(rows)),
        ),
        *_section("Mixes: one launch against a launch a scheme", "Microseconds.", [_table(against_split(whole), 2)]),
        *_section(
            "Parts of a layer",
            "Microseconds of each part, by difference: the layer up to it less the layer up to the part before.",
            [_table(parts(rows), 1)],
        ),
        *_section(
            "Each fusion left out",
            "How many times slower the layer is with one step in torch's operators.",
            [_table(fusions(rows), 2)],
        ),
        *_failures(rows),
    ]
    return "\n".join(text)


def _section(title: str, says: str, lines: list[str]) -> list[str]:
    """Nothing where nothing of it was measured."""
    return [f"## {title}", "", says, "", *lines, ""] if any(lines) else []


def _choice_medians(table: pd.DataFrame) -> list[str]:
    """By load and by form of tokens."""
    if table.empty:
        return []
    table = table.assign(
        load=table["tokens"].map(lambda tokens: "decode" if tokens <= DECODE_TOKENS else "prefill"),
        form=table["allocation"].map(lambda name: "8 bits" if "a8" in name else "bf16"),
    )
    names = [name for name in FUSIONS if name in table]
    lines = [f"| load | tokens' form | layers | {' | '.join(names)} |", f"|{'---|' * (3 + len(names))}"]
    for (load, form), found in table.groupby(["load", "form"]):
        texts = [f"{each.median():.3f} ({each.min():.2f} to {each.max():.2f})" for each in (found[n] for n in names)]
        lines.append(f"| {load} | {form} | {len(found)} | {' | '.join(texts)} |")
    return lines


def _speedups(whole: pd.DataFrame) -> list[str]:
    """A table a model: allocations down, tokens across."""
    ours = whole[whole["variant"] == Variant.OURS.value]
    lines = []
    for model, of_model in ours.groupby("model", sort=False):
        sizes = sorted(of_model["tokens"].unique())
        best = of_model.drop_duplicates("tokens").set_index("tokens")
        lines += [f"### {model}", "", f"| | bits | {' | '.join(map(str, sizes))} |", f"|{'---|' * (2 + len(sizes))}"]
        cells = [f"{best.loc[size, 'best_bf16_us']:.1f}, {best.loc[size, 'best_bf16']}" for size in sizes]
        lines.append(f"| fastest bf16 | 16 | {' | '.join(cells)} |")
        for name in (item.name for item in ALLOCATIONS if item.name != BF16.name):
            found = of_model[of_model["allocation"] == name].set_index("tokens")
            if not found.empty:
                texts = [
                    f"{found.loc[size, 'latency_us']:.1f} ({found.loc[size, 'speedup']:.2f})"
                    if size in found.index
                    else ""
                    for size in sizes
                ]
                lines.append(f"| {name} | {found['avg_bits'].iloc[0]:.2f} | {' | '.join(texts)} |")
        lines.append("")
    return lines


def _table(frame: pd.DataFrame, digits: int) -> str:
    if frame.empty:
        return ""
    lines = [f"| {' | '.join(map(str, frame.columns))} |", f"|{'---|' * len(frame.columns)}"]
    for row in frame.itertuples(index=False):
        cells = [
            ("" if pd.isna(cell) else f"{cell:.{digits}f}") if isinstance(cell, float) else str(cell) for cell in row
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _failures(rows: pd.DataFrame) -> list[str]:
    failed = rows[rows["status"] != "ok"]
    if failed.empty:
        return []
    lines = ["## What did not run", ""]
    for row in failed.itertuples():
        lines.append(f"* {row.model}, {row.tokens} tokens, {row.allocation}, {row.variant}: {row.error}")
    return [*lines, ""]
