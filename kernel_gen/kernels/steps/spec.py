"""What one compiled step is: a step's parameters and a target. Importable without CUTLASS."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from kernel_gen.kernels.spec import can_overlap, module_digest
from kernel_gen.layouts import ActivationKind

MAX_EXPERTS = 1024
MAX_TOP_K = 32
MAX_THREADS = 1024
VECTOR = 8
"""bf16 values a thread loads at once, 16 bytes."""
CHUNK = 1024
"""Expert ids that one CTA of `count` and `place` takes."""
FORMAT_CODE = {kind: code for code, kind in enumerate(ActivationKind)}
"""A form in a table of formats, int32 an expert: the low byte is the first GEMM's, the next the second's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSpec:
    """One kernel to compile for `arch`, such as sm_90a. What subclasses add is compiled in; sizes are arguments.

    `overlap`: the kernel is launched while the one before it ends, and waits for that one's results itself
    (programmatic dependent launch, sm_90 on).
    """

    arch: str
    overlap: bool = False
    module: ClassVar[str]

    def __post_init__(self) -> None:
        if self.overlap and not can_overlap(self.arch):
            raise ValueError(f"overlap: {self.arch} has no programmatic dependent launch, sm_90 and later do")

    @property
    def label(self) -> str:
        """Readable: the step and its parameters."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return "/".join([type(self).__name__, *(f"{name}={_plain(value)}" for name, value in values.items())])

    @property
    def name(self) -> str:
        """A C identifier that only this spec has."""
        return "bitile_step_" + hashlib.sha256(self.label.encode()).hexdigest()[:16]

    def fingerprint(self) -> str:
        """Changes when the spec or any source that decides its machine code changes."""
        return hashlib.sha256(f"{self.label}|{module_digest(self.module)}".encode()).hexdigest()[:16]

    def entry(self) -> tuple[Any, tuple[Any, ...]]:
        """(callable, fake arguments) for `cute.compile`."""
        made: tuple[Any, tuple[Any, ...]] = importlib.import_module(self.module).entry(self)
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class CountSpec(StepSpec):
    """Expert ids, CHUNK a CTA, to how many each expert has there."""

    id_bits: int
    module: ClassVar[str] = "kernel_gen.kernels.steps.route"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceSpec(StepSpec):
    """Those counts and the ids to each id's place in expert order, and the experts' offsets."""

    id_bits: int
    module: ClassVar[str] = "kernel_gen.kernels.steps.route"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSpec(StepSpec):
    """A step in which a CTA holds one row: `threads` threads of `vectors` vectors; `kinds` are the forms it writes.

    `aligned`: every row that is read starts at 16 bytes and is whole vectors long.
    """

    threads: int
    vectors: int
    kinds: tuple[ActivationKind, ...]
    aligned: bool

    def __post_init__(self) -> None:
        StepSpec.__post_init__(self)
        if not self.kinds or len(set(self.kinds)) != len(self.kinds):
            raise ValueError(f"kinds: expected distinct ones, at least one, got {self.kinds}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatherSpec(RowSpec):
    """Tokens to their places in expert order, quantised. `ranks`: places are worked out here, by every CTA for its own
    token, else they are given. `writes_formats`: each row's entry of the table of formats, for `swiglu`.
    """

    top_k: int
    id_bits: int
    ranks: bool
    writes_formats: bool
    module: ClassVar[str] = "kernel_gen.kernels.steps.gather"


@dataclass(frozen=True, slots=True, kw_only=True)
class SwigluSpec(RowSpec):
    """silu(gate) * up of a row, quantised; without `gated` of a row that is the product already.

    `by_row`: each row has a form of its own, written down by `gather`; one that is not among `kinds` is not written.
    """

    gated: bool = True
    by_row: bool = False
    module: ClassVar[str] = "kernel_gen.kernels.steps.swiglu"


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineSpec(StepSpec):
    """A token's rows, times the router's weights, summed."""

    threads: int
    top_k: int
    weight_bits: int
    aligned: bool
    module: ClassVar[str] = "kernel_gen.kernels.steps.combine"


def row_shape(columns: int) -> tuple[int, int] | None:
    """(threads, vectors) of a CTA that holds a row of so many columns; None: no CTA holds one so long."""
    needed = -(-columns // VECTOR)
    for vectors in (1, 2, 4):
        threads = max(128, 1 << (-(-needed // vectors) - 1).bit_length())
        if threads <= (256 if vectors < 4 else MAX_THREADS):
            return threads, vectors
    return None


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(_plain(item) for item in value)
    return str(value.value if isinstance(value, Enum) else value)
