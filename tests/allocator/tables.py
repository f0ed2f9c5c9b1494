"""Small tables of a real model's shape, cut to a few layers and experts."""

import numpy as np
import pandas as pd

from allocator import Sensitivity
from costmodel.table import CostTable
from profiles import schemes
from profiles.models import Linear, model

MODEL = model("olmoe-1b-7b")
SCHEMES = (
    "w16a16",
    "w8a16_g-1_sym",
    "w4a16_g128_asym",
    "w3a16_g128_asym",
    "w2a16_g128_asym",
    "w8a8_g-1_sym",
    "w4a4_g-1_sym",
)
LAYERS = 3
EXPERTS = 16  # of the model's 64: a quarter of a launch's latency is theirs


def a_sensitivity(*, experts: int = EXPERTS, seed: int = 0) -> Sensitivity:
    """Errors of 4^-bits, weights' and activations', times a log-normal sensitivity a linear; bf16 costs nothing."""
    rng = np.random.default_rng(seed)
    rows = []
    for layer in range(LAYERS):
        for expert in range(experts):
            for linear in Linear:
                weight = rng.lognormal(0, 1.5)
                for name in SCHEMES:
                    scheme = schemes.parse(name)
                    error = sum(4.0**-bits for bits in (scheme.weight_bits, scheme.activation_bits) if bits < 16)
                    rows.append((layer, expert, linear.value, name, weight * error * rng.lognormal(0, 0.2)))
    frame = pd.DataFrame(rows, columns=["layer", "expert", "linear", "scheme", "loss"])
    return Sensitivity(
        frame.assign(model=MODEL.name, metric="block_l2", data="synthetic", num_samples=4, seed=seed, schema_version=1)
    )


def a_cost_table(*, without: tuple[str, ...] = ()) -> CostTable:
    """Rooflines of 4 TB/s and 800, 1600 and 2400 Tflop/s, a launch and two scenarios."""
    rows = []
    for scenario, tokens in (("decode", 2.0), ("prefill", 512.0)):
        for linear in Linear:
            n, k = MODEL.gemm(linear)
            for name in SCHEMES:
                if name in without:
                    continue
                scheme = schemes.parse(name)
                memory = MODEL.num_experts * n * k * scheme.bits_per_weight(k) / 8 / 4e6
                compute = (
                    2 * tokens * MODEL.num_experts * n * k / {16: 800e6, 8: 1600e6, 4: 2400e6}[scheme.activation_bits]
                )
                rows.append((linear.value, name, scenario, tokens, max(memory, compute) + 2))
    frame = pd.DataFrame(rows, columns=["linear", "scheme", "scenario", "tokens_per_expert", "latency_us"])
    return CostTable(
        frame.assign(
            gpu="h200",
            model_version="test",
            model=MODEL.name,
            std_us=np.nan,
            config="mma_128x16_w8x1x1_s4_k1_at_o2",
            source="predicted",
            schema_version=1,
        )
    )
