"""What a kernel's name and fingerprint promise."""

import dataclasses

import pytest

from kernel_gen.kernels import KernelSpec
from kernel_gen.kernels.spec import _closure
from profiles import kernels, schemes

SPEC = KernelSpec(
    config=kernels.parse("mma_128x16_w8x1x1_s4_k1_at_o2"), schemes=(schemes.parse("w4a16_g128_sym"),), arch="sm_89"
)


def test_the_digest_covers_every_unit_of_the_family() -> None:
    units = {"ptx", "scheduler", "loads", "dequant", "mainloop", "epilogue", "mma"}
    assert {f"kernel_gen.kernels.{unit}" for unit in units} | {"kernel_gen.layouts", "kernel_gen.smem"} <= _closure(
        "kernel_gen.kernels.mma"
    )


def test_names_differ_with_anything_that_differs() -> None:
    others = [
        dataclasses.replace(SPEC, arch="sm_90a"),
        dataclasses.replace(SPEC, max_experts=512),
        dataclasses.replace(SPEC, schemes=(schemes.parse("w4a16_g128_asym"),)),
        dataclasses.replace(SPEC, schemes=(*SPEC.schemes, schemes.parse("w8a8_g-1_sym"))),
        dataclasses.replace(SPEC, config=kernels.parse("mma_128x16_w8x1x1_s5_k1_at_o2")),
    ]
    names = {SPEC.name, *(other.name for other in others)}
    assert len(names) == len({SPEC.fingerprint(), *(other.fingerprint() for other in others)}) == 1 + len(others)
    assert all(name.isidentifier() for name in names)


@pytest.mark.parametrize("max_experts", [0, 31, 48, 2048])
def test_the_table_is_a_power_of_two(max_experts: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        dataclasses.replace(SPEC, max_experts=max_experts)


@pytest.mark.parametrize("count", [0, 5])
def test_a_launch_has_one_to_four_schemes(count: int) -> None:
    names = ("w2a16_g128_sym", "w3a16_g128_sym", "w4a16_g128_sym", "w8a16_g128_sym", "w16a16")
    with pytest.raises(ValueError, match="1 to 4 schemes"):
        dataclasses.replace(SPEC, schemes=tuple(schemes.parse(name) for name in names[:count]))
