"""Finalists measured: what whole allocations do to the model (KL, perplexity), beside what was predicted, re-ranked."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import spearmanr

from allocator.allocation import Allocation
from allocator.json_file import JsonKind
from allocator.latencies import Latencies
from profiles.errors import DataError, SpecError

if TYPE_CHECKING:
    from allocator.calibration.data import Sequences
    from allocator.calibration.model import StreamedModel
    from allocator.calibration.quantizer import Quantizer

FILE = JsonKind(kind="bitile verification", version=2, name="a verification", file_name="verification")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finalist:
    """One allocation, predicted and measured.

    Attributes:
        name: what it is called in tables.
        avg_weight_bits: stored bits per weight.
        predicted_loss: the sum of its losses; None of one that no sensitivity prices.
        mean_kl: measured, KL(model || quantised) per token in nats.
        perplexity: measured, per token.
        latency_us: by scenario, as the allocation has it.
        launch_us: by scenario, predicted for its mixed launches; empty where nothing was.
        measured_us: by scenario, its launches on a GPU; empty where they did not run.
    """

    name: str
    avg_weight_bits: float
    predicted_loss: float | None
    mean_kl: float
    perplexity: float
    latency_us: Mapping[str, float]
    launch_us: Mapping[str, float] = field(default_factory=dict)
    measured_us: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Finalists, best first: by measured KL, or as `ranked` says.

    Attributes:
        finalists: measured allocations.
        exact_perplexity: the model's own.
        rank_correlation: Spearman's of predicted loss and measured KL; None of fewer than three.
        data, quantizer: what it was measured on and with.
        latency_note: where measured latencies are from, or why there are none.
    """

    finalists: tuple[Finalist, ...]
    exact_perplexity: float
    rank_correlation: float | None
    data: str
    quantizer: str
    latency_note: str = "no latencies were measured"

    def ranked(self, limits_us: Mapping[str, float], loss_weight: float = 1.0) -> Verification:
        """Those that hold the latency limits first; among each, least KL^r * T^(1-r) with r = loss_weight. T is the
        mean over scenarios of latency over the fastest finalist's.

        Measured latencies count where every finalist has them, else predicted ones of launches, else the allocations'
        own. SpecError: a loss weight that is not from 0 to 1.
        """
        if not 0 <= loss_weight <= 1:
            raise SpecError(f"the loss weight must be from 0 to 1, not {loss_weight}")
        latencies = self.latencies
        fastest = {name: min(us[name] for us in latencies) for name in set.intersection(*(set(us) for us in latencies))}

        def key(index: int) -> tuple[bool, float]:
            us = latencies[index]
            breaks = any(us.get(name, np.inf) > limit for name, limit in limits_us.items())
            relative = float(np.mean([us[name] / least for name, least in fastest.items()])) if fastest else 1.0
            return breaks, self.finalists[index].mean_kl ** loss_weight * relative ** (1 - loss_weight)

        order = sorted(range(len(self.finalists)), key=key)
        return replace(self, finalists=tuple(self.finalists[index] for index in order))

    @property
    def latencies(self) -> list[Mapping[str, float]]:
        """What finalists are compared by, of one kind for all: measured, predicted of launches, or their own."""
        for kind in ("measured_us", "launch_us"):
            found = [getattr(one, kind) for one in self.finalists]
            if all(found):
                return found
        return [one.latency_us for one in self.finalists]

    def with_latencies(
        self,
        allocations: Mapping[str, Allocation],
        launch_us: Mapping[str, Mapping[str, float]],
        measured: Latencies | None,
        note: str,
    ) -> Verification:
        """The same finalists with what their launches are predicted to take, and took."""
        return replace(
            self,
            finalists=tuple(
                replace(
                    one,
                    launch_us=dict(launch_us.get(one.name, {})),
                    measured_us={} if measured is None else dict(measured.of(allocations[one.name]) or {}),
                )
                for one in self.finalists
            ),
            latency_note=note,
        )

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        return FILE.mark(asdict(self))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Put it in the place of a JSON file, whole or not at all. DataError when it cannot be written."""
        FILE.write(path, asdict(self))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Verification:
        """From JSON. DataError: missing, truncated, foreign or of another version."""
        content = FILE.read(path)
        try:
            return cls(**(content | {"finalists": tuple(Finalist(**row) for row in content["finalists"])}))
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: a verification lacks or has a field too many ({error})") from error


def verify(
    model: StreamedModel,
    held_out: Sequences,
    calibration: Sequences,
    allocations: Mapping[str, Allocation],
    quantizer: Quantizer,
    *,
    batch_size: int = 8,
    progress: Callable[[str], None] | None = None,
) -> Verification:
    """Measure allocations on held-out tokens and rank them by it.

    Args:
        model: the checkpoint.
        held_out: what is measured on.
        calibration: what the quantiser learns from.
        allocations: by name; of this model.
        quantizer: how weights become codes.
        batch_size: sequences at once.
        progress: is given a line after each layer.

    Raises:
        SpecError: none to measure. DataError: one is of another model.
    """
    from allocator.calibration.streams import measure_allocations

    if not allocations:
        raise SpecError("no allocation to verify")
    for name, allocation in allocations.items():
        if allocation.model != model.shape.name:
            raise DataError(f"{name} is an allocation of {allocation.model}, the checkpoint is {model.shape.name}")
    measured = measure_allocations(
        model,
        held_out.tokens,
        calibration.tokens,
        [allocation.assignment for allocation in allocations.values()],
        quantizer,
        batch_size=batch_size,
        progress=progress,
    )
    finalists = [
        Finalist(
            name=name,
            avg_weight_bits=allocation.avg_weight_bits,
            predicted_loss=allocation.predicted_loss,
            mean_kl=found.kl,
            perplexity=found.perplexity,
            latency_us=dict(allocation.predicted_latency_us),
        )
        for (name, allocation), found in zip(allocations.items(), measured.allocations, strict=True)
    ]
    return Verification(
        finalists=tuple(sorted(finalists, key=lambda one: one.mean_kl)),
        exact_perplexity=measured.exact_perplexity,
        rank_correlation=rank_correlation(finalists),
        data=held_out.source,
        quantizer=quantizer.name,
    )


def rank_correlation(finalists: Sequence[Finalist]) -> float | None:
    """Spearman's of predicted loss and measured KL; None where it says nothing."""
    pairs = [(one.predicted_loss, one.mean_kl) for one in finalists if one.predicted_loss is not None]
    predicted, measured = [p for p, _ in pairs], [m for _, m in pairs]
    if len(pairs) < 3 or len(set(predicted)) == 1 or len(set(measured)) == 1:
        return None
    return float(spearmanr(predicted, measured).statistic)
