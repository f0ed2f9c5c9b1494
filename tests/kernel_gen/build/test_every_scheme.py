"""Every scheme, compiled for an RTX 4090 without one, and gated: one configuration on every landing, all if slow."""


import pytest

from kernel_gen import gate
from kernel_gen.cache import KernelCache
from kernel_gen.compiler import Artifact
from kernel_gen.kernels import KernelSpec
from kernel_gen.pool import compile_all
from kernel_gen.space import Effort, candidates
from profiles.gpus import gpu
from profiles.schemes import KERNEL_SCHEMES, QuantScheme
from tests.kernel_gen.build.specs import RTX4090

LEGAL = [scheme for scheme in KERNEL_SCHEMES if candidates((scheme,), RTX4090, Effort.QUICK)]
MIXED = tuple(scheme for scheme in KERNEL_SCHEMES if scheme.name in ("w4a16_g128_asym", "w8a8_g-1_sym", "w4a4_g-1_sym"))


def specs_of(schemes: tuple[QuantScheme, ...], effort: Effort, name: str = "rtx4090") -> list[KernelSpec]:
    target = gpu(name)
    return [
        KernelSpec(config=config, schemes=schemes, arch=target.arch) for config in candidates(schemes, target, effort)
    ]


@pytest.fixture(scope="module")
def one_of_each(shared_cache: KernelCache) -> dict[tuple[QuantScheme, ...], Artifact]:
    """The middle one of each scheme's quick configurations, in parallel."""
    slots = [*((scheme,) for scheme in LEGAL), MIXED]
    specs = [(of_scheme := specs_of(schemes, Effort.QUICK))[len(of_scheme) // 2] for schemes in slots]
    outcomes = compile_all(specs, shared_cache)
    return {
        spec.schemes: outcome for spec, outcome in zip(specs, outcomes, strict=True) if isinstance(outcome, Artifact)
    }


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "schemes",
    [*((scheme,) for scheme in LEGAL), MIXED],
    ids=lambda schemes: "+".join(scheme.name for scheme in schemes),
)
def test_one_configuration_of_every_scheme_passes_the_gate(
    one_of_each: dict[tuple[QuantScheme, ...], Artifact], schemes: tuple[QuantScheme, ...]
) -> None:
    artifact = one_of_each[schemes]
    assert gate.rejections(artifact.code, artifact.spec, RTX4090) == ()
    facts = artifact.facts(RTX4090)
    assert facts.spill_bytes == facts.stack_bytes == 0
    assert facts.ctas_per_sm >= artifact.spec.config.min_ctas_per_sm
