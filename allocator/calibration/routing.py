"""Where tokens go: how often each expert is chosen, with what weight, and together with which others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from allocator.calibration.data import Sequences
from allocator.calibration.model import StreamedModel
from allocator.calibration.visits import visit
from profiles.atomic import replacing
from profiles.errors import DataError
from profiles.loads import TokenLoad

Counts = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
Masses = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

DETAIL_SCHEMA = pa.schema(
    [
        ("layer", pa.int32()),
        ("expert", pa.int32()),
        ("tokens", pa.int64()),
        ("weight_mass", pa.float64()),
        ("chosen_with", pa.list_(pa.int64())),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerRouting:
    """One layer's router over some tokens.

    Attributes:
        tokens: how many tokens chose each expert, [E].
        weight_mass: the sum of their router weights, [E].
        chosen_with: tokens that chose both of two experts, [E, E], symmetric; the diagonal is `tokens`.
    """

    tokens: Counts
    weight_mass: Masses
    chosen_with: Counts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routing:
    """Every MoE layer's router over the same tokens."""

    layers: Mapping[int, LayerRouting]
    num_tokens: int
    source: str

    def loads(self) -> dict[int, TokenLoad]:
        """What `profiles.loads.write_trace` takes."""
        return {
            layer: TokenLoad(tokens_per_expert=tuple(routing.tokens.tolist()), source=f"{self.source}, layer {layer}")
            for layer, routing in self.layers.items()
        }

    def unused(self) -> dict[int, tuple[int, ...]]:
        """By layer, the experts that no token chose; layers without any are left out."""
        idle = {layer: tuple(np.flatnonzero(routing.tokens == 0).tolist()) for layer, routing in self.layers.items()}
        return {layer: experts for layer, experts in idle.items() if experts}

    def write_details(self, path: Path) -> None:
        """All three figures as Parquet, a row for each expert of each layer. DataError when it cannot be written."""
        rows = [
            (layer, expert, int(r.tokens[expert]), float(r.weight_mass[expert]), r.chosen_with[expert].tolist())
            for layer, r in self.layers.items()
            for expert in range(len(r.tokens))
        ]
        columns = dict(zip(DETAIL_SCHEMA.names, zip(*rows, strict=True), strict=True))
        try:
            with replacing(path) as temporary:
                pq.write_table(pa.table({name: list(c) for name, c in columns.items()}, DETAIL_SCHEMA), temporary)
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error


def layer_routing(index: Tensor, weights: Tensor, num_experts: int) -> LayerRouting:
    """Of a router's choices: index and weights [tokens, k]."""
    chosen = torch.zeros(index.shape[0], num_experts, dtype=torch.float64, device=index.device)
    mass = torch.zeros(num_experts, dtype=torch.float64, device=index.device)
    mass.index_add_(0, index.flatten(), weights.double().flatten())
    chosen.scatter_(1, index, 1.0)
    together = (chosen.T @ chosen).round().long()
    return LayerRouting(
        tokens=together.diagonal().cpu().numpy().copy(),
        weight_mass=mass.cpu().numpy(),
        chosen_with=together.cpu().numpy(),
    )


def trace(
    model: StreamedModel, sequences: Sequences, *, batch_size: int = 1, progress: Callable[[str], None] | None = None
) -> Routing:
    """Run the model over the sequences, one layer at a time, and count what its routers choose."""
    layers = {}
    for seen in visit(model, sequences.tokens, batch_size=batch_size):
        layers[seen.layer.index] = layer_routing(seen.index, seen.weights, model.shape.num_experts)
        if progress is not None:
            progress(f"layer {seen.layer.index}: {len(layers)} of {len(model.moe_layers)}")
    return Routing(layers=layers, num_tokens=sequences.tokens.numel(), source=sequences.source)
