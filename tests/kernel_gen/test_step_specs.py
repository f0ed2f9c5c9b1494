"""Which kernels a layer's steps are, and which steps are fused by default; no GPU needed."""

from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

from kernel_gen.layer.step_specs import StepSpecs
from kernel_gen.layouts import ActivationKind
from kernel_gen.moe import Fusion, default_fusions
from profiles.errors import SpecError, UnsupportedError
from profiles.gpus import gpu
from profiles.schemes import parse

W4, INT8, FP8 = parse("w4a16_g128_sym"), parse("w8a8_g-1_sym"), parse("w8a8_g-1_sym_e4m3")


def specs(gate_up, down, *, hidden=2048, intermediate=1408) -> StepSpecs:
    return StepSpecs.of(
        arch="sm_90a", overlap=True, hidden=hidden, intermediate=intermediate, gate_up=gate_up, down=down
    )


def test_rows_are_written_in_the_forms_that_experts_read() -> None:
    found = specs([W4, INT8], [W4, INT8, FP8])
    gather = found.gather(top_k=4, id_bits=64, ranks=True, for_swiglu=True)
    assert gather.kinds == (ActivationKind.BF16, ActivationKind.INT8)
    assert gather.writes_formats
    assert not found.gather(top_k=4, id_bits=64, ranks=True, for_swiglu=False).writes_formats
    assert found.swiglu().kinds == (ActivationKind.BF16, ActivationKind.INT8, ActivationKind.E4M3)
    quantize = found.quantize()
    assert quantize is not None
    assert quantize.kinds == (ActivationKind.INT8, ActivationKind.E4M3)  # bf16 is what the epilogue left
    assert (quantize.gated, quantize.by_row) == (False, True)


def test_nothing_is_quantised_for_bf16_tokens() -> None:
    found = specs([INT8], [W4])
    assert found.quantize() is None
    assert not found.by_row
    assert not found.gather(top_k=1, id_bits=32, ranks=False, for_swiglu=True).writes_formats


def test_a_row_must_fit_a_cta() -> None:
    with pytest.raises(UnsupportedError, match="no CTA holds one"):
        specs([W4], [W4], hidden=1 << 20)
    with pytest.raises(SpecError, match="down: int4 activations per token and per group"):
        specs([W4], [parse("w4a4_g-1_sym"), parse("w4a4_g128_sym")])


@pytest.mark.parametrize(
    ("card", "n", "bundle", "missing"),
    [
        ("h200", 2816, None, Fusion.NONE),
        ("rtx4090", 2816, None, Fusion.OVERLAP | Fusion.PREFETCH),
        ("h200", 380, None, Fusion.EPILOGUE),
        ("rtx4090", 380, None, Fusion.EPILOGUE | Fusion.OVERLAP | Fusion.PREFETCH),
        ("h200", 2816, "kernels", Fusion.ALL),
    ],
)
def test_the_default_is_what_can_be(card, n, bundle, missing) -> None:
    library = SimpleNamespace(gpu=gpu(card), bundle=bundle)
    assert default_fusions(SimpleNamespace(n=n), library) == Fusion.MEASURED_FASTER & ~missing
