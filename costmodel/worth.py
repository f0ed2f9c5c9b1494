"""Is it worth tuning? What measuring would gain over the configurations that are chosen without it, and what it takes.

Both are read off what a `Guide` believes before the next measurement. The gain is over joint draws of all latencies, so
that errors which launches share do not average out. The effort is found by rehearsal: the guide is given values drawn
from its own belief until it would stop.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from costmodel.guide import Belief, Guide, best_rows

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.intp]
REACH = 1.15
"""How much further than its draws say a gain's interval reaches, from what is expected: the error field's scales are of
other launches than those asked about. By replay of 258 questions on two of an H200's tables (2026-11-24).
"""
_MOST_REHEARSING = 150
"""Launches: enough for what they share; hundreds more would take minutes to rehearse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """How much less time the best configurations take than the default ones: fractions, mean over launches.

    `low` and `high` hold the gain with probability `confidence`.
    """

    expected: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """What guided measuring is expected to take until it stops."""

    num_measurements: int
    seconds: float


def core_picks(guide: Guide) -> Codes:
    """The row that the analytic core chooses for each launch, [L]: the default without a fitted model."""
    core_us = guide.candidates.features["latency_us"].to_numpy(dtype=np.float64)
    return best_rows(core_us, guide.candidates.launches)


def gain_over(guide: Guide, belief: Belief, default: Codes, *, confidence: float = 0.9, seed: int = 0) -> Gain:
    """The gain of the best candidates over `default` (a row of each launch, [L]); its interval reaches `REACH` times as
    far from the expected gain as the draws of it.

    It is what an exhaustive search would gain; guided measuring ends within its goal of that.
    """
    drawn, rows = guide.draws(belief, seed=seed)
    launches = guide.candidates.launches
    names, index = np.unique(launches[rows], return_inverse=True)
    least = np.full((len(names), drawn.shape[1]), np.inf)
    np.minimum.at(least, index, drawn)
    is_default = np.isin(rows, default)
    have_default = np.isin(np.arange(len(names)), index[is_default])
    of_default = np.zeros_like(least)
    of_default[index[is_default]] = drawn[is_default]
    gains = -np.expm1(least - of_default)[have_default]
    means = gains.mean(axis=0)
    # Only some launches are drawn where there are many: which ones is a matter of luck too.
    unseen = 1.0 - len(names) / len(np.unique(launches))
    luck = gains.mean(axis=1).std() * np.sqrt(unseen / len(gains))
    means = means + luck * np.random.default_rng(seed).standard_normal(len(means))
    tail = (1.0 - confidence) / 2.0
    expected = float(gains.mean())
    low, high = expected + REACH * (np.quantile(means, [tail, 1.0 - tail]) - expected)
    return Gain(expected=expected, low=max(0.0, float(low)), high=float(high), confidence=confidence)


def rehearse(guide: Guide, *, goal: float, max_measurements: int, seed: int = 0) -> Effort:
    """Guided measuring from nothing measured, with made-up values that the belief holds likely, until the expected
    regret is at most `goal`. The guide's costs price it. Of many launches only some rehearse, for all.
    """
    launches = np.unique(guide.candidates.launches)
    rng = np.random.default_rng(seed)
    some = rng.permutation(launches)[:_MOST_REHEARSING]
    share = len(some) / len(launches)
    guide = guide.part(np.flatnonzero(np.isin(guide.candidates.launches, some)))
    measured, latency_us = np.zeros(len(guide.candidates), dtype=np.bool_), np.full(len(guide.candidates), np.nan)
    count, seconds = 0, 0.0
    while True:
        belief = guide.believe(measured, latency_us)
        batch = guide.next(belief)[: max(0, int(np.ceil(max_measurements * share)) - count)]
        if not len(batch) or (count and guide.expected_regret(belief, seed=seed) <= goal):
            return Effort(num_measurements=min(max_measurements, round(count / share)), seconds=seconds / share)
        seconds += guide.costs.of(guide.candidates, batch, guide.built(measured))
        covariance = belief.posterior.between(batch, batch)
        covariance[np.diag_indices(len(batch))] += 1e-10
        noise = np.linalg.cholesky(covariance) @ rng.standard_normal(len(batch))
        latency_us[batch] = np.exp(belief.log_us[batch] + noise)
        measured[batch] = True
        count += len(batch)
