"""Has a GPU, its clocks or its software changed since a model was fitted, and in what? A test over a few measurements.

What changed is told by what became slower: a lower clock slows each launch by the share of its time that the SMs' clock
decides, less bandwidth by DRAM's share, a worse compiler one scheme or tile. Each such explanation is a column: how
much log latency rises by it.

Repeated launches differ by heavy-tailed noise (a card at its power limit changes clocks), so the log ratios of measured
to expected become normal scores: what a normal variable has where Student's t with 2 degrees of freedom, of the ratios'
own robust scale, has the ratio. One wild launch is then never proof, two of one scheme are. The statistic is the
largest correlation of the scores with any column; its distribution when nothing changed is that of the largest of the
columns' correlated normal variables (drawn), which keeps the chance of any false name at `ALPHA`. Explanations are
added one by one until the rest is noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares
from scipy.stats import norm, t

from costmodel.calibration import FACTORS, CalibratedCore
from costmodel.columns import INDEX

Array = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float32]

ALPHA = 0.01
LEAST_DRIFT = 0.02
"""Smaller changes are corrected, and not called a drift: two sessions on one card differ by 1.4%, mean of launches."""
_NUM_DRAWS = 4000
_MAX_EFFECTS, _MAX_BEGINS = 5, 3
_NEARLY_AS_CLEAR = 0.9
_DEGREES = 2.0
"""Of the repeats' noise. 371 launches of one H200 measured again two hours later differ by 0.7% in the middle, 12% at
the ends: 1.4 degrees fit them best; with 2 there are as few false alarms as `ALPHA` promises, and little is missed
(2026-11-24).
"""
_LEAST_SCALE = 0.002
_OUTLIER = 4.0
"""Ratios further than so many scales off count as that far in an effect's standard error."""
_LEAST_FREE = 0.1
"""A column of which the chosen explanations leave less than this share says nothing more."""
_STEP = 1.05
"""The change of speed by which a column's sensitivity is found."""
_MIN_ROWS_OF_COLUMN = 2


class Cause(Enum):
    """What kind of thing changed."""

    EVERYTHING = "every launch"
    CLOCK = "SM clock"
    BANDWIDTH = "DRAM bandwidth"
    FLOOR = "launch floor"
    FAMILY = "family"
    MATH = "math"
    SCHEME = "scheme"
    TILE = "tile"


_PHYSICAL = {
    Cause.CLOCK: tuple(name for name in FACTORS if name not in ("dram_us", "launch_us")),
    Cause.BANDWIDTH: ("dram_us",),
    Cause.FLOOR: ("launch_us",),
}
"""The parts of the analytic core that such a change scales."""
_MATHS = ("bf16_share", "int8_share", "e4m3_share", "int4_share")
_SCHEME = ("least_weight_bits", "most_weight_bits", "grouped_share", "zero_point_share", *_MATHS)
_COLUMNS_OF = {
    Cause.SCHEME: _SCHEME,
    Cause.TILE: ("is_wgmma", "tile_m", "tile_n"),
    Cause.MATH: _MATHS,
    Cause.FAMILY: ("is_wgmma",),
}
"""Launches are of one group when they agree in these columns of the features. Narrow groups first: where all launches
of a math are of one scheme, it is the scheme that is known of.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Something that may have changed. `values` of the columns `_COLUMNS_OF[cause]` name the group; none otherwise."""

    cause: Cause
    name: str
    values: tuple[float, ...] = ()

    def column(self, X: Matrix, core: CalibratedCore, slope: float) -> Array:
        """How much log latency [R] rises when what is meant becomes slower by a factor of e."""
        if self.cause is Cause.EVERYTHING:
            return np.ones(len(X))
        if self.cause in _PHYSICAL:
            slower = core.scaled(dict.fromkeys(_PHYSICAL[self.cause], _STEP))
            return np.asarray(slope * (slower.log_us(X) - core.log_us(X)) / np.log(_STEP), dtype=np.float64)
        return self.members(X).astype(np.float64)

    def members(self, X: Matrix) -> npt.NDArray[np.bool_]:
        """The launches of the group [R]."""
        columns = X[:, [INDEX[name] for name in _COLUMNS_OF[self.cause]]]
        return np.asarray((columns == np.asarray(self.values, dtype=np.float32)).all(axis=1))

    def scaled_parts(self, log_factor: float) -> dict[str, float]:
        """The core's factors that a physical change multiplies; empty for the others."""
        return dict.fromkeys(_PHYSICAL.get(self.cause, ()), float(np.exp(log_factor)))

    def thresholds(self) -> list[tuple[str, float, bool]]:
        """A group as questions: (feature, threshold, whether its members lie above), at most five.

        Every column that it needs lies between two of the values that features take, half a step from the group's own.
        """
        of = dict(zip(_COLUMNS_OF[self.cause], self.values, strict=True))
        if self.cause is Cause.FAMILY:
            return [("is_wgmma", 0.5, of["is_wgmma"] > 0.5)]
        if self.cause is Cause.TILE:
            bounds = [(name, of[name] + side, side < 0) for name in ("tile_m", "tile_n") for side in (-0.5, 0.5)]
            return [("is_wgmma", 0.5, of["is_wgmma"] > 0.5), *bounds]
        math = [(name, 0.999, True) for name in _MATHS if of[name] == 1.0]
        if self.cause is Cause.MATH:
            return math
        return [
            *math,
            ("least_weight_bits", of["least_weight_bits"] - 0.5, True),
            ("most_weight_bits", of["most_weight_bits"] + 0.5, False),
            ("grouped_share", 0.5, of["grouped_share"] > 0.5),
            ("zero_point_share", 0.5, of["zero_point_share"] > 0.5),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """A change that was found: what became slower by `factor` (below 1: faster), its 95% interval, and the probability
    of so much if nothing more had changed.
    """

    explanation: Explanation
    factor: float
    low: float
    high: float
    p_value: float

    @property
    def is_drift(self) -> bool:
        """Whether it is more than what sessions differ by anyway."""
        return abs(self.factor - 1.0) >= LEAST_DRIFT

    def __str__(self) -> str:
        sign = 1.0 if self.factor > 1.0 else -1.0
        size, low, high = (100 * sign * (end - 1.0) for end in (self.factor, self.low, self.high))
        return (
            f"{self.explanation.name}: {size:.1f}% {'slower' if sign > 0 else 'faster'} (95%: {min(low, high):.1f}% to"
            f" {max(low, high):.1f}%; p = {self.p_value:.4f})"
        )


def explanations(X: Matrix, scheme_names: Sequence[str]) -> list[Explanation]:
    """What the launches X [R, F] could tell apart; `scheme_names` [R] ("" for mixed launches) are for its names."""
    found = [Explanation(cause=cause, name=cause.value) for cause in Cause if cause not in _COLUMNS_OF]
    seen: set[bytes] = set()
    for cause, columns in _COLUMNS_OF.items():
        values = X[:, [INDEX[name] for name in columns]]
        for row in np.unique(values, axis=0):
            members = (values == row).all(axis=1)
            is_new = members.tobytes() not in seen and _MIN_ROWS_OF_COLUMN <= members.sum() < len(X)
            if is_new and _is_group(cause, row, X[members]):
                seen.add(members.tobytes())
                names = [name for name, is_of in zip(scheme_names, members, strict=True) if is_of]
                found.append(Explanation(cause=cause, name=_name(cause, row, names), values=tuple(row.tolist())))
    return found


def _is_group(cause: Cause, values: Matrix, members: Matrix) -> bool:
    """Whether it is a scheme's or math's own launches: a mix is no group."""
    if cause is Cause.MATH:
        return bool(values.max() == 1.0)
    return cause is not Cause.SCHEME or bool((members[:, INDEX["num_slots"]] == 1).all())


def _name(cause: Cause, values: Matrix, scheme_names: Sequence[str]) -> str:
    if cause is Cause.FAMILY:
        return f"family {'wgmma' if values[0] else 'mma'}"
    if cause is Cause.MATH:
        return f"math {_MATHS[int(values.argmax())].removesuffix('_share')}"
    if cause is Cause.TILE:
        return f"tile {'wgmma' if values[0] else 'mma'} {values[1]:g}x{values[2]:g}"
    return f"scheme {scheme_names[0]}"


def find(
    X: Matrix,
    log_ratios: Array,
    scheme_names: Sequence[str],
    core: CalibratedCore,
    slope: float,
    *,
    alpha: float = ALPHA,
    seed: int = 0,
) -> list[Effect]:
    """The changes that log(measured / expected) [R] of the launches X [R, F] tell of, the clearest first; empty when
    they are noise. `core` and `slope` are of the model that expected them.
    """
    candidates = explanations(X, scheme_names)
    columns = np.stack([each.column(X, core, slope) for each in candidates], axis=1)
    chosen, p_values = _fewest(columns, log_ratios, alpha, seed)
    sizes, errors = _sizes(columns[:, chosen], log_ratios)
    return [
        Effect(
            explanation=candidates[index],
            factor=float(np.exp(size)),
            low=float(np.exp(size - 1.96 * error)),
            high=float(np.exp(size + 1.96 * error)),
            p_value=p_value,
        )
        for index, size, error, p_value in zip(chosen, sizes, errors, p_values, strict=True)
    ]


def _fewest(columns: Array, log_ratios: Array, alpha: float, seed: int) -> tuple[list[int], list[float]]:
    """The columns that explain the ratios, and their probabilities: of the ways to begin that are nearly as clear, the
    one that needs the fewest.
    """
    clearness, p_value = _clearness(columns, log_ratios, [], seed)
    if p_value > alpha:
        return [], []
    begins = np.argsort(-clearness)[:_MAX_BEGINS]
    ways = [
        _explained(columns, log_ratios, int(first), p_value, alpha, seed)
        for first in begins[clearness[begins] >= _NEARLY_AS_CLEAR * clearness.max()]
    ]
    return min(ways, key=lambda way: len(way[0]))


def _explained(
    columns: Array, log_ratios: Array, first: int, p_value: float, alpha: float, seed: int
) -> tuple[list[int], list[float]]:
    """`first`, and after it the clearest of what is left, one by one."""
    chosen, p_values = [first], [p_value]
    while len(chosen) < min(_MAX_EFFECTS, len(columns) // 4):
        clearness, p_value = _clearness(columns, log_ratios, chosen, seed)
        if p_value > alpha:
            break
        chosen.append(int(clearness.argmax()))
        p_values.append(p_value)
    return chosen, p_values


def _clearness(columns: Array, log_ratios: Array, chosen: list[int], seed: int) -> tuple[Array, float]:
    """How much each column says about what the chosen ones leave, and the probability of the most by chance."""
    taken = columns[:, chosen]
    sizes, _ = _sizes(taken, log_ratios)
    scores = _normal_scores(log_ratios - taken @ sizes)
    free = columns - taken @ (np.linalg.pinv(taken) @ columns)
    norms = np.linalg.norm(free, axis=0)
    usable = norms > _LEAST_FREE * np.linalg.norm(columns, axis=0)
    unit = np.where(usable, free / np.maximum(norms, 1e-12), 0.0)
    found = np.abs(scores @ unit)
    by_chance = np.abs(np.random.default_rng(seed).standard_normal((_NUM_DRAWS, len(scores))) @ unit).max(axis=1)
    return found, float((1 + (by_chance >= found.max()).sum()) / (1 + _NUM_DRAWS))


def _normal_scores(ratios: Array) -> Array:
    """Standard normal if the ratios are t-distributed around zero."""
    tails = t.sf(np.abs(ratios) / _scale(ratios), _DEGREES)
    return np.asarray(np.sign(ratios) * norm.isf(np.clip(tails, 1e-12, 0.5)), dtype=np.float64)


def _scale(ratios: Array) -> float:
    """Of the t distribution: from the median distance to the middle, so that what some launches share does not
    count.
    """
    distance = float(np.median(np.abs(ratios - np.median(ratios))))
    return max(distance / float(t.ppf(0.75, _DEGREES)), _LEAST_SCALE)


def _sizes(columns: Array, log_ratios: Array) -> tuple[Array, Array]:
    """Robust least squares of the ratios on the columns: sizes and their standard errors."""
    if not columns.shape[1]:
        return np.zeros(0), np.zeros(0)
    start = np.linalg.lstsq(columns, log_ratios, rcond=None)[0]
    scale = _scale(log_ratios - columns @ start)

    def residuals(sizes: Array) -> Array:
        return np.asarray((columns @ sizes - log_ratios) / scale)

    fit = least_squares(residuals, start, loss="cauchy")
    rest = np.clip(log_ratios - columns @ fit.x, -_OUTLIER * scale, _OUTLIER * scale)
    variance = float(np.square(rest).sum()) / max(1, len(rest) - len(start))
    return np.asarray(fit.x), np.sqrt(variance * np.diag(np.linalg.pinv(columns.T @ columns)))
