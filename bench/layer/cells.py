"""A cell: one layer of a model and one batch, with the routing and the tokens that all contenders get."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
        return tuple(self._ids()[0].flatten().bincount(minlength=self.shape.num_experts).tolist())

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
        generator = torch.Generator().manual_seed(self.seed + 1)
        popularity = SIGMA * torch.randn(self.shape.num_experts, generator=generator)
        noise = torch.empty(self.tokens, self.shape.num_experts).exponential_(generator=generator)
        chosen, ids = (popularity - noise.log()).topk(self.shape.top_k)  # Gumbel noise: draws from the softmax
        return ids, chosen
