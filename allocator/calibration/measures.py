"""Measures of what one linear in one scheme costs, behind one interface: a Change goes in, a loss comes out.

All are weighted by routing: a Change's delta is the change of the MoE block's output, router weight included, at the
tokens that the expert gets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from torch import Tensor

from allocator.calibration.visits import Rows
from profiles.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Change:
    """One linear of one expert, quantised, all else as it was.

    Attributes:
        delta: change of the block's output at the expert's tokens, float32 [n, H]; computed when called.
        rows: which tokens, and how often each counts.
        gradient: of the block's output at those tokens, [n, H]; None unless the measure needs gradients.
        num_tokens: all tokens of the data.
        output_power: mean squared norm of the layer's output, the residual stream.
        estimate: of the sum of delta's squares over tokens, from statistics alone; computed when called.
        ahead: the measured KL divergence per token of the model's prediction when the layer's output changes by so much
            at these tokens; None unless the measure needs it.
    """

    delta: Callable[[], Tensor]
    rows: Rows
    gradient: Tensor | None
    num_tokens: int
    output_power: float
    estimate: Callable[[], float]
    ahead: Callable[[Tensor, Tensor], float] | None

    def squares(self) -> float:
        """Sum over the expert's tokens of the squared norm of the change."""
        return float(self.delta().double().square().sum()) * self.rows.multiplicity


class Measure(Protocol):
    """What a loss is."""

    @property
    def name(self) -> str:
        """As `--measure` and the sensitivity's metric have it."""

    @property
    def needs_gradients(self) -> bool:
        """A backward pass over the data."""

    @property
    def needs_ahead(self) -> bool:
        """A forward pass of the layers that follow, for every linear and scheme."""

    def loss(self, change: Change) -> float:
        """At least 0."""


@dataclass(frozen=True, slots=True)
class BlockL2:
    """MxMoE's: the L2 norm of the change of the block's output, per root token."""

    name: str = "block-l2"
    needs_gradients: bool = False
    needs_ahead: bool = False

    def loss(self, change: Change) -> float:
        """sqrt(sum of |delta|^2 / tokens)."""
        return float((change.squares() / change.num_tokens) ** 0.5)


@dataclass(frozen=True, slots=True)
class BlockRelative:
    """The same squared, since independent errors add in squares, over the power of the residual stream that it is added
    to, which makes layers comparable: what follows normalises that stream.
    """

    name: str = "block-relative"
    needs_gradients: bool = False
    needs_ahead: bool = False

    def loss(self, change: Change) -> float:
        """(sum of |delta|^2 / tokens) / mean |layer output|^2."""
        return change.squares() / change.num_tokens / change.output_power


@dataclass(frozen=True, slots=True)
class Fisher:
    """Second order estimate of the KL divergence: half the Fisher information along the change, each token for itself,
    from the gradient of one sampled likelihood (an expected Fisher, not the empirical one).
    """

    name: str = "fisher"
    needs_gradients: bool = True
    needs_ahead: bool = False

    def loss(self, change: Change) -> float:
        """0.5 * sum of (gradient . delta)^2 / tokens: nats per token."""
        assert change.gradient is not None
        along = (change.gradient.double() * change.delta().double()).sum(-1)
        return 0.5 * float(along.square().sum()) * change.rows.multiplicity / change.num_tokens


@dataclass(frozen=True, slots=True)
class Statistic:
    """BlockRelative estimated from second moments and weights alone; no quantised forward pass."""

    name: str = "statistic"
    needs_gradients: bool = False
    needs_ahead: bool = False

    def loss(self, change: Change) -> float:
        """As BlockRelative, from `change.estimate`."""
        return change.estimate() / change.num_tokens / change.output_power


@dataclass(frozen=True, slots=True)
class MeasuredKl:
    """The KL divergence itself: the layers that follow and the head, run for every linear and scheme."""

    name: str = "kl"
    needs_gradients: bool = False
    needs_ahead: bool = True

    def loss(self, change: Change) -> float:
        """Mean over all tokens of KL(exact || changed), nats; an expert's stand-ins count as they are few."""
        assert change.ahead is not None
        share = change.rows.multiplicity if change.rows.is_stand_in else 1.0
        return max(0.0, change.ahead(change.delta(), change.rows.tokens)) * share


MEASURES: Mapping[str, Measure] = MappingProxyType(
    {measure.name: measure for measure in (BlockL2(), BlockRelative(), Fisher(), Statistic(), MeasuredKl())}
)
"""Every measure by name."""


def measure_of(name: str) -> Measure:
    """SpecError lists the known ones."""
    if name not in MEASURES:
        raise SpecError(f"unknown measure {name!r}: known are {', '.join(MEASURES)}")
    return MEASURES[name]
