"""A profile's rows as candidates that were all measured: what a replay chooses among."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from costmodel import features
from costmodel.fit import MIN_ROWS
from costmodel.groups import HeldOut, group_labels, launch_ids
from costmodel.guide import Candidates, Guide
from costmodel.model import LatencyModel
from profiles.errors import DataError

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recorded:
    """One model's rows as candidates, what each took, and the model that is the base when it is tuned (None: core)."""

    name: str
    candidates: Candidates
    latency_us: Array
    base: LatencyModel | None

    def guide(self, batch: int, *, with_base: bool = True) -> Guide:
        """Over these candidates."""
        return Guide.of(self.candidates, self.base if with_base else None, batch=batch)


def recorded(rows: pd.DataFrame, *, seed: int = 0) -> list[Recorded]:
    """Every model of a profile's finished rows (those `with_choice`), with a base that was fitted on the others."""
    rows = with_choice(rows)
    names = group_labels(rows, HeldOut.MODEL)
    X, y = features.of_profile(rows), rows["latency_us"].to_numpy(dtype=np.float64)
    found = []
    for name in pd.unique(names):
        own = names == name
        base = None
        if (~own).sum() >= MIN_ROWS:
            base = LatencyModel(num_folds=2, random_state=seed).fit(X[~own], y[~own])
        candidates = candidates_of(rows[own].reset_index(drop=True), X[own].reset_index(drop=True))
        found.append(Recorded(name=str(name), candidates=candidates, latency_us=y[own], base=base))
    return found


def with_choice(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of launches that were measured with two configurations at least: in others nothing is to be chosen.

    Raises:
        DataError: there is none.
    """
    counts = pd.Series(launch_ids(rows)).map(pd.Series(launch_ids(rows)).value_counts()).to_numpy()
    if not (counts > 1).any():
        raise DataError("nothing to replay: no launch was measured with two configurations")
    return rows[counts > 1].reset_index(drop=True)


def candidates_of(rows: pd.DataFrame, X: pd.DataFrame) -> Candidates:
    """A profile's rows, with their features, as candidates."""
    mixes = ["+".join(names) for names in rows["schemes"]]
    slots = ["+".join(sorted(set(names))) for names in rows["schemes"]]
    weights = [f"{n} {k} {mix}" for n, k, mix in zip(rows["n"], rows["k"], mixes, strict=True)]
    launches = launch_ids(rows)
    return Candidates(
        features=X,
        launches=np.asarray(launches, dtype=np.intp),
        kernels=_codes([f"{config} {used}" for config, used in zip(rows["config"], slots, strict=True)]),
        inputs=np.asarray(launches, dtype=np.intp),
        weights=_codes(weights),
    )


def _codes(names: Sequence[str]) -> Codes:
    return np.asarray(pd.factorize(np.asarray(names, dtype=object))[0], dtype=np.intp)
