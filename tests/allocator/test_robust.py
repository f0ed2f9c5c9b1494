"""Regret under other loads, and the least worst case against a brute search of the loads' weights."""

import json
from pathlib import Path

import numpy as np
import pytest

from allocator import Budget, allocate
from allocator.robust import main
from allocator.robustness import latency_regrets, loss_of, loss_regrets, minimise_worst_case, reweighted
from allocator.sensitivity import Sensitivity
from profiles.errors import DataError, SpecError
from profiles.loads import TokenLoad, write_trace
from tests.allocator.tables import EXPERTS, LAYERS, MODEL, a_cost_table, a_sensitivity

BUDGET = Budget(avg_weight_bits=3.5)


def loads(seed: int, *, sigma: float = 1.5) -> dict[int, TokenLoad]:
    rng = np.random.default_rng(seed)
    counts = [rng.multinomial(4000, p / p.sum()) for p in rng.lognormal(0, sigma, (LAYERS, EXPERTS))]
    return {i: TokenLoad(tokens_per_expert=tuple(map(int, c)), source="drawn") for i, c in enumerate(counts)}


EVEN = {i: TokenLoad(tokens_per_expert=(250,) * EXPERTS, source="even") for i in range(LAYERS)}


@pytest.fixture(scope="module")
def several() -> dict[str, Sensitivity]:
    base = a_sensitivity()
    return {"code": reweighted(base, EVEN, loads(1), "code"), "chat": reweighted(base, EVEN, loads(2), "chat")}


def test_reweighting_goes_with_tokens() -> None:
    base = a_sensitivity()
    assert np.allclose(reweighted(base, EVEN, EVEN, "same").frame()["loss"], base.frame()["loss"])
    other = loads(3)
    frame = reweighted(base, EVEN, other, "other").frame()
    for layer, load in other.items():
        for expert in (0, 7):
            rows = (frame["layer"] == layer) & (frame["expert"] == expert) & (frame["scheme"] == "w2a16_g128_asym")
            share = max(load.tokens_per_expert[expert], 0.5) / load.total * EXPERTS
            assert np.allclose(frame["loss"][rows] / base.frame()["loss"][rows], share, rtol=1e-2)
    with pytest.raises(DataError, match="its trace has no layer 2"):
        reweighted(base, EVEN, {0: EVEN[0], 1: EVEN[1]}, "short")
    few = {i: TokenLoad(tokens_per_expert=(5, 5), source="few") for i in range(LAYERS)}
    with pytest.raises(DataError, match="layer 0 has 2 experts, the calibrated one 16"):
        reweighted(base, EVEN, few, "few")
    idle = other | {1: TokenLoad(tokens_per_expert=(0,) * EXPERTS, source="idle")}
    with pytest.raises(DataError, match="load idle: layer 1 of its trace has no tokens"):
        reweighted(base, EVEN, idle, "idle")


def test_no_regret_at_home_and_some_abroad(several: dict[str, Sensitivity]) -> None:
    home = allocate(several["code"], None, BUDGET)
    assert loss_of(home, several["code"]) == pytest.approx(home.predicted_loss)
    at = {one.load: one.regret for one in loss_regrets(home, several)}
    assert at["code"] == pytest.approx(0, abs=1e-9)
    assert at["chat"] > 0.01


def test_worst_case_is_certified_and_better(several: dict[str, Sensitivity]) -> None:
    found = minimise_worst_case(several, BUDGET)
    assert 1 <= found.bound <= found.worst <= found.bound * 1.02
    assert found.worst == max(found.ratios.values())
    for home in several.values():  # each load's own best is worse in the other's worst case
        regrets = loss_regrets(allocate(home, None, BUDGET), several)
        assert found.worst < 1 + max(one.regret for one in regrets)
    measured = {one.load: 1 + one.regret for one in loss_regrets(found.allocation, several)}
    assert measured == pytest.approx(dict(found.ratios))
    assert found.allocation.avg_weight_bits <= 3.5
    with pytest.raises(SpecError, match="at least one load"):
        minimise_worst_case({}, BUDGET)


def test_latency_regret_is_against_no_more_loss() -> None:
    sensitivity, table = a_sensitivity(), a_cost_table()
    blind = allocate(sensitivity, table, Budget(avg_weight_bits=6.0))
    at = {one.scenario: one for one in latency_regrets(blind, sensitivity, table, MODEL)}
    for scenario, us in blind.predicted_latency_us.items():
        assert at[scenario].latency_us == pytest.approx(us)
        assert at[scenario].regret >= 0
    tight = Budget(avg_weight_bits=6.0, max_latency_us={"prefill": at["prefill"].best_us * 1.001})
    fast = allocate(sensitivity, table, tight)
    assert fast.predicted_loss <= blind.predicted_loss * 1.01  # it can be had for the same loss, as was said


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = a_sensitivity()
    base.write(tmp_path / "s.parquet")
    a_cost_table().write(tmp_path / "c.parquet")
    allocate(base, a_cost_table(), BUDGET).write(tmp_path / "a.json")
    write_trace(EVEN, tmp_path / "even.json")
    write_trace(loads(1), tmp_path / "code.json")
    paths = ("--allocation", "a.json"), ("--sensitivity", "s.parquet"), ("--trace", "even.json"), ("--out", "o.json")
    call = [text for option, name in paths for text in (option, str(tmp_path / name))]
    call += ["--cost", str(tmp_path / "c.parquet"), "--load", f"code={tmp_path / 'code.json'}"]
    assert main([*call, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["load"] for one in found["loss"]] == ["calibrated", "code"]
    assert found["worst_case"]["worst"] - 1 < found["loss"][1]["regret"]
    assert main(call) == 0
    assert "least worst case" in capsys.readouterr().out
    for bad, says in (("code", "it is NAME=TRACE"), ("calibrated=x.json", "none of them 'calibrated'")):
        assert main([*call, "--load", bad]) == 2
        assert says in capsys.readouterr().err
