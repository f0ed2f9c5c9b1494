"""The wgmma family, compiled for an H200 without one, and gated: each kind of math, a mix, and what must not run."""

import dataclasses
import itertools

import pytest

from kernel_gen import gate, smem_wgmma
from kernel_gen.cache import KernelCache
from kernel_gen.compiler import Artifact
from kernel_gen.kernels import KernelSpec
from kernel_gen.legality import estimated_facts, reasons
from kernel_gen.pool import Failure, compile_all
from profiles.gpus import Math, gpu
from profiles.records import Status
from tests.kernel_gen.build.specs import kernel_spec

H200 = gpu("h200")
GOOD = {
    "bf16": kernel_spec("w4a16_g128_sym", config="wgmma_128x16_w4x1x1_s8_k1_at_o3", arch="sm_90a"),
    "bf16, prefill": kernel_spec("w2a16_g128_asym", config="wgmma_256x160_w8x1x1_s3_k1_at_o1", arch="sm_90a"),
    "int8": kernel_spec("w8a8_g-1_sym", config="wgmma_128x48_w8x1x1_s4_k1_af_o2", arch="sm_90a"),
    "e4m3": kernel_spec("w4a8_g128_sym_e4m3", config="wgmma_128x128_w8x1x1_s4_k1_at_o1", arch="sm_90a"),
    "split-K": kernel_spec("w4a16_g128_sym", "w8a8_g-1_sym", config="wgmma_64x16_w4x1x1_s4_k4_at_o3", arch="sm_90a"),
    "a mix": kernel_spec(
        "w4a16_g128_asym",
        "w8a8_g-1_sym",
        "w8a8_g-1_sym_e4m3",
        config="wgmma_128x32_w4x1x1_s3_k1_at_o2",
        arch="sm_90a",
    ),
    "8 tokens": kernel_spec("w3a16_g128_asym", config="wgmma_128x8_w4x1x1_s6_k1_at_o3", arch="sm_90a"),
    "8 tokens, a mix": kernel_spec(
        "w4a16_g128_sym", "w8a8_g-1_sym", config="wgmma_192x8_w4x1x1_s4_k1_at_o2", arch="sm_90a"
    ),
    "8 tokens, split-K": kernel_spec("w4a16_g128_sym", config="wgmma_128x8_w4x1x1_s8_k4_at_o3", arch="sm_90a"),
    "tails of 8": kernel_spec(
        "w4a16_g128_sym", "w4a8_g128_sym", config="wgmma_128x16_w4x1x1_s5_k1_at_o2_t8", arch="sm_90a"
    ),
    "groups of 64": kernel_spec("w4a16_g64_asym", config="wgmma_256x16_w8x1x1_s3_k1_at_o1_t8", arch="sm_90a"),
    "8 tokens, just enough registers": kernel_spec("w16a16", config="wgmma_64x8_w4x1x1_s5_k1_at_o4", arch="sm_90a"),
}
SPILLS = {
    "sums": kernel_spec("w4a8_g128_sym_e4m3", config="wgmma_256x128_w8x1x1_s2_k1_at_o1", arch="sm_90a"),
    "8 tokens": kernel_spec("w8a16_g128_sym", config="wgmma_384x8_w8x1x1_s3_k1_at_o2", arch="sm_90a"),
}
"""A group's sums and the whole sums are 256 registers of a consumer's 232; two k-tiles' words of three units of eight
bits, their sums and scales are more than two CTAs of two warpgroups leave.
"""
TOO_WIDE = kernel_spec("w16a16", config="wgmma_64x80_w4x1x1_s2_k1_at_o4", arch="sm_90a")
"""40 sums of one wgmma, where four CTAs leave 64 registers a thread at launch."""


@pytest.fixture(scope="module")
def outcomes(shared_cache: KernelCache) -> dict[KernelSpec, Artifact | Failure]:
    return {
        outcome.spec: outcome for outcome in compile_all([*GOOD.values(), *SPILLS.values(), TOO_WIDE], shared_cache)
    }


def built(outcomes: dict[KernelSpec, Artifact | Failure], spec: KernelSpec) -> Artifact:
    outcome = outcomes[spec]
    assert isinstance(outcome, Artifact), outcome
    return outcome


def wanted_instruction(math: Math, tokens: int) -> str:
    """bf16 math takes mma.sync for 8 tokens; everything else a wgmma of as many tokens as the tile has."""
    if math is Math.BF16 and tokens == 8:
        return "HMMA.16816"
    return {Math.BF16: "HGMMA.64x{}x16", Math.INT8: "IGMMA.64x{}x32", Math.E4M3: "QGMMA.64x{}x32"}[math].format(tokens)


@pytest.mark.parametrize("spec", GOOD.values(), ids=GOOD)
def test_each_math_passes_the_gate(outcomes: dict[KernelSpec, Artifact | Failure], spec: KernelSpec) -> None:
    code = built(outcomes, spec).code
    assert reasons(spec.config, spec.schemes, H200) == ()
    assert gate.rejections(code, spec, H200) == ()
    assert code.ptxas_warnings == ()
    assert {opcode.split(".S8")[0].split(".F32")[0] for opcode in code.mma_instructions} == {
        wanted_instruction(scheme.math, width)
        for scheme, width in itertools.product(spec.schemes, spec.config.token_widths)
    }


@pytest.mark.parametrize("spec", GOOD.values(), ids=GOOD)
def test_the_estimate_is_what_the_compiler_reports(
    outcomes: dict[KernelSpec, Artifact | Failure], spec: KernelSpec
) -> None:
    """With setmaxnreg, the compiler reports what the launch takes; shared memory and occupancy follow."""
    facts = built(outcomes, spec).facts(H200)
    estimate = estimated_facts(spec.config, spec.schemes, H200)
    assert facts.registers_per_thread == smem_wgmma.launch_registers(spec.config) == estimate.registers_per_thread
    assert facts.smem_bytes == estimate.smem_bytes
    assert facts.ctas_per_sm == estimate.ctas_per_sm == spec.config.min_ctas_per_sm


@pytest.mark.parametrize("spec", SPILLS.values(), ids=SPILLS)
def test_what_spills_is_refused_before_and_after_the_build(
    outcomes: dict[KernelSpec, Artifact | Failure], spec: KernelSpec
) -> None:
    code = built(outcomes, spec).code
    assert code.spill_bytes > 100
    assert any(f"spills {code.spill_bytes} bytes" in reason for reason in gate.rejections(code, spec, H200))
    assert any("registers: about" in reason for reason in reasons(spec.config, spec.schemes, H200))


def test_what_the_compiler_refuses_is_refused_before(outcomes: dict[KernelSpec, Artifact | Failure]) -> None:
    outcome = outcomes[TOO_WIDE]
    assert isinstance(outcome, Failure)
    assert outcome.status is Status.COMPILE_ERROR
    assert "C7602" in outcome.error
    assert any("leave at launch" in reason for reason in reasons(TOO_WIDE.config, TOO_WIDE.schemes, H200))


def test_a_kernel_whose_mma_sync_stands_for_wgmma_is_refused(outcomes: dict[KernelSpec, Artifact | Failure]) -> None:
    """The instruction of the other family is not what was meant from 16 tokens on."""
    code = dataclasses.replace(built(outcomes, GOOD["bf16"]).code, mma_instructions=("HMMA.16816.F32.BF16",))
    (found,) = gate.rejections(code, GOOD["bf16"], H200)
    assert "HGMMA.64x*x16.F32.BF16 is not in the machine code, which has HMMA.16816.F32.BF16" in found


def test_each_width_of_a_tile_wants_its_instruction(outcomes: dict[KernelSpec, Artifact | Failure]) -> None:
    """8-token tiles of bf16 math want mma.sync, of 8-bit math wgmma; a tile with tails of 8 wants both."""
    tails = dataclasses.replace(GOOD["tails of 8"], schemes=GOOD["tails of 8"].schemes[:1])
    eight, eight_bits = GOOD["8 tokens"], dataclasses.replace(GOOD["8 tokens, a mix"], schemes=GOOD["int8"].schemes)
    code = built(outcomes, GOOD["tails of 8"]).code

    def refusals(spec: KernelSpec, *opcodes: str) -> str:
        return "; ".join(gate._missing_instructions(dataclasses.replace(code, mma_instructions=opcodes), spec))

    assert refusals(tails, "HGMMA.64x16x16.F32.BF16", "HMMA.16816.F32.BF16") == ""
    assert refusals(tails, "HGMMA.64x16x16.F32.BF16").count("HMMA.16816.F32.BF16 is not in the machine code") == 1
    assert refusals(tails, "HMMA.16816.F32.BF16").count("HGMMA.64x*x16.F32.BF16 is not in the machine code") == 1
    assert refusals(eight, "HMMA.16816.F32.BF16") == ""
    assert "HMMA.16816.F32.BF16 is not in the machine code" in refusals(eight, "HGMMA.64x8x16.F32.BF16")
    assert refusals(eight_bits, "IGMMA.64x8x32.S8.S8.SAT") == ""
    assert "IGMMA.64x*x32.S8.S8 is not in the machine code" in refusals(eight_bits, "IMMA.16832.S8.S8")
