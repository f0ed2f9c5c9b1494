"""Made-up profiles for tests of the latency model: the analytic core with other constants, a bias that depends on
scheme and configuration, and noise. Never stored as measurements.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from costmodel.analytic import launch_latencies
from costmodel.constants import AnalyticConstants
from costmodel.kernel_use import nominal_facts
from costmodel.launches import Launch
from profiles import kernels, loads, schemes
from profiles.gpus import gpu as find_gpu
from profiles.kernels import GemmShape
from profiles.loads import TokenLoad
from profiles.records import ProfileRecord, Source, Status
from profiles.schemes import QuantScheme

SCHEMES = ("w4a16_g128_sym", "w8a8_g-1_sym", "w16a16")
CONFIGS = (
    *("mma_64x8_w4x1x1_s6_k1_at_o4", "mma_128x16_w8x1x1_s4_k1_at_o3", "mma_128x32_w8x1x1_s5_k1_at_o2"),
    *("mma_128x64_w4x2x1_s3_k1_at_o2", "mma_128x128_w4x2x1_s4_k1_af_o1", "mma_128x128_w4x2x1_s2_k1_at_o1"),
)
SHAPES = {
    "alpha": (16, 4, 1024, 768),
    "beta": (32, 4, 1408, 2048),
    "gamma": (8, 2, 4096, 1024),
    "delta": (60, 4, 2816, 2048),
}
TOKENS = (1, 8, 32, 128, 512, 2048)
_TRUTH = AnalyticConstants(dram_efficiency=0.8, issue_fraction=0.55, k_tile_sync_cycles=140.0, launch_floor_us=6.0)
NOISE = 0.01


def profile(
    *, seed: int = 0, mixes: int = 12, models: Sequence[str] = tuple(SHAPES), gpu: str = "h200"
) -> pd.DataFrame:
    """Rows as `ProfileStore.records()` has them: every model, tokens, load kind, scheme and configuration."""
    rng = np.random.default_rng(seed)
    rows, launches = [], []
    for model, tokens, kind in itertools.product(models, TOKENS, ("uniform", "zipf")):
        num_experts, top_k, n, k = SHAPES[model]
        load = loads.generate(kind, num_experts, tokens, top_k, seed=1)
        choices: list[tuple[QuantScheme, ...]] = [(schemes.parse(name),) for name in SCHEMES]
        choices += [_mix(rng, num_experts) for _ in range(mixes // len(models))]
        for used, config in itertools.product(choices, CONFIGS):
            launches.append(_launch(n, k, load, used, config))
            rows.append((model, load, used))
    core = launch_latencies(find_gpu(gpu), launches, _TRUTH)["latency_us"].to_numpy()
    records = []
    for (model, load, used), launch, latency_us in zip(rows, launches, core, strict=True):
        latency_us *= 1.0 + _bias(launch)
        latency_us *= float(np.exp(rng.normal(0.0, NOISE)))
        records.append(
            ProfileRecord(
                gpu=gpu, model=model, linear="gate_up", n=launch.shape.n, k=launch.shape.k, load=load, schemes=used,
                config=launch.config, status=Status.OK, source=Source.MEASURED, latency_us=latency_us,
                p20_us=latency_us * 0.99, p80_us=latency_us * 1.01, num_samples=10, kernel_fingerprint="synthetic",
                timestamp="2026-01-01T00:00:00+00:00",
            ).to_row()
        )  # fmt: skip
    return pd.DataFrame(records)


def _mix(rng: np.random.Generator, num_experts: int) -> tuple[QuantScheme, ...]:
    return tuple(schemes.parse(SCHEMES[index]) for index in rng.integers(0, len(SCHEMES), num_experts))


def _launch(n: int, k: int, load: TokenLoad, used: tuple[QuantScheme, ...], config_name: str) -> Launch:
    config = kernels.parse(config_name)
    shape = GemmShape(m=load.total, n=n, k=k)
    return Launch(shape=shape, load=load, schemes=used, config=config, facts=nominal_facts(config))


def _bias(launch: Launch) -> float:
    """A smooth systematic error of the core: few stages hurt, more with narrow weights; long reductions help."""
    bits = float(np.mean([scheme.weight_bits for scheme in launch.schemes]))
    return 0.3 / launch.config.num_stages * (16.0 / bits) ** 0.25 + 0.05 * np.log2(2048.0 / launch.shape.k)
