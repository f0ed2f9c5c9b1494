"""Whether losses add up: random allocations, their predicted loss against the measured one, and what correction pays.

Predictions: the sum of losses; the same with a weight for each layer, or for each scheme; and with products of layers'
sums (second order). Weights are fitted to measured allocations, without negative ones, by relative least squares, and
judged on allocations that they were not fitted to. No torch is needed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from scipy.optimize import nnls
from scipy.stats import rankdata

from allocator.sensitivity import SHARED_EXPERT, Sensitivity
from profiles.errors import SpecError
from profiles.models import LinearId, MoeShape
from profiles.schemes import QuantScheme

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

FOLDS = 5
WORTH = 0.002
"""A correction is used if it raises the held-out rank correlation by more than this over the simpler ones."""
MOST_PRODUCTS = 12
"""Second order takes products of layers' sums up to so many layers; beyond, of each layer with itself only."""
_BISECTIONS = 60
_LAYER_SPREAD = 1.5
"""Standard deviation of a layer's liking for a scheme, in units of the Gumbel noise of a linear's: allocations then
differ in where they spend bits, not only in which of many alike linears get them.
"""


class Correction(Enum):
    """How a prediction is made from losses; the simplest first."""

    NONE = "none"
    SCHEME_WEIGHTS = "scheme-weights"
    LAYER_WEIGHTS = "layer-weights"
    SECOND_ORDER = "second-order"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Blocks:
    """Linears, schemes, losses [B, S], stored bits [B, S] and parameters [B]."""

    ids: tuple[LinearId, ...]
    schemes: tuple[QuantScheme, ...]
    losses: Floats
    bits: Floats
    sizes: Floats

    @classmethod
    def of(cls, sensitivity: Sensitivity, shape: MoeShape) -> Blocks:
        """From a sensitivity. SpecError: some linear lacks a loss that another has."""
        ids, schemes, losses = sensitivity.arrays()
        if not np.isfinite(losses).all():
            raise SpecError("random allocations need a loss of every linear in every scheme")
        shapes = [shape.shared_gemm(i.linear) if i.expert == SHARED_EXPERT else shape.gemm(i.linear) for i in ids]
        bits = np.array([[scheme.bits_per_weight(k) for scheme in schemes] for _, k in shapes])
        sizes = np.array([float(n * k) for n, k in shapes])
        return cls(ids=ids, schemes=schemes, losses=losses, bits=bits, sizes=sizes)

    def average_bits(self, choice: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> float:
        """Stored bits per weight of one scheme index for each linear."""
        chosen = np.take_along_axis(self.bits, choice[:, None], axis=1)[:, 0]
        return float((chosen * self.sizes).sum() / self.sizes.sum())

    def assignment(self, choice: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> dict[LinearId, QuantScheme]:
        """As measure_allocations takes it."""
        return {block: self.schemes[int(index)] for block, index in zip(self.ids, choice, strict=True)}


Choice = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


def random_allocations(blocks: Blocks, targets: Sequence[float], seed: int) -> list[Choice]:
    """One for each target of average bits, as near to it as changing single linears comes.

    Each linear takes the scheme of greatest Gumbel noise + its layer's liking - price * bits; the price is found by
    bisection. SpecError: a target that no allocation reaches.
    """
    low, high = (blocks.average_bits(extreme) for extreme in (blocks.bits.argmin(1), blocks.bits.argmax(1)))
    rng = np.random.default_rng(seed)
    layers, of_layer = np.unique([block.layer for block in blocks.ids], return_inverse=True)
    drawn = []
    for target in targets:
        if not low <= target <= high:
            raise SpecError(f"{target} average bits: these schemes reach {low:.3f} to {high:.3f}")
        noise = rng.gumbel(size=blocks.losses.shape)
        noise += _LAYER_SPREAD * rng.standard_normal((len(layers), len(blocks.schemes)))[of_layer]
        drawn.append(_at_price(blocks, noise, target))
    return drawn


def _at_price(blocks: Blocks, noise: Floats, target: float) -> Choice:
    least, most = -1e4, 1e4
    for _ in range(_BISECTIONS):
        price = (least + most) / 2
        if blocks.average_bits((noise - price * blocks.bits).argmax(1)) > target:
            least = price
        else:
            most = price
    choice: Choice = (noise - most * blocks.bits).argmax(1)
    return choice


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fit:
    """Weights of one correction. weights: of `features`' columns, in their order."""

    correction: Correction
    weights: Floats

    def predict(self, blocks: Blocks, choices: Sequence[Choice]) -> Floats:
        """Loss of each allocation."""
        return np.asarray(features(blocks, choices, self.correction) @ self.weights, dtype=np.float64)

    def corrected(self, blocks: Blocks) -> Floats:
        """Losses [B, S] whose sums are the predictions. SpecError for second order, which is not a sum."""
        if self.correction is Correction.SECOND_ORDER:
            raise SpecError("a second order prediction is no sum of losses; it can only rank whole allocations")
        if self.correction is Correction.NONE:
            return np.asarray(blocks.losses * self.weights[0], dtype=np.float64)
        if self.correction is Correction.SCHEME_WEIGHTS:
            return np.asarray(blocks.losses * self.weights[None, :], dtype=np.float64)
        _, of_layer = np.unique([block.layer for block in blocks.ids], return_inverse=True)
        return np.asarray(blocks.losses * self.weights[of_layer][:, None], dtype=np.float64)


def features(blocks: Blocks, choices: Sequence[Choice], correction: Correction) -> Floats:
    """[allocations, columns]: sums of losses by what the correction weighs."""
    chosen = np.stack([np.take_along_axis(blocks.losses, c[:, None], axis=1)[:, 0] for c in choices])
    if correction is Correction.NONE:
        return np.asarray(chosen.sum(1, keepdims=True), dtype=np.float64)
    if correction is Correction.SCHEME_WEIGHTS:
        indices = np.stack(choices)
        return np.stack([(chosen * (indices == s)).sum(1) for s in range(len(blocks.schemes))], axis=1)
    _, of_layer = np.unique([block.layer for block in blocks.ids], return_inverse=True)
    sums = np.stack([chosen[:, of_layer == layer].sum(1) for layer in range(int(of_layer.max()) + 1)], axis=1)
    if correction is Correction.LAYER_WEIGHTS:
        return sums
    number = sums.shape[1]
    pairs = [(i, j) for i in range(number) for j in range(i, number) if number <= MOST_PRODUCTS or i == j]
    return np.concatenate((sums, np.stack([sums[:, i] * sums[:, j] for i, j in pairs], axis=1)), axis=1)


def fit(blocks: Blocks, choices: Sequence[Choice], measured: Floats, correction: Correction) -> Fit:
    """Weights of least squared relative error, none negative."""
    columns = features(blocks, choices, correction)
    scale = np.maximum(columns.max(0), 1e-300)
    relative = columns / scale / np.maximum(measured, 1e-300)[:, None]
    weights, _ = nnls(relative, np.ones(len(choices)), maxiter=100 * relative.shape[1])
    return Fit(correction=correction, weights=weights / scale)


def rank_correlation(predicted: Floats, measured: Floats) -> float:
    """Spearman's; 0 where all predictions or all measurements are alike."""
    if np.ptp(predicted) == 0 or np.ptp(measured) == 0:
        return 0.0
    return float(np.corrcoef(rankdata(predicted), rankdata(measured))[0, 1])


def held_out(blocks: Blocks, choices: Sequence[Choice], measured: Floats, correction: Correction, seed: int) -> Floats:
    """Each allocation's prediction by weights fitted to the other folds'."""
    folds = np.random.default_rng(seed).permutation(len(choices)) % FOLDS
    predicted = np.empty(len(choices))
    for fold in range(FOLDS):
        inside, outside = (np.flatnonzero(which).tolist() for which in (folds != fold, folds == fold))
        fitted = fit(blocks, [choices[i] for i in inside], measured[inside], correction)
        predicted[outside] = fitted.predict(blocks, [choices[i] for i in outside])
    return predicted


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Additivity:
    """Predicted against measured, for groups of allocations (a range of budgets, or one budget).

    Attributes:
        groups: by name, the indices of its allocations.
        avg_bits, measured_kl, perplexity: of each allocation.
        predicted: by correction, each allocation's held-out prediction.
        chosen: the correction that pays; fit: its weights, from all allocations.
        exact_perplexity: the model's own.
    """

    groups: Mapping[str, tuple[int, ...]]
    avg_bits: Floats
    measured_kl: Floats
    perplexity: Floats
    predicted: Mapping[Correction, Floats]
    chosen: Correction
    fit: Fit
    exact_perplexity: float

    def correlations(self, correction: Correction) -> dict[str, float]:
        """Spearman's, by group, against the measured KL."""
        return {
            name: rank_correlation(self.predicted[correction][list(indices)], self.measured_kl[list(indices)])
            for name, indices in self.groups.items()
        }

    def report(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "exact_perplexity": self.exact_perplexity,
            "chosen": self.chosen.value,
            "weights": self.fit.weights.tolist(),
            "spearman": {correction.value: self.correlations(correction) for correction in self.predicted},
            "spearman_with_perplexity": {
                name: rank_correlation(self.predicted[self.chosen][list(rows)], self.perplexity[list(rows)])
                for name, rows in self.groups.items()
            },
            "groups": {name: list(indices) for name, indices in self.groups.items()},
            "avg_bits": self.avg_bits.tolist(),
            "measured_kl": self.measured_kl.tolist(),
            "perplexity": self.perplexity.tolist(),
            "predicted": {correction.value: values.tolist() for correction, values in self.predicted.items()},
        }


def judge(
    blocks: Blocks,
    choices: Sequence[Choice],
    groups: Mapping[str, tuple[int, ...]],
    measured_kl: Floats,
    perplexity: Floats,
    exact_perplexity: float,
    seed: int,
) -> Additivity:
    """Fit every correction and choose the simplest that pays, by its mean held-out rank correlation over the groups."""
    predicted = {
        correction: features(blocks, choices, correction)[:, 0]
        if correction is Correction.NONE
        else held_out(blocks, choices, measured_kl, correction, seed)
        for correction in Correction
    }

    def score(correction: Correction) -> float:
        values = [
            rank_correlation(predicted[correction][list(rows)], measured_kl[list(rows)]) for rows in groups.values()
        ]
        return float(np.mean(values))

    chosen = Correction.NONE
    for correction in list(Correction)[1:]:
        if score(correction) > score(chosen) + WORTH:
            chosen = correction
    return Additivity(
        groups=groups,
        avg_bits=np.array([blocks.average_bits(choice) for choice in choices]),
        measured_kl=measured_kl,
        perplexity=perplexity,
        predicted=predicted,
        chosen=chosen,
        fit=fit(blocks, choices, measured_kl, chosen),
        exact_perplexity=exact_perplexity,
    )
