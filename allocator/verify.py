"""Finalists measured: what whole allocations do to the model (KL, perplexity), beside what was predicted, re-ranked."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scipy.stats import spearmanr

from allocator.allocation import Allocation
from profiles.atomic import replacing
from profiles.errors import DataError, SpecError

if TYPE_CHECKING:
    from allocator.calibration.data import Sequences
    from allocator.calibration.model import StreamedModel
    from allocator.calibration.quantizer import Quantizer

KIND = "bitile verification"
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Finalist:
    """One allocation, predicted and measured.

    Attributes:
        name: what it is called in tables.
        avg_weight_bits: stored bits per weight.
        predicted_loss: the sum of its losses; None of one that no sensitivity prices.
        mean_kl: measured, KL(model || quantised) per token in nats.
        perplexity: measured, per token.
        latency_us: predicted by scenario.
    """

    name: str
    avg_weight_bits: float
    predicted_loss: float | None
    mean_kl: float
    perplexity: float
    latency_us: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Finalists, least measured KL first.

    Attributes:
        finalists: measured allocations.
        exact_perplexity: the model's own.
        rank_correlation: Spearman's of predicted loss and measured KL; None of fewer than three.
        data, quantizer: what it was measured on and with.
    """

    finalists: tuple[Finalist, ...]
    exact_perplexity: float
    rank_correlation: float | None
    data: str
    quantizer: str

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        return {"kind": KIND, "schema_version": SCHEMA_VERSION, **asdict(self)}

    def write(self, path: str | os.PathLike[str]) -> None:
        """Put it in the place of a JSON file, whole or not at all. DataError when it cannot be written."""
        try:
            with replacing(Path(path)) as temporary:
                temporary.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Verification:
        """From JSON. DataError: missing, truncated, foreign or of another version."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not a readable verification ({error})") from error
        if not isinstance(content, dict) or (content.pop("kind", None), content.pop("schema_version", None)) != (
            KIND,
            SCHEMA_VERSION,
        ):
            raise DataError(f"{path}: not a verification of schema version {SCHEMA_VERSION}")
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
