"""Device time of the kernels: one configuration a scheme for decode and one for prefill, on the GPU at hand.

A round is one measurement by kernel_gen.timing (graph replays, cold L2, median); its device time is fed to
pytest-benchmark through DeviceClock. Activations are quantised beforehand. Schemes that this GPU emulates are left out.
"""

import statistics
from dataclasses import dataclass
from typing import Any

import pytest

from bench.device_clock import DeviceClock
from bench.kernel_sets import progress
from bench.machine import gpu_name

if gpu_name() is None:
    pytest.skip("device times need a GPU, and torch sees none", allow_module_level=True)

import torch

from kernel_gen.experts import Experts
from kernel_gen.kernels import KernelSpec
from kernel_gen.library import KernelLibrary
from kernel_gen.runtime import Kernel, prepare_activations
from kernel_gen.space import Effort, candidates
from kernel_gen.sweeping.detect import installed_gpus, matching_gpus
from kernel_gen.timing import GpuClock, SampleRule, Timing
from profiles import loads
from profiles.gpus import GPUS, GpuSpec
from profiles.kernels import KernelConfig
from profiles.models import Linear, model
from profiles.schemes import KERNEL_SCHEMES, QuantScheme

MODEL = model("qwen1.5-moe-a2.7b")
N, K = MODEL.gemm(Linear.GATE_UP)
ROUNDS = 7
RULE = SampleRule(min_samples=20, max_samples=20)
DEVICE_CLOCK = DeviceClock()
COLD = 3
"""Weights of all sets together, in sizes of L2: when a set's turn comes again, nothing of it is left there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Tokens of a batch, and the tile width that its rows per expert call for."""

    name: str
    tokens: int
    tile_n: int


PHASES = (Phase(name="decode", tokens=16, tile_n=16), Phase(name="prefill", tokens=4096, tile_n=128))


def this_gpu() -> GpuSpec | None:
    return next((spec for spec in GPUS.values() if matching_gpus(spec, installed_gpus())), None)


GPU = this_gpu()


def configuration(scheme: QuantScheme, phase: Phase) -> KernelConfig | None:
    """The first legal one of the quick space with the phase's tile width and whole sums: the same on every run."""
    if GPU is None:
        return None
    legal = candidates((scheme,), GPU, Effort.QUICK)
    return next((config for config in legal if config.tile.n == phase.tile_n and config.split_k == 1), None)


CASES = [
    pytest.param(scheme, phase, config, id=f"{scheme.name}-{phase.name}")
    for scheme in KERNEL_SCHEMES
    for phase in PHASES
    if (config := configuration(scheme, phase)) is not None
]


def spec_of(scheme: QuantScheme, config: KernelConfig) -> KernelSpec:
    assert GPU is not None
    return KernelSpec(config=config, schemes=(scheme,), arch=GPU.arch)


@pytest.fixture(scope="module")
def gpu_clock() -> GpuClock:
    return GpuClock()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> KernelLibrary:
    """Every case's kernel: what the cache lacks is compiled in parallel."""
    assert GPU is not None
    specs = [spec_of(scheme, config) for scheme, _, config in (case.values for case in CASES)]  # type: ignore[arg-type]
    return KernelLibrary.build(specs, GPU, tmp_path_factory.mktemp("bundle"), track=progress)


def launches(scheme: QuantScheme, phase: Phase, kernel: Kernel) -> list[Any]:
    """One launch per set of weights, as many sets as keep L2 cold."""
    assert GPU is not None
    generator = torch.Generator("cuda").manual_seed(0)
    load = loads.log_normal(MODEL.num_experts, phase.tokens, MODEL.top_k, seed=0)
    counts = torch.tensor((0, *load.tokens_per_expert), device="cuda")
    offsets = counts.cumsum(0).to(torch.int32)
    x = torch.randn(load.total, K, device="cuda", dtype=torch.bfloat16, generator=generator)
    activations = prepare_activations(x, (scheme,))
    out = torch.empty(load.total, N, device="cuda", dtype=torch.bfloat16)
    weights = torch.randn(MODEL.num_experts, N, K, device="cuda", dtype=torch.bfloat16, generator=generator)
    sets = [Experts.from_weights(weights, scheme)]
    sets += [Experts.from_weights(weights, scheme) for _ in range(COLD * GPU.l2_bytes // sets[0].num_bytes)]
    for experts in sets:
        experts.bind(kernel.spec.schemes)
    return [lambda experts=experts: kernel(activations, experts, offsets, out) for experts in sets]


@pytest.mark.gpu
@pytest.mark.benchmark(timer=DEVICE_CLOCK)
@pytest.mark.parametrize(("scheme", "phase", "config"), CASES)
def test_kernel(
    benchmark: Any,
    gpu_clock: GpuClock,
    library: KernelLibrary,
    scheme: QuantScheme,
    phase: Phase,
    config: KernelConfig,
) -> None:
    spec, kernel = spec_of(scheme, config), library.kernel(config, (scheme,))
    to_time = launches(scheme, phase, kernel)
    timings: list[Timing] = []

    def one_round() -> None:
        timings.append(gpu_clock.time_launches(to_time, RULE))
        DEVICE_CLOCK.add_us(timings[-1].median_us)

    benchmark.pedantic(one_round, rounds=ROUNDS)
    benchmark.extra_info |= {
        "kernel": f"{spec.label} {spec.fingerprint()}",
        "gpu": gpu_name(),
        "sm_clock_mhz": statistics.median(timing.sm_clock_mhz for timing in timings),
        "reference_ratio": statistics.median(timing.reference_ratio for timing in timings),
        "tokens": phase.tokens,
    }
