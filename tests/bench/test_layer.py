"""bench.layer without a GPU: allocations, cells, what is compiled, and the report of rows like those it measures."""

import pandas as pd
import pytest

torch = pytest.importorskip("torch")

from bench.layer import report  # noqa: E402
from bench.layer.__main__ import main  # noqa: E402
from bench.layer.allocations import ALLOCATIONS, BF16, MIX_BITS, MIXED, UNIFORM, Group, allocation, total_bits  # noqa: E402
from bench.layer.cells import Cell, Given  # noqa: E402
from bench.layer.contenders import Variant, launches_of, per_expert  # noqa: E402
from bench.layer.layers import torch_layer  # noqa: E402
from bench.layer.measuring import read_measured, specs_needed  # noqa: E402
from bench.layer.reference import expected_output  # noqa: E402
from bench.layer.weights import LayerWeights, SchemeShare, num_sets  # noqa: E402
from profiles.errors import DataError, SpecError  # noqa: E402
from profiles.gpus import gpu  # noqa: E402
from profiles.models import Linear, MoeShape  # noqa: E402

CELL = Cell(model="qwen1.5-moe-a2.7b", tokens=16)


@pytest.mark.parametrize("num_experts", [8, 60, 128])
@pytest.mark.parametrize("mix", MIXED, ids=lambda mix: mix.name)
def test_a_mix_is_as_large_as_it_may_be(mix, num_experts) -> None:
    schemes = mix.per_expert(num_experts, 2048, seed=0)
    bits = total_bits(schemes, 2048) / num_experts
    step = mix.high.bits_per_weight(2048) - mix.middle.bits_per_weight(2048)
    assert len(schemes) == num_experts
    assert bits <= MIX_BITS < bits + step / num_experts
    assert len(set(schemes)) <= 4
    assert schemes != mix.per_expert(num_experts, 2048, seed=1) or num_experts == 8


def test_groups_and_names() -> None:
    assert BF16.group is Group.BF16
    assert {item.group for item in UNIFORM} == {Group.UNIFORM}
    assert {item.group for item in MIXED} == {Group.MIXED}
    assert [allocation(item.name) for item in ALLOCATIONS] == list(ALLOCATIONS)
    with pytest.raises(SpecError, match="allocation 'none': known are w16a16"):
        allocation("none")


def test_a_cell_draws_the_same_every_time() -> None:
    given, again = CELL.given("cpu"), CELL.given("cpu")
    assert all(torch.equal(a, b) for a, b in zip(given.tensors, again.tensors, strict=True))
    assert sum(given.counts) == given.ids.numel() == 64
    assert all(len(set(row)) == 4 for row in given.ids.tolist())
    assert torch.allclose(given.weights.sum(1), torch.ones(16))
    assert CELL.counts() == given.counts


def test_every_launch_of_a_mix_is_compiled() -> None:
    mix, h200 = MIXED[0], gpu("h200")
    launches = list(launches_of(mix, CELL, CELL.counts()))
    assert [len(schemes) for _, schemes, _ in launches if len(set(schemes)) > 1] == [60, 60]
    for linear in Linear:
        parts = [sum(counts) for found, schemes, counts in launches if found is linear and len(set(schemes)) == 1]
        assert sum(parts) == 64
    specs = specs_needed([CELL], [mix], h200, num_configs=2)
    assert {len(spec.schemes) for spec in specs} == {1, 3}
    assert len(set(specs)) == len(specs)


def test_sets_keep_l2_cold() -> None:
    assert num_sets(touched_bytes=30, l2_bytes=50) == 5
    assert num_sets(touched_bytes=1000, l2_bytes=50) == 2


@pytest.fixture
def tiny() -> MoeShape:
    return MoeShape(
        name="tiny",
        hidden_size=64,
        intermediate_size=64,
        num_experts=6,
        top_k=2,
        num_shared_experts=0,
        shared_intermediate_size=0,
        num_moe_layers=1,
    )


def test_experts_are_entries_of_the_whole_stack(tiny) -> None:
    weights = LayerWeights(tiny, "cpu")
    names = [MIXED[0].middle, MIXED[0].high, MIXED[0].middle, BF16.middle, MIXED[0].high, BF16.middle]
    mixed = weights.experts(Linear.GATE_UP, names)
    assert mixed.scheme_of_expert == tuple(names)
    whole = weights.experts(Linear.GATE_UP, [BF16.middle] * 6)
    place = mixed.schemes.index(BF16.middle)
    assert torch.equal(mixed.stacks[place].blob, whole.stacks[0].blob[[3, 5]])


def test_the_reference_is_the_moe_of_the_real_weights(tiny) -> None:
    weights = LayerWeights(tiny, "cpu")
    ids = torch.tensor([[0, 5], [3, 1]])
    given = Given(
        hidden=torch.randn(2, 64).to(torch.bfloat16), ids=ids, weights=torch.tensor([[1.0, 0.0], [0.5, 2.0]]), counts=()
    )
    schemes = [[MIXED[0].middle] * 6, [BF16.middle] * 6]
    found = expected_output(weights, schemes, given)

    def expert(token: int, index: int) -> torch.Tensor:
        first = weights.real(Linear.GATE_UP, MIXED[0].middle, index)
        gate, up = (given.hidden[token].float() @ first.T).chunk(2)
        product = (torch.nn.functional.silu(gate) * up).to(torch.bfloat16).float()
        return product @ weights.dense(Linear.DOWN, BF16.middle)[index].float().T

    assert torch.allclose(found[0], expert(0, 0), atol=1e-5)
    assert torch.allclose(found[1], 0.5 * expert(1, 3) + 2 * expert(1, 1), atol=1e-5)


def test_a_share_plans_its_own_experts_only(tiny) -> None:
    weights = LayerWeights(tiny, "cpu")
    mixed = weights.experts(Linear.DOWN, [BF16.middle, MIXED[0].middle] * 3)
    for index, experts in ((0, [0, 2, 4]), (1, [1, 3, 5])):
        share = SchemeShare(mixed, index)
        plan = share.bind(share.schemes).plan
        assert plan.tolist() == [[expert, 0, place, 0] for place, expert in enumerate(experts)]
        assert share.num_experts == 6
        assert share.scheme_of_expert == share.schemes * 3


def test_torchs_layer_is_the_moe(monkeypatch) -> None:
    def loop(x, weights, ends):
        out, start = torch.zeros(len(x), weights.shape[1], dtype=x.dtype), 0
        for expert, end in enumerate(ends.tolist()):
            out[start:end], start = x[start:end] @ weights[expert].T, end
        return out

    monkeypatch.setattr("bench.layer.layers.grouped_bf16", loop)
    generator = torch.Generator().manual_seed(0)
    gate_up, down = torch.randn(6, 32, 16, generator=generator), torch.randn(6, 16, 16, generator=generator)
    hidden, ids = torch.randn(5, 16, generator=generator), torch.randint(0, 6, (5, 2), generator=generator)
    weights = torch.rand(5, 2, generator=generator)
    expected = torch.zeros(5, 16)
    for token in range(5):
        for expert, weight in zip(ids[token], weights[token], strict=True):
            gate, up = (hidden[token] @ gate_up[expert].T).chunk(2)
            expected[token] += weight * ((torch.nn.functional.silu(gate) * up) @ down[expert].T)
    found = torch_layer(hidden, ids, weights, gate_up, down)
    assert torch.allclose(found.float(), expected, atol=0.5, rtol=0.02)


def row(allocation_name: str, latency_us: float, *, variant=Variant.OURS, tokens=16, part="", status="ok"):
    return {
        "model": CELL.model,
        "tokens": tokens,
        "seed": 0,
        "allocation": allocation_name,
        "group": allocation(allocation_name).group.value,
        "variant": variant.value,
        "part": part,
        "configs": "",
        "avg_bits": 4.25,
        "status": status,
        "error": "" if status == "ok" else "RuntimeError: no",
        "context_lost": False,
        "latency_us": latency_us,
        "least_us": latency_us,
        "most_us": latency_us,
        "num_samples": 30,
        "sm_clock_mhz": 1980.0,
        "reference_ratio": 1.0,
        "gpu": "h200",
        "versions": "{}",
        "timestamp": "2026-11-24T10:00:00+00:00",
    }


@pytest.fixture
def rows() -> pd.DataFrame:
    mix = MIXED[0].name
    return pd.DataFrame(
        [
            row(BF16.name, 200.0),
            row(BF16.name, 180.0, variant=Variant.TORCH_OUR_STEPS),
            row(mix, 50.0),
            row(mix, 75.0, variant=Variant.PER_SCHEME),
            row(mix, 60.0, variant=Variant.STREAMS),
            row(mix, 55.0, part="without swiglu"),
            row(mix, 4.0, part="up to gather"),
            row(mix, 30.0, part="up to gemm 1"),
            row(BF16.name, float("nan"), variant=Variant.TORCH, status="failed"),
        ]
    )


def test_the_report_compares_with_the_fastest_bf16_layer(rows) -> None:
    whole = report.whole_layers(rows)
    mix = whole[(whole["allocation"] == MIXED[0].name) & (whole["variant"] == Variant.OURS.value)].iloc[0]
    assert mix["best_bf16"] == Variant.TORCH_OUR_STEPS.value
    assert mix["speedup"] == pytest.approx(3.6)
    split = report.against_split(whole).iloc[0]
    assert split["gain, a launch a scheme"] == pytest.approx(1.5)
    assert split["gain, a launch a scheme, on streams"] == pytest.approx(1.2)
    assert report.parts(rows).iloc[0][["gather", "gemm 1"]].tolist() == [4.0, 26.0]
    assert report.fusions(rows).iloc[0]["without swiglu"] == pytest.approx(1.1)


def test_the_command_reports_what_was_measured(rows, tmp_path, capsys) -> None:
    rows.to_parquet(tmp_path / "layer.parquet")
    assert main(["--out", str(tmp_path)]) == 0
    assert "3.60 to 3.60 times as fast" in capsys.readouterr().out
    text = (tmp_path / "layer.md").read_text()
    assert "50.0 (3.60)" in text
    assert "torch: RuntimeError: no" in text
    assert (tmp_path / "layer.png").stat().st_size > 1000


def test_mistakes_are_one_sentence(tmp_path, capsys) -> None:
    assert main(["--out", str(tmp_path)]) == 2
    assert "is not there: measure with --measure" in capsys.readouterr().err
    (tmp_path / "layer.parquet").write_text("no")
    assert main(["--out", str(tmp_path)]) == 2
    assert "not a readable file of measured layers" in capsys.readouterr().err
    pd.DataFrame({"model": [1]}).to_parquet(tmp_path / "layer.parquet")
    with pytest.raises(DataError, match="it lacks tokens"):
        read_measured(tmp_path / "layer.parquet")
    assert main(["--measure", "--allocations", "none", "--out", str(tmp_path)]) == 2
    assert "allocation 'none'" in capsys.readouterr().err


def test_each_linear_has_its_own_draw() -> None:
    assert per_expert(MIXED[0], CELL, Linear.GATE_UP) != per_expert(MIXED[0], CELL, Linear.DOWN)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_measuring_needs_a_gpu(tmp_path, capsys) -> None:
    assert main(["--measure", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("--measure: torch sees no GPU")
