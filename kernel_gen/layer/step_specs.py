"""Which kernel each step of a layer is: from sizes and forms alone, so that it can be compiled without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kernel_gen.kernels.steps.spec import (
    CombineSpec,
    CountSpec,
    GatherSpec,
    PlaceSpec,
    SwigluSpec,
    row_shape,
)
from kernel_gen.layer.routing import kinds_among
from kernel_gen.layouts import X_K_MULTIPLE, ActivationKind, round_up
from profiles.errors import UnsupportedError
from profiles.schemes import QuantScheme

COMBINE_THREADS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSpecs:
    """The steps around two linears, [E, 2 * intermediate, hidden] and [E, hidden, intermediate].

    first, second: the forms of tokens that the linears' experts read. overlap: each is launched while the kernel
    before it ends.
    """

    arch: str
    overlap: bool
    hidden: int
    intermediate: int
    first: tuple[ActivationKind, ...]
    second: tuple[ActivationKind, ...]

    def __post_init__(self) -> None:
        """UnsupportedError: rows longer than a CTA holds."""
        for columns, kinds in ((self.hidden, self.first), (self.intermediate, self.second)):
            _shape(columns, kinds)

    @classmethod
    def of(
        cls,
        *,
        arch: str,
        overlap: bool,
        hidden: int,
        intermediate: int,
        gate_up: Sequence[QuantScheme],
        down: Sequence[QuantScheme],
    ) -> StepSpecs:
        """For experts of these schemes. SpecError where two of a linear's cannot share a launch."""
        return cls(
            arch=arch,
            overlap=overlap,
            hidden=hidden,
            intermediate=intermediate,
            first=kinds_among(gate_up, "gate_up"),
            second=kinds_among(down, "down"),
        )

    @property
    def by_row(self) -> bool:
        """Whether a row's form must be looked up between the linears."""
        return len(self.second) > 1

    @property
    def quantized(self) -> tuple[ActivationKind, ...]:
        """The second linear's forms, but for bf16."""
        return tuple(kind for kind in self.second if kind is not ActivationKind.BF16)

    def count(self, *, id_bits: int) -> CountSpec:
        """First launch of `route`."""
        return CountSpec(arch=self.arch, overlap=self.overlap, id_bits=id_bits)

    def place(self, *, id_bits: int) -> PlaceSpec:
        """Second launch of `route`."""
        return PlaceSpec(arch=self.arch, overlap=self.overlap, id_bits=id_bits)

    def gather(self, *, top_k: int, id_bits: int, ranks: bool, for_swiglu: bool, aligned: bool = True) -> GatherSpec:
        """ranks: it works out the places itself. for_swiglu: it notes each row's form for the next step."""
        threads, vectors = _shape(self.hidden, self.first)
        return GatherSpec(
            arch=self.arch,
            overlap=self.overlap,
            threads=threads,
            vectors=vectors,
            kinds=self.first,
            aligned=aligned,
            top_k=top_k,
            id_bits=id_bits,
            ranks=ranks,
            writes_formats=for_swiglu and self.by_row,
        )

    def swiglu(self, *, aligned: bool = True) -> SwigluSpec:
        """Of the first linear's output."""
        return self._swiglu(self.second, aligned=aligned, gated=True)

    def quantize(self, *, aligned: bool = True) -> SwigluSpec | None:
        """Of the product that an epilogue left; None where the second linear reads it as it is."""
        return self._swiglu(self.quantized, aligned=aligned, gated=False) if self.quantized else None

    def combine(self, *, top_k: int, weight_bits: int, aligned: bool = True) -> CombineSpec:
        """weight_bits: of the router's weights, 16 or 32."""
        return CombineSpec(
            arch=self.arch,
            overlap=self.overlap,
            threads=COMBINE_THREADS,
            top_k=top_k,
            weight_bits=weight_bits,
            aligned=aligned,
        )

    def _swiglu(self, kinds: tuple[ActivationKind, ...], *, aligned: bool, gated: bool) -> SwigluSpec:
        threads, vectors = _shape(self.intermediate, self.second)
        return SwigluSpec(
            arch=self.arch,
            overlap=self.overlap,
            threads=threads,
            vectors=vectors,
            kinds=kinds,
            aligned=aligned,
            gated=gated,
            by_row=self.by_row,
        )


def _shape(columns: int, kinds: tuple[ActivationKind, ...]) -> tuple[int, int]:
    """(threads, vectors) of a CTA that holds a row, padded as its forms are."""
    padded = max(round_up(columns, X_K_MULTIPLE[kind]) for kind in kinds)
    shape = row_shape(padded)
    if shape is None:
        raise UnsupportedError("the fused steps", [f"rows of {columns} values: no CTA holds one"])
    return shape
