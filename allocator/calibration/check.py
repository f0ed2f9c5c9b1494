"""The additivity check end to end: draw allocations, measure them, judge the predictions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from allocator.calibration.additivity import Additivity, Blocks, Choice, Correction, judge, random_allocations
from allocator.calibration.data import Sequences
from allocator.calibration.model import StreamedModel
from allocator.calibration.quantizer import Quantizer
from allocator.calibration.streams import measure_allocations
from allocator.sensitivity import SCHEMA_VERSION, Sensitivity
from profiles.errors import DataError, SpecError

LEAST_ALLOCATIONS = 10
STREAM_BYTES = 4 << 30
"""Of hidden states, a layer's inputs and outputs counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOptions:
    """What is drawn.

    Attributes:
        low, high: the range of average bits; a group of allocations spread evenly over it.
        number: allocations of the range.
        equal: budgets of which each gets a group of allocations of equal average bits.
        number_equal: allocations of each of those.
        at_once: allocations in memory together; None: as many as have hidden states of STREAM_BYTES.
        seed: of the drawing and of the folds.
    """

    low: float
    high: float
    number: int = 100
    equal: tuple[float, ...] = ()
    number_equal: int = 40
    at_once: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise SpecError(f"average bits from {self.low} to {self.high}: the first must be less")
        if self.number < LEAST_ALLOCATIONS or self.number_equal < LEAST_ALLOCATIONS:
            raise SpecError(f"a rank correlation needs at least {LEAST_ALLOCATIONS} allocations")
        if self.at_once is not None and self.at_once < 1:
            raise SpecError(f"{self.at_once} allocations at once: at least 1 is needed")


def check_additivity(
    model: StreamedModel,
    held_out: Sequences,
    calibration: Sequences,
    sensitivity: Sensitivity,
    quantizer: Quantizer,
    options: CheckOptions,
    *,
    batch_size: int = 8,
    progress: Callable[[str], None] | None = None,
) -> Additivity:
    """Random allocations, measured on held-out tokens and predicted from a sensitivity.

    Raises:
        SpecError: budgets that these schemes do not reach. DataError: the sensitivity is of another model.
    """
    if sensitivity.model != model.shape.name:
        raise DataError(f"the sensitivity is of {sensitivity.model}, the checkpoint is {model.shape.name}")
    blocks = Blocks.of(sensitivity, model.shape)
    choices, groups = draw(blocks, options)
    kl, perplexity, exact = [], [], 0.0
    each = 2 * held_out.tokens.numel() * model.shape.hidden_size * model.dtype.itemsize
    at_once = options.at_once or max(1, STREAM_BYTES // each)
    for first in range(0, len(choices), at_once):
        some = choices[first : first + at_once]
        if progress is not None:
            progress(f"allocations {first + 1} to {first + len(some)} of {len(choices)}")
        found = measure_allocations(
            model,
            held_out.tokens,
            calibration.tokens,
            [blocks.assignment(choice) for choice in some],
            quantizer,
            batch_size=batch_size,
            progress=progress,
        )
        kl += [one.kl for one in found.allocations]
        perplexity += [one.perplexity for one in found.allocations]
        exact = found.exact_perplexity
    return judge(blocks, choices, groups, np.array(kl), np.array(perplexity), exact, options.seed)


def draw(blocks: Blocks, options: CheckOptions) -> tuple[list[Choice], dict[str, tuple[int, ...]]]:
    """The allocations, and which group each is in."""
    targets = list(np.linspace(options.low, options.high, options.number))
    groups = {f"{options.low:g} to {options.high:g} bits": tuple(range(options.number))}
    for bits in options.equal:
        groups[f"{bits:g} bits"] = tuple(range(len(targets), len(targets) + options.number_equal))
        targets += [bits] * options.number_equal
    return random_allocations(blocks, targets, options.seed), groups


def corrected(sensitivity: Sensitivity, found: Additivity, blocks: Blocks) -> Sensitivity:
    """The sensitivity with the chosen correction's weights. SpecError where that is second order."""
    frame = sensitivity.frame()
    losses = found.fit.corrected(blocks)
    by_key = {
        (block.layer, block.expert, block.linear.value, scheme.name): losses[row, column]
        for row, block in enumerate(blocks.ids)
        for column, scheme in enumerate(blocks.schemes)
    }
    keys = zip(frame["layer"], frame["expert"], frame["linear"], frame["scheme"], strict=True)
    weighed = "" if found.chosen is Correction.NONE else f", {found.chosen.value}"
    return Sensitivity(
        frame.assign(
            loss=[by_key[key] for key in keys],
            metric=f"{sensitivity.metric}{weighed}",
            schema_version=SCHEMA_VERSION,
        )
    )
