"""A fitted model made right again for a changed GPU or software, from at most a few dozen measurements."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from costmodel import features
from costmodel.columns import INDEX
from costmodel.drift import Cause, Effect, find
from costmodel.forest import Forest
from costmodel.groups import launch_ids
from costmodel.model import LatencyModel
from costmodel.model_file import FittedModel
from profiles.errors import DataError

Array = npt.NDArray[np.float64]
MIN_ROWS = 12
ENOUGH_ROWS = 50
"""Measurements that re-calibrate a model; more are taken, and change little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recalibration:
    """What was found, and the model that allows for it.

    Attributes:
        effects: what changed; empty: nothing did.
        fitted: the model, re-calibrated; the base itself if nothing changed and its intervals hold.
        num_rows: measurements used.
        num_paired: of them, those that were recorded too. From MIN_ROWS on, only these are compared, with what was
            recorded; below, all of them with the base's predictions.
        error_before, error_after: mean absolute relative error of predictions on these launches.
        widening: factor on the intervals' width.
        clock_ratio: median of SM clock seen now over recorded, of paired launches; None if unknown.
        versions: what the paired launches' provenance says differently: name -> (recorded, now).
    """

    effects: tuple[Effect, ...]
    fitted: FittedModel
    num_rows: int
    num_paired: int
    error_before: float
    error_after: float
    widening: float
    clock_ratio: float | None
    versions: dict[str, tuple[str, str]]


def recalibrate(
    base: FittedModel, measured: pd.DataFrame, recorded: pd.DataFrame | None = None, *, seed: int = 0
) -> Recalibration:
    """Compare measurements (a profile's finished rows) with what was recorded of the same launches and configurations,
    or without enough of these with the base's predictions; name what changed, and correct the base by it.

    Raises:
        DataError: too few rows, or of another GPU.
    """
    if len(measured) < MIN_ROWS:
        raise DataError(f"{len(measured)} finished rows: at least {MIN_ROWS} are needed, better {ENOUGH_ROWS}")
    if (other := str(measured["gpu"].iloc[0])) != base.gpu:
        raise DataError(f"the measurements are of {other}, the model of {base.gpu}: fit a model for {other}")
    model = base.model
    assert model.core_ is not None  # a model in a file has a core
    X, y = features.of_profile(measured), measured["latency_us"].to_numpy(dtype=np.float64)
    pairs = _paired(measured, recorded)
    is_paired = np.isfinite(pairs.latency_us)
    if is_paired.sum() < MIN_ROWS:
        tested, expected = np.ones(len(y), dtype=np.bool_), model.predict(X)
    else:
        tested, expected = is_paired, pairs.latency_us
    matrix = X.to_numpy(dtype=np.float32)[tested]
    names = [used[0] if len(set(used)) == 1 else "" for used in measured["schemes"][tested]]
    effects = find(matrix, np.log(y / expected)[tested], names, model.core_, model.slope, seed=seed)
    corrected = corrected_model(model, effects)
    widening = _widening(corrected, X, y)
    if widening > 1.0:
        corrected.conformal_ = dataclasses.replace(corrected.conformal_, scores=corrected.conformal_.scores * widening)
    return Recalibration(
        effects=tuple(effects),
        fitted=dataclasses.replace(base, model=corrected),
        num_rows=len(measured),
        num_paired=int(is_paired.sum()),
        error_before=float(np.abs(model.predict(X) / y - 1.0).mean()),
        error_after=float(np.abs(corrected.predict(X) / y - 1.0).mean()),
        widening=widening,
        clock_ratio=pairs.clock_ratio,
        versions=pairs.versions,
    )


def corrected_model(model: LatencyModel, effects: Sequence[Effect]) -> LatencyModel:
    """The model with the effects in it: of the core's parts as factors, of groups of launches as further trees, which
    ask only what does not depend on tokens, so that latency still never falls with tokens.
    """
    corrected = copy.copy(model)
    assert model.core_ is not None
    core, forest = model.core_, model.forest_
    for effect in effects:
        log_factor = float(np.log(effect.factor))
        if parts := effect.explanation.scaled_parts(log_factor):
            core = core.scaled(parts)
        elif effect.explanation.cause is Cause.EVERYTHING:
            forest = dataclasses.replace(forest, base=forest.base + log_factor)
        else:
            forest = _with_tree(forest, effect.explanation.thresholds(), log_factor)
    corrected.core_, corrected.forest_ = core, forest
    return corrected


def _with_tree(forest: Forest, questions: Sequence[tuple[str, float, bool]], value: float) -> Forest:
    """The forest and a tree that adds `value` to the rows that answer the questions so."""
    forest = _at_least(forest, len(questions))
    depth = forest.features.shape[1]
    asked, thresholds = np.zeros(depth, dtype=np.int32), np.full(depth, np.inf, dtype=np.float32)
    leaf = 0
    for level, (feature, threshold, is_above) in enumerate(questions):
        asked[level], thresholds[level] = INDEX[feature], threshold
        leaf |= int(is_above) << (depth - 1 - level)
    leaves = np.zeros(1 << depth)
    leaves[leaf] = value
    return dataclasses.replace(
        forest,
        features=np.vstack([forest.features, asked]),
        thresholds=np.vstack([forest.thresholds, thresholds]),
        leaves=np.vstack([forest.leaves, leaves]),
    )


def _at_least(forest: Forest, depth: int) -> Forest:
    """The same forest, of trees that deep: further questions are answered no by every row."""
    trees, has = forest.features.shape
    if has >= depth:
        return forest
    more = depth - has
    leaves = np.zeros((trees, 1 << depth))
    leaves[:, :: 1 << more] = forest.leaves
    return dataclasses.replace(
        forest,
        features=np.hstack([forest.features, np.zeros((trees, more), dtype=np.int32)]),
        thresholds=np.hstack([forest.thresholds, np.full((trees, more), np.inf, dtype=np.float32)]),
        leaves=leaves,
    )


def _widening(model: LatencyModel, X: pd.DataFrame, y: Array) -> float:
    """By how much intervals must be wider to hold the model's share of these measurements; 1 if they do."""
    predicted, _, upper = model.predict(X, return_interval=True)
    reached = np.abs(np.log(y / predicted)) / np.log(upper / predicted)
    level = min(1.0, np.ceil((len(y) + 1) * model.coverage) / len(y))
    return max(1.0, float(np.quantile(reached, level)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pairs:
    """What was recorded of the measured launches: latency [R] in microseconds, NaN where nothing was."""

    latency_us: Array
    clock_ratio: float | None
    versions: dict[str, tuple[str, str]]


def _paired(measured: pd.DataFrame, recorded: pd.DataFrame | None) -> _Pairs:
    if recorded is None:
        return _Pairs(latency_us=np.full(len(measured), np.nan), clock_ratio=None, versions={})
    both = pd.concat([measured, recorded], ignore_index=True)
    key = pd.Series(list(zip(launch_ids(both), both["config"], strict=True)))
    now, before = key[: len(measured)], key[len(measured) :]
    first = {each: index for index, each in reversed(list(before.items()))}
    at = np.asarray([first.get(each, -1) for each in now], dtype=np.intp)
    is_paired = at >= 0
    was = both.iloc[at[is_paired]]
    latency_us = np.full(len(measured), np.nan)
    latency_us[is_paired] = was["latency_us"]
    once, again = (rows["sm_clock_mhz"].to_numpy(dtype=np.float64) for rows in (was, measured[is_paired]))
    clocks = (again / once)[np.isfinite(again / once)]
    return _Pairs(
        latency_us=latency_us,
        clock_ratio=float(np.median(clocks)) if len(clocks) else None,
        versions=_changed(was, measured[is_paired]),
    )


def _changed(was: pd.DataFrame, now: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Versions in the rows' provenance that differ, and how many kernels do."""
    found = {}
    once, again = (dict(rows["versions"].iloc[0]) if len(rows) else {} for rows in (was, now))
    for name in ("torch", "cuda", "driver", "dsl", "bitile"):
        if once.get(name) != again.get(name):
            found[name] = (str(once.get(name, "unknown")), str(again.get(name, "unknown")))
    other = int((was["kernel_fingerprint"].to_numpy() != now["kernel_fingerprint"].to_numpy()).sum())
    return found | ({"kernels": ("", f"{other} of {len(now)} have other sources")} if other else {})
