"""What the recordings show about their own limits: how one scheme's time relates to another's in the same cells."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from bench.peers.recorded import geometric_mean

PAIRS = (
    ("w2a16_g128_sym", "w4a16_g128_sym", "half the bytes of weights; 1.0: bytes are not the limit"),
    ("w4a16_g-1_sym", "w4a16_g128_sym", "no group scales"),
    ("w4a8_g128_sym", "w4a16_g128_sym", "the same bytes of weights, codes go to the tensor cores as integers"),
    ("w4a8_g128_sym", "w8a8_g-1_sym", "half the bytes of weights; above 1 unpacking and group scales cost more"),
    ("w4a8_g-1_sym", "w4a8_g128_sym", "no group scales"),
    ("w4a8_g128_sym_e4m3", "w8a8_g-1_sym_e4m3", "half the bytes of weights, with unpacking and group scales"),
    ("w8a8_g-1_sym_e4m3", "w8a8_g-1_sym", "the same bytes; operations 1.31 times faster by the roofline"),
)


def ratios(skewed: pd.DataFrame) -> Iterator[tuple[str, str, str, dict[int, tuple[float, int]]]]:
    """(scheme, other, what differs, by tokens the geometric mean of the latencies' ratio and over how many cells)."""
    latency = skewed.pivot_table(index=["model", "linear", "tokens"], columns="scheme", values="latency_us")
    for scheme, other, meaning in PAIRS:
        if scheme not in latency or other not in latency:
            continue
        ratio = (latency[scheme] / latency[other]).dropna()
        by_tokens = {
            int(str(tokens)): (geometric_mean(values), len(values)) for tokens, values in ratio.groupby(level="tokens")
        }
        yield scheme, other, meaning, by_tokens


def lines(skewed: pd.DataFrame) -> Iterator[str]:
    """A Markdown table of them."""
    found = list(ratios(skewed))
    tokens = sorted({count for *_, by_tokens in found for count in by_tokens})
    yield "| time of | over time of | " + " | ".join(f"{count} tokens" for count in tokens) + " | what differs |"
    yield "|---" * (len(tokens) + 3) + "|"
    for scheme, other, meaning, by_tokens in found:
        cells = [f"{by_tokens[count][0]:.2f} ({by_tokens[count][1]})" if count in by_tokens else "" for count in tokens]
        yield f"| {scheme} | {other} | " + " | ".join(cells) + f" | {meaning} |"
