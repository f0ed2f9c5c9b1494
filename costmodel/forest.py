"""Boosted oblivious trees: what `LatencyModel` learns with.

In an oblivious tree all nodes of a level ask the same question, so that a tree of depth d is d comparisons and one
look-up in a table of 2^d: a million rows go through a few hundred trees in under a second with numpy alone, one row
through all of them in a handful of array operations, and a forest is three plain arrays, kept without code. (The form
is CatBoost's: Prokhorenkova et al. 2018.) Monotone features are exact: the table of each tree is made non-decreasing
along their questions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import numpy.typing as npt

from costmodel.blocks import for_blocks

Array = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float32]
MAX_BINS = 64
MAX_DEPTH = 8
FEW_ROWS = 64
"""Up to so many rows go through all trees at once: fewer, larger array operations."""


def require(name: str, value: Any, holds: Callable[[Any], bool], expected: str, kind: type = Real) -> None:
    """ValueError, as scikit-learn's estimators raise, for a parameter that cannot be."""
    if not isinstance(value, kind) or not holds(value):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Forest:
    """T trees of depth D: `features` int32 and `thresholds` float32 are [T, D], `leaves` float64 is [T, 2^D].

    A row's leaf is the number whose bits, the first question's highest, say `x[feature] > threshold`; the prediction is
    `base` plus the leaves' sum.
    """

    base: float
    features: npt.NDArray[np.int32]
    thresholds: Matrix
    leaves: Array

    def predict(self, X: Matrix) -> Array:
        """Float64 [R] for float32 [R, F]."""
        if len(X) <= FEW_ROWS:
            return self._predict_few(X)
        out = np.full(len(X), self.base)
        for_blocks(len(X), lambda rows: self._add_block(X[rows], out[rows]))
        return out

    def _predict_few(self, X: Matrix) -> Array:
        trees, depth = self.features.shape
        answers = X[:, self.features.ravel()] > self.thresholds.ravel()
        leaf = answers.reshape(len(X), trees, depth) @ (1 << np.arange(depth)[::-1])
        return np.asarray(
            self.base + np.take(self.leaves.ravel(), leaf + np.arange(trees) * (1 << depth)).sum(axis=1),
            dtype=np.float64,
        )

    def _add_block(self, X: Matrix, out: Array) -> None:
        used = np.unique(self.features)
        columns = dict(zip(used.tolist(), np.ascontiguousarray(X.T[used]), strict=True))
        answer = np.empty(len(X), dtype=np.bool_)
        leaf = np.empty(len(X), dtype=np.uint8)
        for features, thresholds, leaves in zip(self.features.tolist(), self.thresholds, self.leaves, strict=True):
            leaf.fill(0)
            for feature, threshold in zip(features, thresholds, strict=True):
                np.greater(columns[feature], threshold, out=answer)
                np.add(leaf, leaf, out=leaf)
                np.bitwise_or(leaf, answer.view(np.uint8), out=leaf)
            out += leaves[leaf]


@dataclass(frozen=True, slots=True, kw_only=True)
class Boosting:
    """How a forest is grown. Each tree's questions are chosen on `rows_per_tree` rows and a share of the features,
    drawn anew; its leaves then average all rows.
    """

    num_trees: int = 200
    depth: int = 6
    learning_rate: float = 0.1
    l2: float = 3.0
    rows_per_tree: int = 4096
    feature_share: float = 0.5

    def __post_init__(self) -> None:
        """Raises ValueError for what no forest can be; MAX_DEPTH's leaves are numbered in a byte."""
        require("num_trees", self.num_trees, lambda it: it >= 1, "a whole number of at least 1", Integral)
        require("depth", self.depth, lambda it: 1 <= it <= MAX_DEPTH, f"a whole number of 1 to {MAX_DEPTH}", Integral)
        require("learning_rate", self.learning_rate, lambda it: 0 < it <= 1, "above 0 and at most 1")
        require("l2", self.l2, lambda it: 0 < it < np.inf, "above 0, for leaves without rows")

    def fit(
        self, X: Matrix, y: Array, *, asked: npt.NDArray[np.bool_], grows: npt.NDArray[np.bool_], seed: int
    ) -> Forest:
        """Least squares on float32 X [R, F] and y [R]. Only features where `asked` [F] are looked at; the prediction
        never falls in those where `grows` [F].
        """
        rng = np.random.default_rng(seed)
        none = np.empty(0, dtype=np.float32)
        edges = [_bin_edges(X[:, feature]) if ask else none for feature, ask in enumerate(asked)]
        codes = np.zeros(X.shape, dtype=np.uint8, order="F")
        for feature in np.flatnonzero(asked):
            codes[:, feature] = np.searchsorted(edges[feature], X[:, feature], side="left")
        askable = np.flatnonzero([len(edge) > 0 for edge in edges])
        bins = max((len(edge) for edge in edges), default=0) + 1
        base = float(y.mean())
        residual = y - base
        features = np.zeros((self.num_trees, self.depth), dtype=np.int32)
        thresholds = np.full((self.num_trees, self.depth), np.inf, dtype=np.float32)
        leaves = np.zeros((self.num_trees, 1 << self.depth))
        for tree in range(self.num_trees if len(askable) else 0):
            rows = _drawn(rng, len(y), self.rows_per_tree)
            some = _drawn(rng, len(askable), max(1, round(self.feature_share * len(askable))))
            questions = self._questions(codes[rows], residual[rows], askable[some], grows, bins)
            leaf = np.zeros(len(y), dtype=np.intp)
            for level, (asked_feature, code) in enumerate(questions):
                features[tree, level], thresholds[tree, level] = asked_feature, edges[asked_feature][code]
                leaf = 2 * leaf + (codes[:, asked_feature] > code)
            size = 1 << self.depth
            count = np.bincount(leaf, minlength=size)
            sums = np.bincount(leaf, weights=residual, minlength=size)
            values = self.learning_rate * sums / (count + self.l2)
            leaves[tree] = _made_to_grow(values, [bool(grows[feature]) for feature, _ in questions])
            residual -= leaves[tree][leaf]
        return Forest(base=base, features=features, thresholds=thresholds, leaves=leaves)

    def _questions(
        self,
        codes: npt.NDArray[np.uint8],
        residual: Array,
        features: npt.NDArray[np.intp],
        grows: npt.NDArray[np.bool_],
        bins: int,
    ) -> list[tuple[int, int]]:
        """(feature, bin) of each level: greedily, the split of all leaves at once that explains most."""
        width = len(features) * bins
        cells = codes[:, features].astype(np.intp) + np.arange(len(features)) * bins
        weights = np.repeat(residual, len(features))
        leaf = np.zeros(len(residual), dtype=np.intp)
        must_grow = grows[features][:, None]
        questions = []
        for level in range(self.depth):
            shape = (1 << level, len(features), bins)
            flat = (cells + leaf[:, None] * width).ravel()
            below = np.bincount(flat, weights=weights, minlength=np.prod(shape)).reshape(shape).cumsum(axis=2)
            count = np.bincount(flat, minlength=np.prod(shape)).reshape(shape).cumsum(axis=2)
            above, rest = below[:, :, -1:] - below, count[:, :, -1:] - count
            mean_below, mean_above = below / (count + self.l2), above / (rest + self.l2)
            gain = below * mean_below + above * mean_above
            whole = below[:, :, -1:] ** 2 / (count[:, :, -1:] + self.l2)
            gain = np.where(must_grow & (mean_above < mean_below), whole, gain)
            best, code = divmod(int(gain.sum(axis=0).argmax()), bins)
            feature = int(features[best])
            code = _last_edge(codes, feature, code)
            questions.append((feature, code))
            leaf = 2 * leaf + (codes[:, feature] > code)
        return questions


def _last_edge(codes: npt.NDArray[np.uint8], feature: int, code: int) -> int:
    """The bin itself, or the one below where no row lies above it: there is no edge after the last bin."""
    highest = int(codes[:, feature].max(initial=0))
    return max(0, min(code, highest - 1))


def _bin_edges(values: Matrix) -> Matrix:
    """Up to MAX_BINS - 1 thresholds between the values, by quantile where there are more values than that."""
    distinct = np.unique(values)
    if len(distinct) > MAX_BINS:
        distinct = np.unique(np.quantile(values, np.linspace(0, 1, MAX_BINS), method="nearest"))
    middles = (distinct[:-1].astype(np.float64) + distinct[1:]) / 2
    return np.unique(middles.astype(np.float32))


def _drawn(rng: np.random.Generator, count: int, limit: int) -> npt.NDArray[np.intp]:
    """`limit` of `count` indices without order, or all of them in order."""
    if limit >= count:
        return np.arange(count)
    return np.sort(rng.choice(count, limit, replace=False))


def _made_to_grow(values: Array, grows: list[bool]) -> Array:
    """A tree's table made non-decreasing along the questions on growing features: pairs that fall meet in the middle,
    a few rounds of it, and what still falls is raised.
    """
    table = values.reshape((2,) * len(grows)).copy()
    axes = [axis for axis, must in enumerate(grows) if must]
    for _ in range(4):
        for axis in axes:
            low, high = np.take(table, 0, axis=axis), np.take(table, 1, axis=axis)
            middle = (low + high) / 2
            falls = low > high
            table = np.stack([np.where(falls, middle, low), np.where(falls, middle, high)], axis=axis)
    for axis in axes:
        table = np.maximum.accumulate(table, axis=axis)
    return np.asarray(table.reshape(-1), dtype=np.float64)
