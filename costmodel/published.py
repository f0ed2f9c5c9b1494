"""Published latencies on Ada cards (sm_89): what a prediction for a card that nobody measured here is checked against.
They are of other people's kernels, and nothing is ever fitted to them.

A figure of a kernel like the project's (a grouped GEMM, or one written for the same scheme by hand) should be near; a
vendor's library on one large matrix is a bound that a grouped kernel does not reach.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from costmodel.features import Kernels, as_frame
from costmodel.kernel_use import KernelUse
from costmodel.transfer_model import TransferModel
from profiles import kernels, loads, schemes
from profiles.gpus import gpu as find_gpu
from profiles.kernels import KernelConfig
from profiles.loads import TokenLoad

MXMOE = "arXiv 2505.05799, table 6 (RTX 4090)"
VLLM_4090D = "vllm-project/vllm#48309, tuned (RTX 4090 D: same memory, fewer SMs)"
VLLM_L40S = "vllm-project/vllm#53710, tuned (L40S)"
CUBLAS = "zzc0721/torch-performance-test-data#78 (RTX 4090, torch 2.7)"


_DRAWS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One published latency: the sum of a layer's `linears` (n, k) under a load of `num_tokens` tokens, each to `top_k`
    of `num_experts` experts. `is_bound`: of a kernel that a grouped GEMM is not expected to reach.
    """

    gpu: str
    scheme: str
    linears: tuple[tuple[int, int], ...]
    num_experts: int
    num_tokens: int
    top_k: int
    latency_us: float
    source: str
    is_bound: bool = False

    def loads(self) -> list[TokenLoad]:
        """Tokens by expert, drawn a few times: random routing, all experts alike, as those benchmarks draw it."""
        size = (self.num_experts, self.num_tokens, self.top_k)
        return [loads.zipf(*size, seed=seed, exponent=0.0) for seed in range(_DRAWS)]


def _cube(side: int, scheme: str, tera_ops: float, source: str, *, is_bound: bool = False) -> Figure:
    return Figure(
        gpu="rtx4090", scheme=scheme, linears=((side, side),), num_experts=1, num_tokens=side, top_k=1,
        latency_us=2.0 * side**3 / tera_ops * 1e-6, source=source, is_bound=is_bound,
    )  # fmt: skip


_MIXTRAL_TP4 = ((7168, 4096), (4096, 3584))
_QWEN3_30B = ((1536, 2048), (2048, 768))
FIGURES: tuple[Figure, ...] = (
    _cube(8192, "w4a4_g-1_sym", 1070.5303, MXMOE),
    _cube(8192, "w4a4_g128_sym", 667.3349, MXMOE),
    *(
        Figure(
            gpu="rtx4090", scheme="w8a8_g-1_sym_e4m3", linears=_MIXTRAL_TP4, num_experts=8, num_tokens=tokens,
            top_k=2, latency_us=latency_us, source=VLLM_4090D,
        )
        for tokens, latency_us in ((1, 104.15), (16, 377.14), (48, 386.75))
    ),
    *(
        Figure(
            gpu="l40s", scheme="w8a8_g-1_sym_e4m3", linears=_QWEN3_30B, num_experts=128, num_tokens=tokens,
            top_k=8, latency_us=latency_us, source=VLLM_L40S,
        )
        for tokens, latency_us in (
            *((4, 190.41), (8, 347.98), (16, 552.82), (32, 742.22), (64, 839.49), (128, 870.36), (256, 897.68)),
            *((512, 948.74), (1024, 1052.11), (2048, 1286.40), (4096, 1846.43), (8192, 3195.68)),
        )
    ),
    *(
        _cube(side, "w16a16", tera_flops, CUBLAS, is_bound=True)
        for side, tera_flops in ((2048, 164.81), (4096, 151.50), (8192, 160.17))
    ),
)  # fmt: skip
"""The L40S is another Ada card whose kernels are the same sm_89 builds; its two smallest loads are left out (their
weights stay in its L2 between the launches of that benchmark).
"""

Candidates = Mapping[str, Sequence[tuple[KernelConfig, int]]]
"""By scheme: configurations and the CTAs per SM of their sm_89 builds."""


def candidates_of(launches: pd.DataFrame) -> dict[str, list[tuple[KernelConfig, int]]]:
    """The kernels of a profile's rows of one scheme each, with the occupancy that the rows say."""
    found: dict[str, dict[str, int]] = {}
    for names, config, versions in zip(launches["schemes"], launches["config"], launches["versions"], strict=True):
        if len(names) == 1:
            asked = kernels.parse(config).min_ctas_per_sm
            found.setdefault(names[0], {})[config] = int(dict(versions).get("ctas_per_sm", asked))
    return {scheme: [(kernels.parse(name), ctas) for name, ctas in of.items()] for scheme, of in found.items()}


def check(model: TransferModel, candidates: Candidates, figures: Sequence[Figure] = FIGURES) -> pd.DataFrame:
    """Each figure whose scheme has candidates beside the prediction of its best configuration: columns gpu, scheme,
    experts, tokens, published_us, predicted_us, lower_us, upper_us, is_bound, source.
    """
    rows = []
    for figure in figures:
        if figure.scheme not in candidates:
            continue
        parts = [_best(model, figure, n, k, candidates[figure.scheme]) for n, k in figure.linears]
        predicted, lower, upper = np.sum(parts, axis=0)
        rows.append(
            {
                "gpu": figure.gpu,
                "scheme": figure.scheme,
                "experts": figure.num_experts,
                "tokens": figure.num_tokens,
                "published_us": figure.latency_us,
                "predicted_us": float(predicted),
                "lower_us": float(lower),
                "upper_us": float(upper),
                "is_bound": figure.is_bound,
                "source": figure.source,
            }
        )
    return pd.DataFrame(rows)


def _best(
    model: TransferModel, figure: Figure, n: int, k: int, candidates: Sequence[tuple[KernelConfig, int]]
) -> tuple[float, float, float]:
    """Latency, lower and upper end of the configuration that is predicted to be the fastest; means over the loads."""
    scheme, drawn = schemes.parse(figure.scheme), figure.loads()
    uses = [KernelUse(n=n, k=k, schemes=(scheme,), config=config, ctas_per_sm=ctas) for config, ctas in candidates]
    use_of, load_of = (grid.ravel() for grid in np.meshgrid(range(len(uses)), range(len(drawn)), indexing="ij"))
    X = as_frame(Kernels(find_gpu(figure.gpu), uses).matrix(drawn, use_of, load_of))
    means = [part.reshape(len(uses), len(drawn)).mean(axis=1) for part in model.predict(X, return_interval=True)]
    best = int(means[0].argmin())
    return float(means[0][best]), float(means[1][best]), float(means[2][best])
