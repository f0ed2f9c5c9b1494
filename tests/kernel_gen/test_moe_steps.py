"""The steps around the GEMMs compile for every architecture and pass the gate: no spills, no stack; no GPU needed."""

import dataclasses
import itertools

import pytest

pytest.importorskip("cutlass")

from kernel_gen.compiler import inspect_step
from kernel_gen.kernels.spec import can_overlap
from kernel_gen.kernels.steps.spec import (
    CombineSpec,
    CountSpec,
    GatherSpec,
    PlaceSpec,
    SwigluSpec,
    row_shape,
)
from kernel_gen.layouts import ActivationKind

BF16, INT8, E4M3 = ActivationKind.BF16, ActivationKind.INT8, ActivationKind.E4M3
INT4, GROUP = ActivationKind.INT4, ActivationKind.INT4_GROUP
ARCHITECTURES = ("sm_90a", "sm_89")


def gather(arch, columns, kinds, *, top_k=8, ranks=True, aligned=True):
    threads, vectors = row_shape(columns)
    return GatherSpec(
        arch=arch,
        threads=threads,
        vectors=vectors,
        kinds=kinds,
        aligned=aligned,
        top_k=top_k,
        id_bits=64,
        ranks=ranks,
        writes_formats=len(kinds) > 1,
        overlap=can_overlap(arch),
    )


def swiglu(arch, columns, kinds, *, aligned=True):
    threads, vectors = row_shape(columns)
    return SwigluSpec(
        arch=arch, threads=threads, vectors=vectors, kinds=kinds, aligned=aligned, overlap=can_overlap(arch)
    )


def specs(arch):
    yield CountSpec(arch=arch, id_bits=64, overlap=can_overlap(arch))
    yield PlaceSpec(arch=arch, id_bits=32, overlap=can_overlap(arch))
    yield CombineSpec(arch=arch, threads=128, top_k=8, weight_bits=16, aligned=True)
    yield CombineSpec(arch=arch, threads=128, top_k=3, weight_bits=32, aligned=False)
    yield gather(arch, 2048, (BF16,), ranks=False)
    yield gather(arch, 2048, (BF16, INT8, E4M3))
    yield gather(arch, 250, (BF16, GROUP), aligned=False)
    yield gather(arch, 32768, (INT8,))
    yield swiglu(arch, 768, (BF16,))
    yield swiglu(arch, 14336, (BF16, INT8, E4M3))
    yield swiglu(arch, 250, (BF16, INT4), aligned=False)
    yield dataclasses.replace(swiglu(arch, 2048, (BF16, E4M3)), by_row=True)
    yield dataclasses.replace(swiglu(arch, 2048, (E4M3,)), by_row=True, gated=False)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_step_passes_the_gate(arch) -> None:
    for spec in specs(arch):
        code = inspect_step(spec)
        assert (code.spill_bytes, code.stack_bytes, code.ptxas_warnings) == (0, 0, ()), spec.label


@pytest.mark.parametrize("columns", [1, 8, 250, 768, 1408, 2048, 2816, 4096, 7168, 14336, 32768])
def test_a_cta_holds_a_row(columns) -> None:
    threads, vectors = row_shape(columns)
    assert threads * vectors * 8 >= columns
    assert threads % 32 == 0
    assert threads <= 1024


def test_rows_that_no_cta_holds() -> None:
    assert row_shape(32769) is None


def test_names_tell_specs_apart() -> None:
    found = [spec for arch in ARCHITECTURES for spec in specs(arch)]
    assert all(a.name != b.name and a.fingerprint() != b.fingerprint() for a, b in itertools.combinations(found, 2))


def test_older_gpus_cannot_overlap() -> None:
    with pytest.raises(ValueError, match="overlap: sm_89 has no programmatic dependent launch"):
        CountSpec(arch="sm_89", id_bits=64, overlap=True)


def test_a_row_has_distinct_forms() -> None:
    with pytest.raises(ValueError, match="kinds: expected distinct"):
        swiglu("sm_89", 64, (BF16, BF16))
