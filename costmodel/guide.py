"""Which candidates to measure next, so that little GPU time finds nearly the best configuration of every launch.

A base (a fitted `LatencyModel`, else the analytic core) prices every candidate, and an `ErrorField` holds what is known
about its errors. A launch's expected regret is what its chosen configuration may lose to its closest rival. Measuring a
candidate makes differences of many launches surer, by the covariance with each: what it takes off the regrets' sum, for
each second that it costs (the kernel's compilation and the preparation of inputs counted), is what it is worth. Batches
are chosen greedily; after each, all is worked out anew.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import norm

from costmodel.calibration import CalibratedCore
from costmodel.error_field import ON_CALIBRATED_CORE, ON_CORE, ON_MODEL, ErrorField, Places, Posterior, Scales
from costmodel.model import LatencyModel
from profiles.errors import SpecError

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]

_MIN_ROWS_TO_CALIBRATE = 32
_MAX_LAUNCHES, _MAX_POOL = 400, 600
"""Launches whose regrets are added up, and candidates whose worth is worked out: those with the largest regrets."""
_MAX_DRAWN, _NUM_DRAWS = 1500, 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Launches times configurations.

    Attributes:
        features: of `costmodel.features`, R rows.
        launches: int [R], a number per launch; rows with the same one compete (`groups.launch_ids`).
        kernels: int [R], a number per kernel; rows with the same one need one compilation.
        inputs: int [R], a number per workload and load: rows with the same one are measured on the same activations.
        weights: int [R], a number per workload: rows with the same one are measured on the same weights.
    """

    features: pd.DataFrame
    launches: Codes
    kernels: Codes
    inputs: Codes
    weights: Codes

    def __post_init__(self) -> None:
        sizes = [len(each) for each in (self.launches, self.kernels, self.inputs, self.weights)]
        if any(size != len(self.features) for size in sizes):
            raise SpecError(
                f"candidates: {len(self.features)} rows of features, and {sizes} numbers; as many are needed"
            )

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds of one measurement, of a load's inputs, of a workload's weights, of one compilation. As recorded on an
    H200 with 16 cores (2026-11-24).
    """

    measure: float = 0.045
    inputs: float = 0.055
    weights: float = 0.2
    compile: float = 0.5

    def of(self, candidates: Candidates, rows: Codes, built: Mask) -> float:
        """Of measuring `rows` as one batch; `built` [R] marks the rows whose kernels are there."""

        def distinct(codes: Codes) -> int:
            return len(np.unique(codes))

        return (
            self.measure * len(rows)
            + self.inputs * distinct(candidates.inputs[rows])
            + self.weights * distinct(candidates.weights[rows])
            + self.compile * distinct(candidates.kernels[rows[~built[rows]]])
        )

    def each(self, candidates: Candidates, rows: Codes, chosen: Codes, built: Mask) -> Array:
        """Of each of `rows` if it is added to a batch of `chosen`, [len(rows)]."""

        def missing(codes: Codes) -> Mask:
            return ~np.isin(codes[rows], codes[chosen])

        seconds = self.measure + self.inputs * missing(candidates.inputs) + self.weights * missing(candidates.weights)
        return np.asarray(seconds + self.compile * (missing(candidates.kernels) & ~built[rows]), dtype=np.float64)

    def scaled(self, *, measuring: float, compiling: float) -> Costs:
        """Of a machine that measures and compiles in so many times the seconds."""
        return Costs(
            measure=self.measure * measuring,
            inputs=self.inputs * measuring,
            weights=self.weights * measuring,
            compile=self.compile * compiling,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Belief:
    """What is thought of every candidate.

    Attributes:
        log_us: [R], of microseconds: measured, else predicted; infinite where measuring failed.
        measured: [R].
        posterior: of the base's errors.
        chosen: [L] the row taken for each launch, in the launches' order.
        rivals: [L] the row that may beat it, or itself if there is none.
        gaps, deviations: [L] of log(rival / chosen): expected, and its standard deviation.
    """

    log_us: Array
    measured: Mask
    posterior: Posterior
    chosen: Codes
    rivals: Codes
    gaps: Array
    deviations: Array

    def regrets(self) -> Array:
        """Expected loss of each launch's choice against its closest rival, [L], in log units."""
        return expected_loss(self.gaps, self.deviations)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guide:
    """How candidates are chosen: from the predictions of `base`, or without one of the analytic core, whose parts are
    calibrated as soon as a few dozen rows are measured.
    """

    candidates: Candidates
    places: Places
    base_log_us: Array | None
    batch: int = 32
    costs: Costs = Costs()

    @classmethod
    def of(
        cls, candidates: Candidates, base: LatencyModel | None = None, *, batch: int = 32, costs: Costs | None = None
    ) -> Guide:
        """SpecError for an empty batch, or nothing to choose from."""
        if batch < 1:
            raise SpecError(f"a batch of {batch}: at least one measurement is needed")
        if not len(candidates):
            raise SpecError("no candidates to choose from")
        return cls(
            candidates=candidates,
            places=Places.of(candidates.features.to_numpy(dtype=np.float32)),
            base_log_us=None if base is None else np.log(base.predict(candidates.features)),
            batch=batch,
            costs=costs or Costs(),
        )

    def part(self, rows: Codes) -> Guide:
        """The guide over some of its candidates."""
        of, base = self.candidates, self.base_log_us
        candidates = Candidates(
            features=of.features.iloc[rows].reset_index(drop=True),
            launches=of.launches[rows],
            kernels=of.kernels[rows],
            inputs=of.inputs[rows],
            weights=of.weights[rows],
        )
        places = Places.of(candidates.features.to_numpy(dtype=np.float32))
        base_log_us = None if base is None else base[rows]
        return replace(self, candidates=candidates, places=places, base_log_us=base_log_us)

    def believe(self, measured: Mask, latency_us: Array) -> Belief:
        """From what was measured: `measured` [R]; `latency_us` [R] where it was (NaN: it failed)."""
        known = np.flatnonzero(measured & np.isfinite(latency_us))
        log_measured = np.log(latency_us[known])
        base_log_us, scales = self._base(known, log_measured)
        field = ErrorField(self.places, scales)
        posterior = field.given(known, log_measured - base_log_us[known])
        log_us = base_log_us + posterior.mean
        log_us[known] = log_measured
        log_us[measured & ~np.isfinite(latency_us)] = np.inf
        chosen = best_rows(log_us, self.candidates.launches)
        rivals, gaps, deviations = self._rivals(log_us, posterior, chosen)
        return Belief(
            log_us=log_us,
            measured=measured.copy(),
            posterior=posterior,
            chosen=chosen,
            rivals=rivals,
            gaps=gaps,
            deviations=deviations,
        )

    def next(self, belief: Belief) -> Codes:
        """The next rows to measure, at most `batch`, the most useful first; empty when no measurement would help."""
        launches = np.argsort(-belief.regrets(), kind="stable")[:_MAX_LAUNCHES]
        pool = np.unique(np.concatenate([belief.chosen[launches], belief.rivals[launches]]))
        regrets = belief.regrets()[self._launch_index()[pool]]
        pool = pool[np.argsort(-regrets, kind="stable")]
        pool = pool[~belief.measured[pool]][:_MAX_POOL]
        return self._greedy(belief, launches, pool) if len(pool) else pool

    def _greedy(self, belief: Belief, launches: Codes, pool: Codes) -> Codes:
        """One row after the other, each with the largest fall in the sum of regrets for its seconds.

        Values not yet known do not matter: how much a measurement explains of a difference depends on where it is
        taken.
        """
        posterior, gaps = belief.posterior, belief.gaps[launches]
        left = np.square(belief.deviations[launches])
        shared = posterior.between(belief.rivals[launches], pool) - posterior.between(belief.chosen[launches], pool)
        own = posterior.between(pool, pool)
        noise = posterior.field.scales.repeat**2
        built = self.built(belief.measured)
        taken: list[int] = []
        while len(taken) < min(self.batch, len(pool)):
            variance = np.maximum(own.diagonal(), 0.0) + noise
            after = np.sqrt(np.maximum(left[:, None] - np.square(shared) / variance, 0.0))
            fall = expected_loss(gaps, np.sqrt(left)).sum() - expected_loss(gaps[:, None], after).sum(axis=0)
            worth = fall / self.costs.each(self.candidates, pool, pool[taken], built)
            worth[taken] = 0.0
            best = int(worth.argmax())
            if worth[best] <= 0.0:
                break
            taken.append(best)
            explains, explained = shared[:, best] / np.sqrt(variance[best]), own[best] / np.sqrt(variance[best])
            left = np.maximum(left - np.square(explains), 0.0)
            shared = shared - explains[:, None] * explained[None, :]
            own = own - explained[:, None] * explained[None, :]
        return pool[taken]

    def expected_regret(self, belief: Belief, *, seed: int = 0) -> float:
        """How much slower the choices are than the best would be, a fraction, mean over launches: over draws of what
        the latencies may be, of some launches where there are many.
        """
        drawn, rows = self.draws(belief, seed=seed)
        index = np.unique(self.candidates.launches[rows], return_inverse=True)[1]
        least = np.full((int(index.max()) + 1, drawn.shape[1]), np.inf)
        np.minimum.at(least, index, drawn)
        is_chosen = np.isin(rows, belief.chosen)
        chosen = np.empty_like(least)
        chosen[index[is_chosen]] = drawn[is_chosen]
        return float(np.expm1(chosen - least).mean())

    def draws(self, belief: Belief, *, seed: int = 0) -> tuple[Array, Codes]:
        """Joint draws of log latency [rows, draws] of some launches' candidates, and their rows: all that did not fail,
        of as many launches as give _MAX_DRAWN rows, drawn by lot.
        """
        names, sizes = np.unique(self.candidates.launches, return_counts=True)
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(names))
        some = order[: max(1, int(np.searchsorted(np.cumsum(sizes[order]), _MAX_DRAWN)))]
        rows = np.flatnonzero(np.isin(self.candidates.launches, names[some]) & np.isfinite(belief.log_us))
        covariance = belief.posterior.between(rows, rows)
        covariance[np.diag_indices(len(rows))] += 1e-8
        normal = rng.standard_normal((len(rows), _NUM_DRAWS))
        return belief.log_us[rows, None] + np.linalg.cholesky(covariance) @ normal, rows

    def _base(self, known: Codes, log_us: Array) -> tuple[Array, Scales]:
        if self.base_log_us is not None:
            return self.base_log_us, ON_MODEL
        X = self.candidates.features
        if len(known) < _MIN_ROWS_TO_CALIBRATE:
            return np.log(X["latency_us"].to_numpy(dtype=np.float64)), ON_CORE
        matrix = X.to_numpy(dtype=np.float32)
        return CalibratedCore.fit(matrix[known], log_us, seed=0).log_us(matrix), ON_CALIBRATED_CORE

    def _rivals(self, log_us: Array, posterior: Posterior, chosen: Codes) -> tuple[Codes, Array, Array]:
        """Of each launch the row that its choice is most expected to lose to, their gap and its deviation."""
        index = self._launch_index()
        rows = np.setdiff1d(np.flatnonzero(np.isfinite(log_us)), chosen)
        against = chosen[index[rows]]
        variance = posterior.variance()
        spread = variance[rows] + variance[against] - 2.0 * posterior.paired(rows, against)
        gap, deviation = log_us[rows] - log_us[against], np.sqrt(np.maximum(spread, 0.0))
        worst = best_rows(-expected_loss(gap, deviation), index[rows])
        rivals, gaps, deviations = chosen.copy(), np.zeros(len(chosen)), np.zeros(len(chosen))
        at = index[rows[worst]]
        rivals[at], gaps[at], deviations[at] = rows[worst], gap[worst], deviation[worst]
        return rivals, gaps, deviations

    def built(self, measured: Mask) -> Mask:
        """The rows whose kernels are there, [R]: those of what was measured."""
        return np.isin(self.candidates.kernels, self.candidates.kernels[measured])

    def _launch_index(self) -> Codes:
        """Each row's place among the launches, [R]."""
        return np.asarray(np.unique(self.candidates.launches, return_inverse=True)[1], dtype=np.intp)


def expected_loss(gap: Array, deviation: Array) -> Array:
    """Of a choice whose rival is slower by `gap` +- `deviation` (log units): E max(0, -N(gap, deviation^2))."""
    spread = np.maximum(deviation, 1e-9)
    z = gap / spread
    return np.asarray(spread * (norm.pdf(z) - z * norm.sf(z)), dtype=np.float64)


def best_rows(values: Array, launches: Codes) -> Codes:
    """The row of the least value in each launch, in the launches' order."""
    order = np.lexsort((values, launches))
    return np.asarray(order[np.r_[True, np.diff(launches[order]) != 0]], dtype=np.intp)
