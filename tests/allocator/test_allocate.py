"""From tables to an allocation, by the function and by the command."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

from allocator import Allocation, Budget, Granularity, InfeasibleError, Options, allocate
from allocator.solve import main
from profiles import schemes
from profiles.errors import DataError, SpecError
from profiles.models import Linear, LinearId
from tests.allocator.tables import EXPERTS, LAYERS, MODEL, SCHEMES, a_cost_table, a_sensitivity


def weight_bits(allocation: Allocation) -> float:
    """Average stored bits, added up from the assignment."""
    bits = weights = 0.0
    for block, scheme in allocation.assignment.items():
        n, k = MODEL.gemm(block.linear)
        bits, weights = bits + n * k * scheme.bits_per_weight(k), weights + n * k
    return bits / weights


def test_it_keeps_its_budget_and_beats_every_uniform_scheme_within_it() -> None:
    limit = {"decode": 225.0, "prefill": 2250.0}
    allocation = allocate(a_sensitivity(), a_cost_table(), Budget(avg_weight_bits=4.25, max_latency_us=limit))
    assert len(allocation.assignment) == LAYERS * EXPERTS * 2
    assert weight_bits(allocation) == pytest.approx(allocation.avg_weight_bits, rel=1e-12)
    assert allocation.avg_weight_bits <= 4.25 * (1 + 1e-12)
    assert all(allocation.predicted_latency_us[name] <= us * (1 + 1e-12) for name, us in limit.items())
    assert allocation.gap <= 1e-2
    within = [uniform for uniform in allocation.uniform if uniform.within_budget]
    assert within
    assert all(allocation.predicted_loss < uniform.loss for uniform in within)
    assert {uniform.scheme.name for uniform in allocation.uniform} == set(SCHEMES)


def test_latency_and_loss_add_up() -> None:
    sensitivity, table = a_sensitivity(), a_cost_table()
    allocation = allocate(sensitivity, table, Budget(avg_weight_bits=5.0))
    losses = {(r.layer, r.expert, r.linear, r.scheme): r.loss for r in sensitivity.frame().itertuples()}
    loss = latency = 0.0
    for block, scheme in allocation.assignment.items():
        loss += losses[block.layer, block.expert, block.linear.value, scheme.name]
        whole = table.latency_us(model=MODEL.name, linear=block.linear.value, scheme=scheme, scenario="decode")
        latency += whole / MODEL.num_experts
    assert loss == pytest.approx(allocation.predicted_loss)
    assert latency == pytest.approx(allocation.predicted_latency_us["decode"])
    uniform = next(u for u in allocation.uniform if u.scheme.name == "w16a16")
    whole = sum(
        table.latency_us(model=MODEL.name, linear=linear.value, scheme=uniform.scheme, scenario="decode")
        for linear in Linear
    )
    assert uniform.latency_us["decode"] == pytest.approx(LAYERS * whole * EXPERTS / MODEL.num_experts)


@pytest.mark.parametrize("granularity", Granularity)
def test_granularity_ties_what_it_says(granularity: Granularity) -> None:
    options = Options(granularity=granularity)
    allocation = allocate(a_sensitivity(), a_cost_table(), Budget(avg_weight_bits=4.5), options=options)
    tied = defaultdict(set)
    launches = defaultdict(set)
    for block, scheme in allocation.assignment.items():
        key = {
            Granularity.LINEAR: (block.layer, block.expert, block.linear),
            Granularity.PROJECTION: (block.layer, block.linear),
            Granularity.EXPERT: (block.layer, block.expert),
            Granularity.LAYER: (block.layer,),
        }[granularity]
        tied[key].add(scheme)
        launches[block.layer, block.linear].add(scheme)
    assert all(len(found) == 1 for found in tied.values())
    assert all(len(found) <= 4 for found in launches.values())


def test_finer_granularity_loses_no_more() -> None:
    order = (Granularity.LINEAR, Granularity.EXPERT, Granularity.LAYER)
    budget = Budget(avg_weight_bits=4.5)
    loss = [allocate(a_sensitivity(), None, budget, options=Options(granularity=g)).predicted_loss for g in order]
    assert loss == sorted(loss)


def test_schemes_pins_and_slots() -> None:
    pinned = {LinearId(layer=0, expert=5, linear=Linear.DOWN): schemes.parse("w16a16")}
    some = tuple(schemes.parse(name) for name in ("w16a16", "w4a16_g128_asym", "w2a16_g128_asym"))
    options = Options(schemes=some, pinned=pinned, max_schemes=2)
    allocation = allocate(a_sensitivity(), None, Budget(avg_weight_bits=4.0), options=options)
    assert set(allocation.assignment.values()) <= set(some)
    assert allocation.assignment[LinearId(layer=0, expert=5, linear=Linear.DOWN)].name == "w16a16"
    for layer in range(LAYERS):
        for linear in Linear:
            assert len({s for b, s in allocation.assignment.items() if (b.layer, b.linear) == (layer, linear)}) <= 2


def test_a_budget_in_bytes_is_the_budget_in_bits() -> None:
    by_bits = allocate(a_sensitivity(), None, Budget(avg_weight_bits=4.0))
    weights = LAYERS * EXPERTS * sum(n * k for n, k in map(MODEL.gemm, Linear))
    by_bytes = allocate(a_sensitivity(), None, Budget(weight_bytes=weights * 4 // 8))
    assert by_bytes.assignment == by_bits.assignment
    assert by_bytes.weight_bytes <= weights * 4 // 8


def test_a_budget_per_layer_holds_in_every_layer() -> None:
    allocation = allocate(a_sensitivity(), None, Budget(avg_weight_bits=4.0, per_layer=True))
    for layer in range(LAYERS):
        bits = weights = 0.0
        for block, scheme in allocation.assignment.items():
            n, k = MODEL.gemm(block.linear)
            if block.layer == layer:
                bits, weights = bits + n * k * scheme.bits_per_weight(k), weights + n * k
        assert bits / weights <= 4.0 * (1 + 1e-12)


def test_a_scheme_without_a_kernel_is_not_chosen_and_the_others_have_one() -> None:
    table = a_cost_table(without=("w3a16_g128_asym",))
    allocation = allocate(a_sensitivity(), table, Budget(avg_weight_bits=3.5))
    used = {scheme.name for scheme in allocation.assignment.values()}
    assert "w3a16_g128_asym" not in used
    assert {kernel.scheme.name for kernel in allocation.kernel_configs} == used
    assert {kernel.scenario for kernel in allocation.kernel_configs} == {"decode", "prefill"}


def test_what_does_not_fit_together_is_refused() -> None:
    sensitivity = a_sensitivity()
    with pytest.raises(SpecError, match="needs a cost table"):
        allocate(sensitivity, None, Budget(max_latency_us={"decode": 1.0}))
    with pytest.raises(SpecError, match="no scenario 'chat'"):
        allocate(sensitivity, a_cost_table(), Budget(max_latency_us={"chat": 1.0}))
    with pytest.raises(SpecError, match="no losses for w8a8_g-1_sym_e4m3"):
        allocate(
            sensitivity,
            None,
            Budget(avg_weight_bits=4.0),
            options=Options(schemes=(schemes.parse("w8a8_g-1_sym_e4m3"),)),
        )
    with pytest.raises(DataError, match="expert 64 of layer 0"):
        allocate(a_sensitivity(experts=65), None, Budget(avg_weight_bits=4.0))
    with pytest.raises(InfeasibleError, match=r"avg_bits 1 is 1\.25 below"):
        allocate(sensitivity, None, Budget(avg_weight_bits=1.0))


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, list[str]]:
    a_sensitivity().write(tmp_path / "s.parquet")
    a_cost_table().write(tmp_path / "c.parquet")
    out = tmp_path / "a.json"
    return out, ["--sensitivity", str(tmp_path / "s.parquet"), "--cost", str(tmp_path / "c.parquet"), "--out", str(out)]


def test_a_linear_without_a_latency_is_named() -> None:
    table = a_cost_table().frame()
    some = type(a_cost_table())(table[table["linear"] != "down"])
    with pytest.raises(DataError, match="layer 0 expert 0 down has no scheme left"):
        allocate(a_sensitivity(), some, Budget(avg_weight_bits=4.0))


def test_the_command_writes_what_the_function_returns(
    files: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, arguments = files
    assert main([*arguments, "--budget-bits", "4.25", "--max-latency", "decode=225"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for word in (
        "mixed",
        "w4a16_g128_asym",
        "beyond the budget",
        "gap",
        "the next 0.1 avg_bits",
        "max_latency_us[decode]",
    ):
        assert word in printed.out
    budget = Budget(avg_weight_bits=4.25, max_latency_us={"decode": 225.0})
    assert Allocation.read(out) == allocate(a_sensitivity(), a_cost_table(), budget)


def test_the_command_prints_one_json_object(files: tuple[Path, list[str]], capfd: pytest.CaptureFixture[str]) -> None:
    out, arguments = files
    assert main([*arguments, "--budget-bits", "3.5", "--granularity", "expert", "--max-schemes", "3", "--json"]) == 0
    content = json.loads(capfd.readouterr().out)
    assert content["granularity"] == "expert"
    assert sum(content["linears_per_scheme"].values()) == LAYERS * EXPERTS * 2
    assert content["predicted_loss"] == Allocation.read(out).predicted_loss


def test_pinned_layers_keep_their_scheme(files: tuple[Path, list[str]]) -> None:
    out, arguments = files
    pins = ["--pin", "0=w8a16_g-1_sym", "--pin", "1-2=w4a16_g128_asym"]
    assert main([*arguments, "--budget-bits", "6", *pins]) == 0
    found = Allocation.read(out).assignment
    assert {(block.layer, scheme.name) for block, scheme in found.items()} == {
        (0, "w8a16_g-1_sym"),
        (1, "w4a16_g128_asym"),
        (2, "w4a16_g128_asym"),
    }


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ([], "a budget needs a limit"),
        (["--budget-bits", "-4"], "positive"),
        (["--budget-bits", "nan"], "positive"),
        (["--budget-bits", "1"], "the budget cannot be met: avg_bits 1 is 1.25 below the least possible, 2.25"),
        (["--budget-bits", "4", "--budget-bytes", "9"], "not both"),
        (["--budget-bits", "4", "--max-latency", "decode"], "--max-latency decode"),
        (["--budget-bits", "4", "--max-latency", "=5"], "--max-latency =5"),
        (["--budget-bits", "4", "--max-latency", "decode=fast"], "--max-latency decode=fast"),
        (["--budget-bits", "4", "--max-latency", "chat=5"], "no scenario 'chat'"),
        (["--budget-bits", "4", "--max-latency", "decode=5"], "below the least possible"),
        (["--budget-bits", "4", "--schemes", "w5a5"], "w5a5"),
        (["--budget-bits", "4", "--max-schemes", "0"], "max_schemes"),
        (["--budget-bits", "4", "--model", "gpt-9"], "gpt-9"),
        (["--budget-bits", "4", "--sensitivity", "nowhere.parquet"], "nowhere.parquet: no such file"),
        (["--budget-bits", "4", "--out", "nowhere/a.json"], "its folder does not exist"),
        (["--budget-bits", "4", "--out", "."], "--out .: it is a folder"),
        (["--budget-bytes", "10"], "avg_bits of 1 is 37,748,736 bytes here"),
        (["--max-latency", "decode=9", "--max-latency", "decode=10"], "decode has a limit already, of 9 us"),
        (["--budget-bits", "4", "--pin", "0"], "--pin 0: it is LAYER=SCHEME"),
        (["--budget-bits", "4", "--pin", "0-9=w16a16"], "it has 3 layers from 0 to 2"),
        (["--budget-bits", "4", "--pin", "2-1=w16a16"], "the sensitivity has no such layers"),
        (
            ["--budget-bits", "4", "--pin", "0-1=w16a16", "--pin", "1=w4a4_g-1_sym"],
            "layer 1 is pinned to w16a16 already",
        ),
        (["--budget-bits", "4", "--pin", "0=w16a16"], "the budget cannot be met"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    files: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str], extra: list[str], says: str
) -> None:
    out, arguments = files
    assert main([*arguments, *extra]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert says in printed.err
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert not out.exists()
