"""Which rows of a profile belong together: those of one launch, and those that are held out together."""

from __future__ import annotations

import re
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

Labels = npt.NDArray[np.object_]
Codes = npt.NDArray[np.int64]


class HeldOut(Enum):
    """A kind of group."""

    SHAPE = "shape"
    MODEL = "model"
    LOAD = "load"
    TILE = "tile"
    SCHEME = "scheme"
    MIX = "mix"
    SCHEME_MIX = "scheme mix"


def group_labels(rows: pd.DataFrame, kind: HeldOut) -> Labels:
    """Each row's group of a kind; None where a row has none (a uniform launch has no mix) and is learned from only."""
    mixed = rows["schemes"].map(lambda names: len(set(names)) > 1)
    if kind is HeldOut.SHAPE:
        labels = (
            rows["n"].astype(str) + "x" + rows["k"].astype(str) + ", " + rows["num_experts"].astype(str) + " experts"
        )
    elif kind is HeldOut.MODEL:
        labels = rows["model"].map(lambda name: re.sub(r"-(ep|tp)\d+", "", name))
    elif kind is HeldOut.LOAD:
        labels = rows["load_source"].map(lambda source: re.sub(r", top \d+, seed \d+", "", source))
    elif kind is HeldOut.TILE:
        labels = rows["config"].map(lambda name: "_".join(name.split("_")[:2]))
    elif kind is HeldOut.SCHEME:
        labels = rows["schemes"].map(lambda names: names[0]).mask(mixed, None)
    elif kind is HeldOut.MIX:
        labels = rows["schemes"].map(lambda names: " ".join(names)).where(mixed, None)
    else:
        labels = rows["schemes"].map(lambda names: " + ".join(sorted(set(names)))).where(mixed, None)
    return np.asarray([None if pd.isna(label) else str(label) for label in labels], dtype=object)


def launch_ids(rows: pd.DataFrame) -> Codes:
    """A number per launch: rows with the same one differ in configuration only."""
    columns = zip(
        *(rows[name] for name in ("gpu", "linear", "n", "k")),
        rows["schemes"].map(tuple),
        rows["tokens_per_expert"].map(lambda tokens: np.asarray(tokens, dtype=np.int32).tobytes()),
        strict=True,
    )
    known: dict[tuple[Any, ...], int] = {}
    return np.asarray([known.setdefault(key, len(known)) for key in columns], dtype=np.int64)
