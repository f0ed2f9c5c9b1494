"""Speed of prediction, CPU time: enumerating a space, filling tables of launches and of their tiles, solving them."""

import time
from typing import Any

import pytest

from costmodel.analytic import solve_columns
from costmodel.constants import DEFAULT_CONSTANTS
from costmodel.launches import Launch, LaunchTable
from costmodel.tiles import TileCosts
from kernel_gen.legality import estimated_facts
from kernel_gen.space import Effort, candidates, enumerate_configs
from profiles import loads
from profiles.gpus import gpu
from profiles.kernels import GemmShape
from profiles.models import Linear, model
from profiles.schemes import parse

pytestmark = pytest.mark.benchmark(timer=time.process_time)

GPU = gpu("rtx4090")
MODEL = model("qwen1.5-moe-a2.7b")
SCHEMES = tuple(parse(name) for name in ("w16a16", "w4a16_g128_sym", "w8a8_g-1_sym", "w2a16_g128_sym"))
TOKENS = (1, 16, 64, 256, 1024, 4096, 8192)


@pytest.fixture(scope="module")
def launches() -> list[Launch]:
    """Every quick configuration x scheme x tokens of both linears, and the same with every other expert in w4a16."""
    found = []
    token_loads = [loads.log_normal(MODEL.num_experts, tokens, MODEL.top_k, seed=tokens) for tokens in TOKENS]
    for linear in Linear:
        n, k = MODEL.gemm(linear)
        for scheme in SCHEMES:
            mixed = (scheme, SCHEMES[1]) * (MODEL.num_experts // 2)
            for schemes in ((scheme,), mixed):
                for config in candidates(tuple(dict.fromkeys(schemes)), GPU, Effort.QUICK):
                    facts = estimated_facts(config, tuple(dict.fromkeys(schemes)), GPU)
                    found += [
                        Launch(
                            shape=GemmShape(m=load.total, n=n, k=k),
                            load=load,
                            schemes=schemes,
                            config=config,
                            facts=facts,
                        )
                        for load in token_loads
                    ]
    return found


def test_fill_table(benchmark: Any, launches: list[Launch]) -> None:
    benchmark.extra_info["launches"] = len(launches)
    benchmark.pedantic(LaunchTable.of, args=(launches,), rounds=21, warmup_rounds=1)


def test_tile_costs(benchmark: Any, launches: list[Launch]) -> None:
    benchmark.extra_info["launches"] = len(launches)
    benchmark.pedantic(TileCosts.of, args=(GPU, launches, DEFAULT_CONSTANTS), rounds=21, warmup_rounds=1)


def test_solve(benchmark: Any, launches: list[Launch]) -> None:
    benchmark.extra_info["launches"] = len(launches)
    tables = LaunchTable.of(launches), TileCosts.of(GPU, launches, DEFAULT_CONSTANTS)
    benchmark.pedantic(solve_columns, args=(GPU, *tables), rounds=31, warmup_rounds=1)


@pytest.mark.parametrize("effort", Effort, ids=lambda effort: effort.value)
def test_enumerate_space(benchmark: Any, effort: Effort) -> None:
    def enumerate_all() -> int:
        return sum(1 for _ in enumerate_configs(SCHEMES, GPU, effort))

    benchmark.extra_info["configurations"] = enumerate_all()
    benchmark.pedantic(enumerate_all, rounds=11, warmup_rounds=1)
