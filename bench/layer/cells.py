"""A cell: one layer of a model and one batch, with the routing and the tokens that all contenders get."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.layer.allocations import Allocation, Schemes
from bench.peers.routing import SIGMA
from profiles.models import MoeShape, model

COLUMNS = ("model", "tokens", "seed")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Given:
    """A layer's arguments, and how many rows each expert gets."""

    hidden: Tensor
    ids: Tensor
    weights: Tensor
    counts: tuple[int, ...]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """In MoELayer.forward's order."""
        return self.hidden, self.ids, self.weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One layer of a model under one batch."""

    model: str
    tokens: int
    seed: int = 0

    @property
    def key(self) -> tuple[Any, ...]:
        """The values of COLUMNS."""
        return (self.model, self.tokens, self.seed)

    @property
    def shape(self) -> MoeShape:
        """The model's."""
        return model(self.model)

    def counts(self) -> tuple[int, ...]:
        """Rows of each expert."""
        return _counts(self)

    def popularity(self) -> tuple[float, ...]:
        """How often the router takes each expert, as a log-probability; the same for every number of tokens."""
        return tuple(self._popularity()[0].tolist())

    def schemes(self, allocation: Allocation) -> Schemes:
        """Each linear's experts' schemes."""
        return _schemes(allocation, self.shape, self.popularity())

    def given(self, device: str) -> Given:
        """Skewed routing: expert popularity SIGMA * standard normal, as the peers' loads have it, each token's choices
        drawn without replacement; the router's weights are the softmax over them.
        """
        ids, chosen = self._ids()
        generator = torch.Generator().manual_seed(self.seed)
        hidden = torch.randn(self.tokens, self.shape.hidden_size, generator=generator).to(torch.bfloat16)
        return Given(
            hidden=hidden.to(device), ids=ids.to(device), weights=chosen.softmax(-1).to(device), counts=self.counts()
        )

    def _ids(self) -> tuple[Tensor, Tensor]:
        popularity, generator = self._popularity()
        noise = torch.empty(self.tokens, self.shape.num_experts).exponential_(generator=generator)
        chosen, ids = (popularity - noise.log()).topk(self.shape.top_k)  # Gumbel noise: draws from the softmax
        return ids, chosen

    def _popularity(self) -> tuple[Tensor, torch.Generator]:
        generator = torch.Generator().manual_seed(self.seed + 1)
        return SIGMA * torch.randn(self.shape.num_experts, generator=generator), generator


@functools.cache
def _counts(cell: Cell) -> tuple[int, ...]:
    ids, _ = cell._ids()
    return tuple(ids.flatten().bincount(minlength=cell.shape.num_experts).tolist())


@functools.cache
def _schemes(allocation: Allocation, shape: MoeShape, popularity: tuple[float, ...]) -> Schemes:
    return allocation.schemes(shape, popularity)
