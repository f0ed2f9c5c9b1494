"""Every MoE layer in turn, with what its experts are given, and if asked how the output depends on what they return.

Forward: layer 0 first; in memory are one layer and the hidden states of all sequences. With gradients: first a forward
pass that writes every layer's input to temporary files, then the layers last to first, each run again with autograd.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from allocator.calibration.experts import Experts, by_expert
from allocator.calibration.model import LoadedLayer, StreamedModel
from allocator.calibration.spill import Spill
from allocator.sensitivity import SHARED_EXPERT

STAND_INS = 32
"""Tokens that stand in for those of an expert that none is routed to."""
STAND_IN_TOKENS = 0.5
"""How many tokens they count as together."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """The tokens of one expert. tokens [n]: indices; weights [n]: the router's; each counts `multiplicity` times."""

    tokens: Tensor
    weights: Tensor
    multiplicity: float
    is_stand_in: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertGroup:
    """Routed experts of a layer, or its shared experts as a group of one, with their tokens.

    Attributes:
        experts: the modules.
        first_id: LinearId.expert of the first; -1 of the shared experts.
        x: what the block is given, [T, H].
        tokens, weights, starts: rows of expert e are starts[e] to starts[e + 1].
    """

    experts: Experts
    first_id: int
    x: Tensor
    tokens: Tensor
    weights: Tensor
    starts: list[int]

    def count(self, expert: int) -> int:
        """Tokens that are routed to an expert."""
        return self.starts[expert + 1] - self.starts[expert]

    def rows(self, expert: int, most: int | None = None) -> Rows:
        """An expert's tokens, evenly thinned to `most`. An expert without any gets stand-ins: tokens of the layer,
        evenly spaced, at its mean router weight, that count as half a token together.
        """
        count = self.count(expert)
        if count == 0:
            used = min(STAND_INS, len(self.x))
            tokens = torch.linspace(0, len(self.x) - 1, used, device=self.tokens.device).long()
            weights = self.weights.mean().expand(used) if len(self.weights) else torch.ones(used, device=tokens.device)
            return Rows(tokens=tokens, weights=weights, multiplicity=STAND_IN_TOKENS / used, is_stand_in=True)
        used = count if most is None else min(most, count)
        picks = torch.arange(used, device=self.tokens.device) * count // used + self.starts[expert]
        return Rows(
            tokens=self.tokens[picks], weights=self.weights[picks], multiplicity=count / used, is_stand_in=False
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Visit:
    """One MoE layer and all tokens, in the order of the sequences.

    Attributes:
        layer: with its weights.
        x: what the MoE block is given, [T, H].
        index, weights: the router's choice, [T, k].
        shared_gate: what multiplies the shared experts' output, [T, 1]; None for 1.
        outputs: the layer's output, in batches of sequences [batch, length, H].
        gradient: of the negative log likelihood of sampled tokens by the block's output, [T, H]; None unless asked.
    """

    layer: LoadedLayer
    x: Tensor
    index: Tensor
    weights: Tensor
    shared_gate: Tensor | None
    outputs: list[Tensor]
    gradient: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return self.x.shape[0]

    def groups(self) -> list[ExpertGroup]:
        """The routed experts, then the shared ones if there are any."""
        assert self.layer.routed is not None
        experts = self.layer.routed
        tokens, slots, starts = by_expert(self.index, experts.num_experts)
        groups = [
            ExpertGroup(
                experts=experts,
                first_id=0,
                x=self.x,
                tokens=tokens,
                weights=self.weights[tokens, slots].float(),
                starts=starts,
            )
        ]
        if self.layer.shared is not None:
            everything = torch.arange(self.num_tokens, device=self.x.device)
            gate = self.shared_gate
            groups.append(
                ExpertGroup(
                    experts=self.layer.shared,
                    first_id=SHARED_EXPERT,
                    x=self.x,
                    tokens=everything,
                    weights=torch.ones_like(everything, dtype=torch.float32) if gate is None else gate[:, 0].float(),
                    starts=[0, self.num_tokens],
                )
            )
        return groups


@dataclass(slots=True, eq=False)
class Recorder:
    """Notes what a layer's routed experts are called with, while in a `with`."""

    experts: nn.Module
    calls: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    _hook: torch.utils.hooks.RemovableHandle | None = None

    def __enter__(self) -> Recorder:
        self._hook = self.experts.register_forward_pre_hook(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._hook is not None:
            self._hook.remove()

    def _note(self, _: nn.Module, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
        x, index, weights = arguments
        self.calls.append((x.detach(), index, weights.detach()))

    def visit(
        self, model: StreamedModel, layer: LoadedLayer, outputs: list[Tensor], gradient: Tensor | None = None
    ) -> Visit:
        """Everything noted, as one."""
        assert layer.block is not None
        x, index, weights = (torch.cat(parts) for parts in zip(*self.calls, strict=True))
        return Visit(
            layer=layer,
            x=x,
            index=index,
            weights=weights,
            shared_gate=model.adapter.shared_gate(layer.block, x),
            outputs=outputs,
            gradient=gradient,
        )


def visit(model: StreamedModel, tokens: Tensor, *, batch_size: int = 1) -> Iterator[Visit]:
    """MoE layers first to last. tokens: [sequences, length]."""
    hidden = [model.embed(batch) for batch in torch.split(tokens, batch_size)]
    for index in range(model.num_layers):
        layer = model.layer(index)
        if layer.routed is None:
            hidden = [advance(model, layer, batch) for batch in hidden]
            del layer
            continue
        with Recorder(layer.routed) as recorder:
            hidden = [advance(model, layer, batch) for batch in hidden]
        with torch.no_grad():
            seen = recorder.visit(model, layer, hidden)
        yield seen
        del seen, layer, recorder  # before the next layer is read: two would be in memory


def advance(model: StreamedModel, layer: LoadedLayer, hidden: Tensor) -> Tensor:
    """A layer's output, without autograd."""
    with torch.no_grad():
        return model.run(layer, hidden)


def through(model: StreamedModel, index: int, hidden: list[Tensor]) -> list[Tensor]:
    """A layer's outputs; the layer itself is let go, so that the next one's room is free."""
    layer = model.layer(index)
    return [advance(model, layer, batch) for batch in hidden]


def visit_with_gradients(
    model: StreamedModel, tokens: Tensor, *, batch_size: int = 1, seed: int = 0
) -> Iterator[Visit]:
    """MoE layers last to first, with gradients.

    The loss is the negative log likelihood, summed over positions, of tokens drawn from the model's own prediction, so
    that the mean of squared directional derivatives is the Fisher information (not the empirical one).
    """
    with TemporaryDirectory(prefix="bitile-") as folder:
        yield from _backwards(model, tokens, batch_size, seed, Spill(Path(folder)))


def _backwards(model: StreamedModel, tokens: Tensor, batch_size: int, seed: int, inputs: Spill) -> Iterator[Visit]:
    hidden = [model.embed(batch) for batch in torch.split(tokens, batch_size)]
    for index in range(model.num_layers):
        inputs.put(index, hidden)
        hidden = through(model, index, hidden)
    generator = torch.Generator(device=model.device).manual_seed(seed)
    upstream = [_head_gradient(model, batch, generator) for batch in hidden]
    del hidden
    for index in reversed(range(model.num_layers)):
        layer = model.layer(index)
        steps = [_Backward(model, layer, batch.to(model.device)) for batch in inputs.take(index)]
        if layer.routed is None:
            upstream = [step.run(gradient) for step, gradient in zip(steps, upstream, strict=True)]
            del steps, layer
            continue
        with Recorder(layer.routed) as recorder:
            upstream = [step.run(gradient) for step, gradient in zip(steps, upstream, strict=True)]
        block_gradients = torch.cat([step.block_gradient for step in steps])
        with torch.no_grad():
            seen = recorder.visit(model, layer, [step.output for step in steps], block_gradients)
        del steps
        yield seen
        del seen, layer, recorder, block_gradients


class _Backward:
    """One batch through one layer and back."""

    def __init__(self, model: StreamedModel, layer: LoadedLayer, hidden: Tensor) -> None:
        self._model, self._layer, self._hidden = model, layer, hidden
        self.output = self.block_gradient = torch.empty(0)

    def run(self, upstream: Tensor) -> Tensor:
        """The gradient by the layer's input from that by its output."""
        hidden = self._hidden.requires_grad_(True)
        block_outputs: list[Tensor] = []
        hook = None
        if self._layer.block is not None:
            hook = self._layer.block.register_forward_hook(lambda _, __, output: block_outputs.append(_first(output)))
        with torch.enable_grad():
            output = self._model.run(self._layer, hidden)
            gradients = torch.autograd.grad(output, [hidden, *block_outputs], upstream)
        if hook is not None:
            hook.remove()
            self.block_gradient = gradients[1].reshape(-1, gradients[1].shape[-1])
        self.output = output.detach()
        return gradients[0]


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _head_gradient(model: StreamedModel, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Of each sequence by itself: the logits of one take 4 bytes x length x vocabulary, some copies of them more."""
    gradients = []
    for sequence in torch.split(hidden, 1):
        states = sequence.detach().requires_grad_(True)
        with torch.enable_grad():
            log_probs = model.logits(states)[0].log_softmax(-1)
            with torch.no_grad():
                drawn = torch.multinomial(log_probs.exp(), 1, generator=generator)
            (gradient,) = torch.autograd.grad(-log_probs.gather(1, drawn).sum(), states)
        gradients.append(gradient)
    return torch.cat(gradients)
