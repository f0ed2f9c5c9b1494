"""What the model predicts after a change, against what it predicts without: KL divergence and perplexity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from allocator.calibration.model import StreamedModel
from allocator.calibration.visits import advance, through


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ahead:
    """The layers after one, and the head.

    Attributes:
        model: keeps as many layers as fit, since all are run for every change.
        layer: the changed one.
        outputs: its output unchanged, in batches.
        final: the last layer's output of the unchanged model, in the same batches.
    """

    model: StreamedModel
    layer: int
    outputs: list[Tensor]
    final: list[Tensor]

    def __call__(self, delta: Tensor, tokens: Tensor) -> float:
        """Mean over all tokens of KL(exact || changed) when the output at `tokens` [n] changes by delta [n, H]."""
        total, first, num_tokens = 0.0, 0, sum(batch[..., 0].numel() for batch in self.outputs)
        for output, final in zip(self.outputs, self.final, strict=True):
            size = output[..., 0].numel()
            here = (tokens >= first) & (tokens < first + size)
            if bool(here.any()):
                hidden = output.flatten(0, 1).clone()
                hidden.index_add_(0, tokens[here] - first, delta[here].to(hidden.dtype))
                hidden = hidden.view_as(output)
                for index in range(self.layer + 1, self.model.num_layers):
                    hidden = advance(self.model, self.model.layer(index), hidden)
                total += divergence(self.model, final, hidden)
            first += size
        return total / num_tokens


def final_outputs(model: StreamedModel, tokens: Tensor, *, batch_size: int) -> list[Tensor]:
    """The last layer's output, in batches of sequences."""
    hidden = [model.embed(batch) for batch in torch.split(tokens, batch_size)]
    for index in range(model.num_layers):
        hidden = through(model, index, hidden)
    return hidden


def divergence(model: StreamedModel, exact: Tensor, changed: Tensor) -> float:
    """Sum over tokens of KL(exact || changed) in nats, from last layers' outputs [batch, length, H]."""
    total = 0.0
    with torch.no_grad():
        for a, b in zip(exact, changed, strict=True):  # a sequence at a time: logits are large
            p = model.logits(a.unsqueeze(0)).double().log_softmax(-1)
            q = model.logits(b.unsqueeze(0)).double().log_softmax(-1)
            total += float((p.exp() * (p - q)).sum())
    return total


def negative_log_likelihood(model: StreamedModel, hidden: Tensor, tokens: Tensor) -> float:
    """Sum over all tokens but each sequence's first, in nats. hidden: last layer's output; tokens: [batch, length]."""
    total = 0.0
    with torch.no_grad():
        for states, ids in zip(hidden, tokens.to(hidden.device), strict=True):
            scores = model.logits(states[None, :-1])[0].log_softmax(-1)
            total -= float(scores.gather(1, ids[1:, None]).double().sum())
    return total
