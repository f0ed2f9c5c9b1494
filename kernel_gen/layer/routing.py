"""Where each token's row stands in expert order, and the forms that a linear's experts read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kernel_gen.layouts import ActivationKind, activation_kind
from profiles.errors import SpecError
from profiles.schemes import QuantScheme


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routing:
    """Rows sorted by expert, on the GPU.

    offsets: int32 [E + 1]; expert e's rows are offsets[e]..offsets[e+1]. positions: int32 [T, top_k], the row of each
    token's choice; all are different, and a choice that is no expert of the layer stands at offsets[E] or behind.
    row_formats: int32 [T * top_k], each row's entry of a table of formats, where a step asked for it.
    """

    offsets: Tensor
    positions: Tensor
    row_formats: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """T * top_k."""
        return self.positions.numel()


def kinds_among(schemes: Sequence[QuantScheme], name: str) -> tuple[ActivationKind, ...]:
    """The forms of tokens that experts of these schemes read, each once. SpecError, naming the linear, where two cannot
    share a launch.
    """
    used = {activation_kind(scheme) for scheme in schemes}
    if {ActivationKind.INT4, ActivationKind.INT4_GROUP} <= used:
        raise SpecError(f"{name}: int4 activations per token and per group cannot share a launch")
    return tuple(kind for kind in ActivationKind if kind in used)
