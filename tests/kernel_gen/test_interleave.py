"""Rows of gate and up put together for a SwiGLU epilogue."""

import pytest

torch = pytest.importorskip("torch")

from kernel_gen.experts import Experts  # noqa: E402
from kernel_gen.formats import dequantize, unpack  # noqa: E402
from kernel_gen.kernels import KernelSpec  # noqa: E402
from profiles import kernels, schemes  # noqa: E402
from profiles.errors import SpecError  # noqa: E402

NAMES = ("w16a16", "w4a16_g128_asym", "w3a16_g128_sym", "w8a8_g-1_sym", "w4a8_g128_sym_e4m3")


@pytest.mark.parametrize("name", NAMES)
def test_eight_rows_of_gate_stand_before_the_eight_of_up_that_belong_to_them(name) -> None:
    experts = Experts.from_weights(torch.randn(2, 144, 256), schemes.parse(name))
    gate, up = dequantize(unpack(experts.stacks[0])).chunk(2, dim=1)
    found = dequantize(unpack(experts.interleaved().stacks[0])).unflatten(1, (9, 2, 8))
    assert torch.equal(found[:, :, 0], gate.unflatten(1, (9, 8)))
    assert torch.equal(found[:, :, 1], up.unflatten(1, (9, 8)))


def test_interleaving_needs_rows_in_eights_and_happens_once() -> None:
    odd = Experts.from_weights(torch.zeros(1, 24, 64), schemes.parse("w16a16"))
    with pytest.raises(SpecError, match="expected gate's rows before up's, 8 or a multiple each, got 24"):
        odd.interleaved()
    even = Experts.from_weights(torch.zeros(1, 32, 64), schemes.parse("w16a16")).interleaved()
    with pytest.raises(SpecError, match="expected gate's rows before up's"):
        even.interleaved()


def test_options_name_other_kernels_and_are_absent_where_they_are_off() -> None:
    def spec(**options) -> KernelSpec:
        config = kernels.parse("wgmma_64x16_w4x1x1_s4_k1_at_o4")
        return KernelSpec(config=config, schemes=(schemes.parse("w16a16"),), arch="sm_90a", **options)

    found = [spec(), spec(swiglu=True), spec(overlap=True), spec(swiglu=True, overlap=True)]
    found.append(spec(overlap=True, prefetch=True))
    labels = [one.label.removeprefix(found[0].label) for one in found]
    assert labels == ["", "/swiglu", "/overlap", "/swiglu/overlap", "/overlap/prefetch"]
    assert len({one.name for one in found}) == len({one.fingerprint() for one in found}) == 5


def test_launches_overlap_from_sm_90_on() -> None:
    config = kernels.parse("mma_64x8_w4x1x1_s5_k1_at_o4")
    with pytest.raises(ValueError, match="overlap: sm_89 has no programmatic dependent launch"):
        KernelSpec(config=config, schemes=(schemes.parse("w16a16"),), arch="sm_89", overlap=True)
    with pytest.raises(ValueError, match="prefetch: a kernel that does not overlap"):
        KernelSpec(config=config, schemes=(schemes.parse("w16a16"),), arch="sm_90a", prefetch=True)
