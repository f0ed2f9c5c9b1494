"""Which workloads and loads a request comes to."""

import dataclasses
import itertools
from pathlib import Path

import pytest

from kernel_gen.space import Effort, candidates
from kernel_gen.sweeping.plan import SweepRequest, load_cases, plan
from profiles import schemes
from profiles.gpus import gpu
from profiles.loads import generate
from profiles.models import find_model


def request(
    model: str, *, linears: tuple[str, ...] = ("gate_up",), loads: tuple[str, ...] = ("uniform",)
) -> SweepRequest:
    return SweepRequest(
        gpu=gpu("rtx4090"),
        models=(find_model(model),),
        linears=linears,
        tokens=(1, 64),
        loads=loads,
        seed=3,
        schemes=(schemes.parse("w4a16_g128_sym"),),
        mixes=(),
        effort=Effort.QUICK,
        out=Path("unused.parquet"),
    )


def test_cells_are_every_linear_under_every_load_with_every_legal_configuration() -> None:
    asked = request("qwen1.5-moe-a2.7b", linears=("gate_up", "down", "shared_gate_up", "shared_down"))
    cells = plan(asked)
    assert [
        (cell.workload.linear, cell.workload.n, cell.workload.k, cell.workload.num_experts) for cell in cells[::2]
    ] == [
        ("gate_up", 2816, 2048, 60),
        ("down", 2048, 1408, 60),
        ("shared_gate_up", 11264, 2048, 1),
        ("shared_down", 2048, 5632, 1),
    ]
    legal = set(candidates(asked.schemes, asked.gpu, Effort.QUICK))
    assert all(set(cell.configs) == legal for cell in cells)
    assert [cell.case.load.total for cell in cells] == [4, 256, 4, 256, 1, 64, 1, 64]


def test_an_expert_parallel_rank_gets_its_share_of_the_whole_load() -> None:
    asked = request("qwen3-30b-a3b-ep8-tp2", loads=("zipf",))
    whole = find_model("qwen3-30b-a3b")
    for case, tokens in zip(load_cases(asked, asked.models[0], "gate_up"), (1, 64), strict=False):
        expected = generate("zipf", whole.num_experts, tokens, whole.top_k, 3).expert_parallel(8, 0)
        if expected.total:
            assert case.load.tokens_per_expert == expected.tokens_per_expert
    (cell, *_) = plan(asked)
    assert (cell.workload.num_experts, cell.workload.n) == (16, 768)


def test_equal_loads_are_one_case() -> None:
    asked = request("mixtral-8x7b", loads=("one_hot", "one_hot"))
    assert len(list(load_cases(asked, asked.models[0], "gate_up"))) == 2


@pytest.mark.parametrize("name", ["deepseek-v3", "gpt-oss-20b", "mixtral-8x7b-ep4"])
def test_every_model_has_cells(name: str) -> None:
    assert all(cell.configs for cell in plan(request(name, linears=("gate_up", "down"))))


def test_shuffled_are_whole_workloads() -> None:
    asked = request("qwen1.5-moe-a2.7b", linears=("gate_up", "down", "shared_gate_up", "shared_down"))
    cells = plan(asked)
    shuffled = plan(dataclasses.replace(asked, shuffle=True))
    assert shuffled != cells
    assert sorted(shuffled, key=str) == sorted(cells, key=str)
    assert [cell.case.tokens for cell in shuffled] == [cell.case.tokens for cell in cells]
    assert all(first.workload == second.workload for first, second in zip(shuffled[::2], shuffled[1::2], strict=True))


def test_drawn_cells_are_some_of_all_a_few_loads_a_workload() -> None:
    asked = dataclasses.replace(
        request("qwen1.5-moe-a2.7b", linears=("gate_up", "down"), loads=("uniform", "zipf", "one_hot")),
        tokens=(1, 16, 64, 256),
        schemes=tuple(schemes.parse(name) for name in ("w4a16_g128_sym", "w16a16", "w8a8_g-1_sym")),
    )
    every = plan(asked)
    drawn = plan(dataclasses.replace(asked, num_cells=10))
    assert len(drawn) == 10
    assert all(cell in every for cell in drawn)
    assert [len(list(cells)) for _, cells in itertools.groupby(drawn, key=lambda cell: cell.workload)] == [3, 3, 3, 1]
    assert {cell.workload.label for cell in drawn} == {scheme.name for scheme in asked.schemes}
    assert {cell.case.tokens for cell in drawn} == {1, 16, 64, 256}
    assert plan(dataclasses.replace(asked, num_cells=4)) == drawn[:4]
    assert plan(dataclasses.replace(asked, num_cells=10)) == drawn
    assert plan(dataclasses.replace(asked, num_cells=10, seed=4)) != drawn
    assert len(plan(dataclasses.replace(asked, num_cells=1000))) == 6 * 3
