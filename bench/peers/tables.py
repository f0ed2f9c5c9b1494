"""Markdown tables of frames."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

Formats = Mapping[str, Callable[[Any], str]]


def table(frame: pd.DataFrame, formats: Formats, headings: Sequence[str]) -> Iterator[str]:
    """Lines of a table: the columns that `formats` names, each as it says, under as many headings."""
    yield "| " + " | ".join(headings) + " |"
    yield "|---" * len(headings) + "|"
    for _, row in frame.iterrows():
        yield "| " + " | ".join(show(row[name]) for name, show in formats.items()) + " |"


def two(value: float) -> str:
    """Two decimals; nothing of NaN."""
    return "" if math.isnan(value) else f"{value:.2f}"


def one(value: float) -> str:
    """One decimal; nothing of NaN."""
    return "" if math.isnan(value) else f"{value:.1f}"


def percent(value: float) -> str:
    """A signed percentage; nothing of NaN."""
    return "" if math.isnan(value) else f"{value:+.1%}"
