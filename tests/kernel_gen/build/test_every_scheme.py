"""Every scheme, compiled for an RTX 4090 without one, and gated: one configuration on every landing, all if slow."""

import pytest

from kernel_gen import gate
from kernel_gen.cache import KernelCache, default_cache_dir
from kernel_gen.compiler import Artifact
from kernel_gen.kernels import KernelSpec
from kernel_gen.legality import reasons
from kernel_gen.pool import compile_all
from kernel_gen.space import Effort, candidates
from profiles import kernels
from profiles.gpus import gpu
from profiles.kernels import Family
from profiles.schemes import KERNEL_SCHEMES, QuantScheme
from tests.kernel_gen.build.specs import RTX4090

CONFIG = kernels.parse("mma_64x16_w4x1x1_s3_k1_at_o2")
"""Legal for every scheme that the RTX 4090 has instructions for."""
LEGAL = [scheme for scheme in KERNEL_SCHEMES if not reasons(CONFIG, (scheme,), RTX4090)]
MIXED = tuple(scheme for scheme in KERNEL_SCHEMES if scheme.name in ("w4a16_g128_asym", "w8a8_g-1_sym", "w4a4_g-1_sym"))

ON_EVERY_LANDING = [*((scheme,) for scheme in LEGAL), MIXED]


def specs_of(schemes: tuple[QuantScheme, ...], effort: Effort, name: str = "rtx4090") -> list[KernelSpec]:
    target = gpu(name)
    return [
        KernelSpec(config=config, schemes=schemes, arch=target.arch) for config in candidates(schemes, target, effort)
    ]


@pytest.fixture(scope="module")
def one_of_each(shared_cache: KernelCache) -> dict[tuple[QuantScheme, ...], Artifact]:
    """Each scheme's kernel with the one configuration, compiled in parallel."""
    specs = [KernelSpec(config=CONFIG, schemes=schemes, arch=RTX4090.arch) for schemes in ON_EVERY_LANDING]
    outcomes = compile_all(specs, shared_cache)
    assert [outcome for outcome in outcomes if not isinstance(outcome, Artifact)] == []
    return {outcome.spec.schemes: outcome for outcome in outcomes if isinstance(outcome, Artifact)}


@pytest.mark.timeout(400)  # the first of them compiles all
@pytest.mark.parametrize("schemes", ON_EVERY_LANDING, ids=lambda schemes: "+".join(scheme.name for scheme in schemes))
def test_one_configuration_of_every_scheme_passes_the_gate(
    one_of_each: dict[tuple[QuantScheme, ...], Artifact], schemes: tuple[QuantScheme, ...]
) -> None:
    artifact = one_of_each[schemes]
    assert gate.rejections(artifact.code, artifact.spec, RTX4090) == ()
    facts = artifact.facts(RTX4090)
    assert facts.spill_bytes == facts.stack_bytes == 0
    assert facts.ctas_per_sm >= artifact.spec.config.min_ctas_per_sm
    for scheme in schemes:
        meant = gate.MEANT_INSTRUCTION[Family.MMA, scheme.math]
        assert any(meant.match(opcode) for opcode in facts.mma_instructions)


def test_every_scheme_that_the_hardware_has_is_covered() -> None:
    """Of all schemes, only e4m3 activations with 4-bit weights have no kernel for the RTX 4090."""
    assert {scheme.name for scheme in KERNEL_SCHEMES} - {scheme.name for scheme in LEGAL} == {"w4a8_g128_sym_e4m3"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["rtx4090", "a100", "rtx5090", "h200"])
def test_all_quick_configurations_compile_and_nearly_all_pass(name: str) -> None:
    """What the gate rejects are spills that the register estimate did not foresee: fewer than one kernel in twenty.

    The user's cache is used, so that a second run is short.
    """
    target = gpu(name)
    specs = [spec for scheme in KERNEL_SCHEMES for spec in specs_of((scheme,), Effort.QUICK, name)]
    outcomes = compile_all(
        [spec for spec in specs if KernelCache(root=default_cache_dir()).get(spec) is None],
        KernelCache(root=default_cache_dir()),
    )
    assert [outcome for outcome in outcomes if not isinstance(outcome, Artifact)] == []
    rejected: dict[str, tuple[str, ...]] = {}
    for spec in specs:
        artifact = KernelCache(root=default_cache_dir()).get(spec)
        assert artifact is not None
        if found := gate.rejections(artifact.code, spec, target):
            rejected[spec.label] = found
    assert all("spills" in " ".join(found) for found in rejected.values()), rejected
    assert len(rejected) < len(specs) / 20, rejected
