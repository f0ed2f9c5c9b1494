"""A model's sensitivities by one or several measures, in one pass over the data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from allocator.calibration.data import Sequences
from allocator.calibration.layer_losses import LayerNotes, Losses, LossOptions, layer_losses
from allocator.calibration.measured import Ahead, final_outputs
from allocator.calibration.measures import Measure
from allocator.calibration.model import StreamedModel
from allocator.calibration.partial import Partial
from allocator.calibration.visits import Visit, visit, visit_with_gradients
from allocator.sensitivity import SHARED_EXPERT, Sensitivity
from profiles.errors import SpecError

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibration:
    """What a calibration found.

    Attributes:
        sensitivities: by the measure's name.
        notes: by layer.
        seconds: of the layers done in this run.
        resumed: layers that an earlier, killed run had done.
    """

    sensitivities: Mapping[str, Sensitivity]
    notes: Mapping[int, LayerNotes]
    seconds: float
    resumed: tuple[int, ...]

    def report(self) -> dict[str, Any]:
        """For JSON: experts with too few tokens or none, and where GPTQ needed more damping, by layer."""
        return {
            str(layer): {
                "never_routed": notes.never_routed,
                "few_tokens": {str(expert): count for expert, count in notes.few_tokens.items()},
                "damping_raised": [list(entry) for entry in notes.damping_raised],
            }
            for layer, notes in sorted(self.notes.items())
        }


def calibrate(
    model: StreamedModel,
    sequences: Sequences,
    measures: Sequence[Measure],
    options: LossOptions,
    *,
    batch_size: int = 1,
    seed: int = 0,
    partial: Partial | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Losses of every linear of every expert in every scheme.

    Args:
        model: the checkpoint; a measure that runs the layers ahead wants them all kept.
        sequences: calibration data.
        measures: what a loss is; all are taken in one pass.
        options: schemes and quantiser.
        batch_size: sequences run at once.
        seed: of sampled tokens (measures with gradients).
        partial: where finished layers are kept and found.
        progress: is given a line after each layer.

    Raises:
        SpecError: nothing to measure.
    """
    if not measures or not options.schemes:
        raise SpecError("a calibration needs at least one measure and one scheme")
    final = None
    if any(measure.needs_ahead for measure in measures):
        final = final_outputs(model, sequences.tokens, batch_size=batch_size)
    losses: Losses = {}
    notes: dict[int, LayerNotes] = {}
    resumed: list[int] = []
    begun, spent = time.monotonic(), 0.0
    for layer, seen in _visits(model, sequences, measures, batch_size, seed, partial):
        known = None if partial is None else partial.read(layer)
        if known is not None:
            resumed.append(layer)
        else:
            assert seen is not None
            ahead = None if final is None else Ahead(model=model, layer=layer, outputs=seen.outputs, final=final)
            known = layer_losses(seen, measures, options, ahead)
            spent = time.monotonic() - begun
            if partial is not None:
                partial.write(layer, *known)
            del ahead, seen
        losses |= known[0]
        notes[layer] = known[1]
        if progress is not None:
            progress(_line(layer, len(notes), len(resumed), len(model.moe_layers), len(known[0]), spent))
    return Calibration(
        sensitivities={
            measure.name: _sensitivity(model, sequences, measure, options, seed, losses) for measure in measures
        },
        notes=notes,
        seconds=spent,
        resumed=tuple(resumed),
    )


def _visits(
    model: StreamedModel,
    sequences: Sequences,
    measures: Sequence[Measure],
    batch_size: int,
    seed: int,
    partial: Partial | None,
) -> Iterator[tuple[int, Visit | None]]:
    """Layers to do, and those that are done; without a forward pass when all are."""
    done = set() if partial is None else set(partial.layers())
    if done >= set(model.moe_layers):
        yield from ((layer, None) for layer in model.moe_layers)
        return
    if any(measure.needs_gradients for measure in measures):
        seen = visit_with_gradients(model, sequences.tokens, batch_size=batch_size, seed=seed)
    else:
        seen = visit(model, sequences.tokens, batch_size=batch_size)
    while (one := next(seen, None)) is not None:
        yield one.layer.index, one
        del one  # before the next layer is read


def _line(layer: int, done: int, resumed: int, total: int, changes: int, spent: float) -> str:
    if done == resumed:
        return f"layer {layer}: done by an earlier run ({done} of {total})"
    left = spent / (done - resumed) * (total - done)
    return (
        f"layer {layer}: {changes} linears x schemes ({done} of {total} layers, {spent:.0f} s, about {left:.0f} s left)"
    )


def _sensitivity(
    model: StreamedModel,
    sequences: Sequences,
    measure: Measure,
    options: LossOptions,
    seed: int,
    losses: Losses,
) -> Sensitivity:
    return Sensitivity.from_losses(
        {key: values[measure.name] for key, values in losses.items()},
        model=model.shape.name,
        metric=f"{measure.name} of {options.quantizer.name}",
        data=sequences.source,
        num_samples=sequences.tokens.numel(),
        seed=seed,
    )


def describe(notes: Mapping[int, LayerNotes]) -> list[str]:
    """Sentences for people, of what the notes say and what was done about it."""
    lines = []
    for layer, note in sorted(notes.items()):
        if note.never_routed:
            lines.append(
                f"layer {layer}: no token reached {_experts(note.never_routed)}; rounded to nearest, and their losses"
                " are those of half a token, at tokens of the layer that stand in"
            )
        if note.few_tokens:
            worst = min(note.few_tokens, key=lambda expert: note.few_tokens[expert])
            lines.append(
                f"layer {layer}: fewer tokens than inputs have features for {_experts(sorted(note.few_tokens))} (the"
                f" least, {note.few_tokens[worst]}, for {_experts([worst])}); more data makes GPTQ and losses surer"
            )
        if note.damping_raised:
            experts = sorted({expert for expert, _, _ in note.damping_raised})
            lines.append(f"layer {layer}: GPTQ needed more damping than asked for {_experts(experts)}")
    return lines


def _experts(experts: Sequence[int], most: int = 8) -> str:
    names = ["the shared expert" if expert == SHARED_EXPERT else str(expert) for expert in experts[:most]]
    return (
        ("expert " if len(experts) == 1 and experts[0] >= 0 else "experts " if experts[-1] >= 0 else "")
        + ", ".join(names)
        + (", ..." if len(experts) > most else "")
    )
