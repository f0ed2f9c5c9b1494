"""Finalists' launches measured, on devices that replay made-up latencies in place of a GPU."""

import json
from pathlib import Path

import numpy as np
import pytest

from allocator import Allocation, Budget, Options, Sensitivity, allocate
from allocator.latencies import Latencies
from allocator.latency import Plan, main, measure
from allocator.scenarios import by_share, predicted_table, typical_load
from profiles import schemes
from profiles.errors import DataError, SpecError
from profiles.gpus import gpu
from profiles.loads import TokenLoad, write_trace
from profiles.models import Linear, LinearId, MoeShape
from tests.allocator.benches import MadeUpBench, made_up_us

SHAPE = MoeShape(
    name="small", hidden_size=256, intermediate_size=128, num_experts=8, top_k=2, num_shared_experts=1,
    shared_intermediate_size=128, num_moe_layers=3,
)  # fmt: skip
SCHEMES = tuple(map(schemes.parse, ("w2a16_g128_asym", "w4a16_g128_asym", "w8a16_g-1_sym")))
TRACE = {
    layer: TokenLoad(tokens_per_expert=tuple(np.random.default_rng(layer).permutation(8).tolist()), source="t")
    for layer in range(3)
}
LOADS = {name: typical_load(TRACE, SHAPE, tokens, name) for name, tokens in (("decode", 16), ("prefill", 512))}
PLAN = Plan(shape=SHAPE, gpu=gpu("rtx4090"), loads=LOADS, trace=TRACE)


@pytest.fixture(scope="module")
def allocations() -> dict[str, Allocation]:
    rng = np.random.default_rng(0)
    losses = {
        (LinearId(layer=layer, expert=expert, linear=linear), scheme): rng.lognormal() * 4.0**-scheme.weight_bits
        for layer in range(3)
        for expert in range(-1, 8)
        for linear in Linear
        for scheme in SCHEMES
    }
    sensitivity = Sensitivity.from_losses(losses, model="small", metric="m", data="d", num_samples=1, seed=0)
    table = predicted_table(PLAN.gpu, SHAPE, LOADS, SCHEMES)

    def solved(options: Options) -> Allocation:
        return allocate(sensitivity, table, Budget(avg_weight_bits=4.3), shape=SHAPE, options=options)

    return {"mixed": solved(Options()), "uniform": solved(Options(schemes=SCHEMES[1:2]))}


def test_launches_are_those_of_the_allocation(allocations: dict[str, Allocation], tmp_path: Path) -> None:
    bench = MadeUpBench()
    found = measure(allocations, PLAN, bench)
    assert found.layers == (0, 1, 2)
    assert found.failures == ()
    assert len(found.launches) == 2 * 3 * 4 * 2  # allocations, layers, linears, loads
    for time in found.launches:
        held = [
            scheme.name
            for block, scheme in allocations[time.allocation].assignment.items()
            if block.layer == time.layer and (block.expert == -1) == time.linear.startswith("shared_")
            and block.linear.value == time.linear.removeprefix("shared_")
        ]  # fmt: skip
        assert time.experts == {name: held.count(name) for name in set(held)}
    for name, total in found.total_us.items():
        for scenario in LOADS:
            times = [t.latency_us for t in found.launches if (t.allocation, t.scenario) == (name, scenario)]
            assert total[scenario] == pytest.approx(sum(times))
        assert found.of(allocations[name]) == total
    uniform = {(t.linear, t.scenario, t.latency_us) for t in found.launches if t.allocation == "uniform"}
    assert len(uniform) == 8  # alike in every layer
    assert len(bench.measured) == len(set(bench.measured))  # and measured once

    found.write(tmp_path / "found.json")
    assert Latencies.read(tmp_path / "found.json") == found


def test_an_experts_scheme_meets_its_tokens(allocations: dict[str, Allocation]) -> None:
    bench = MadeUpBench()
    measure({"mixed": allocations["mixed"]}, PLAN, bench)
    for layer in range(3):
        busiest = by_share(TRACE[layer])[0]
        scheme = allocations["mixed"].assignment[LinearId(layer=layer, expert=busiest, linear=Linear.DOWN)]
        held = {
            one.workload.schemes[0] for one in bench.measured
            if one.workload.linear == "down" and one.load.tokens_per_expert[0] == one.load.max
        }  # fmt: skip
        assert scheme in held


def test_the_fastest_configuration_counts(allocations: dict[str, Allocation]) -> None:
    bench = MadeUpBench()
    found = measure(allocations, PLAN, bench)
    seen: dict[object, list[float]] = {}
    for one in bench.measured:
        seen.setdefault((one.workload, one.load), []).append(made_up_us(one))
    assert all(len(times) <= PLAN.tries for times in seen.values())
    assert {t.latency_us for t in found.launches} == {min(times) for times in seen.values()}


def test_some_layers_stand_for_all(allocations: dict[str, Allocation]) -> None:
    plan = Plan(shape=SHAPE, gpu=PLAN.gpu, loads=LOADS, trace=TRACE, most_layers=1, tries=1)
    found = measure({"uniform": allocations["uniform"]}, plan, MadeUpBench())
    assert found.extent == "1 of 3 layers, scaled to all"
    times = [t.latency_us for t in found.launches if t.scenario == "decode"]
    assert len(times) == 4
    assert found.total_us["uniform"]["decode"] == pytest.approx(3 * sum(times))


def test_a_launch_that_fails_is_named_and_its_allocation_has_no_total(allocations: dict[str, Allocation]) -> None:
    found = measure(
        allocations, PLAN, MadeUpBench(wrong=lambda one: len(one.workload.slots) > 1 and one.workload.linear == "down")
    )
    assert set(found.total_us) == {"uniform"}
    assert found.of(allocations["mixed"]) is None
    assert any("mixed, layer" in text and "down" in text and "3 values differ" in text for text in found.failures)


def test_what_does_not_fit_is_refused(allocations: dict[str, Allocation]) -> None:
    bench = MadeUpBench()
    with pytest.raises(SpecError, match="no allocation"):
        measure({}, PLAN, bench)
    with pytest.raises(DataError, match="has a layer 0, of which the trace has no 8 experts"):
        measure(allocations, Plan(shape=SHAPE, gpu=PLAN.gpu, loads=LOADS, trace={9: TRACE[0]}), bench)
    with pytest.raises(SpecError, match="tries: at least 1"):
        Plan(shape=SHAPE, gpu=PLAN.gpu, loads=LOADS, trace=TRACE, tries=0)


@pytest.fixture
def command(allocations: dict[str, Allocation], tmp_path: Path) -> list[str]:
    (tmp_path / "finalists.json").write_text(json.dumps({name: one.to_json() for name, one in allocations.items()}))
    write_trace(TRACE, tmp_path / "trace.json")
    config = {
        "model_type": "qwen2_moe", "hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 8,
        "num_experts_per_tok": 2, "shared_expert_intermediate_size": 128, "num_hidden_layers": 3,
        "_name_or_path": "small", "intermediate_size": 512,
    }  # fmt: skip
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    return [
        "--allocation", str(tmp_path / "finalists.json"), "--trace", str(tmp_path / "trace.json"), "--gpu", "rtx4090",
        "--loads", "decode=16,prefill=512", "--model", str(tmp_path / "small"), "--out", str(tmp_path / "found.json"),
    ]  # fmt: skip


def test_the_command(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command, bench=MadeUpBench()) == 0
    out = capsys.readouterr().out
    assert "measured on rtx4090: launches of all 3 layers" in out
    assert set(Latencies.read(tmp_path / "found.json").total_us) == {"mixed", "uniform"}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--gpu", "rtx4090"), "launches cannot be measured: no rtx4090 here ("),
        (("--allocation", "nothing.json"), "nothing.json: not a readable JSON file"),
        (("--out", "nowhere/found.json"), "its folder does not exist"),
        (("--loads", "x=0"), "--loads x=0"),
    ],
)
def test_mistakes_are_one_sentence(
    command: list[str], more: tuple[str, str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *more]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
