"""The one command, end to end on a random model: each stage once, then found; a killed run goes on; mistakes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from allocator import Allocation
from allocator.scenarios import (
    Batch,
    learned_table,
    parse_loads,
    predicted_table,
    profiled_table,
    skewed_load,
    typical_load,
)
from allocator.stages import Stages
from allocator.study.evidence import Evidence
from allocator.study.pricing import Pricer
from allocator.study.problem import LaunchKind
from allocator.tune import main
from allocator.verify import Verification
from costmodel import shipped
from costmodel.table import CostTable
from kernel_gen.legality import reasons
from kernel_gen.select import table_size
from kernel_gen.space import Effort, candidates
from profiles import kernels, schemes
from profiles.errors import DataError, SpecError
from profiles.gpus import gpu
from profiles.kernels import GemmShape
from profiles.loads import TokenLoad, log_normal
from profiles.models import Linear, model
from profiles.records import Status
from tests.allocator.benches import MadeUpBench

SCHEMES = "w16a16,w8a16_g-1_sym,w4a16_g-1_asym,w2a16_g-1_asym"
QWEN = model("qwen1.5-moe-a2.7b")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    from tests.allocator.calibration import tiny

    folder = tiny.save(tiny.CONFIGS["qwen3_moe"], tmp_path_factory.mktemp("models") / "tiny")
    np.save(folder / "calibrate.npy", tiny.token_ids(512, 1).reshape(8, 64))
    np.save(folder / "held_out.npy", tiny.token_ids(512, 2).reshape(8, 64))
    return folder


def call(checkpoint: Path, out: Path, *more: str) -> list[str]:
    return [
        "--model", str(checkpoint), "--gpu", "h200", "--budget-bits", "4.6", "--loads", "decode,prefill=512",
        "--data", str(checkpoint / "calibrate.npy"), "--held-out", str(checkpoint / "held_out.npy"),
        "--schemes", SCHEMES, "--sequence-length", "64", "--num-sequences", "8", "--batch-size", "8",
        "--max-rows", "64", "--out", str(out), "--quiet", "--json", *more,
    ]  # fmt: skip


def test_end_to_end_then_found(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(call(checkpoint, tmp_path)) == 0
    first = json.loads(capsys.readouterr().out)
    stages = ("trace", "calibrate", "cost", "allocate", "study", "verify", "report")
    assert first["stages"] == dict.fromkeys(stages, "made")
    assert first["latency_source"] == "predicted"
    assert "predicted, not measured" in first["notes"][0]
    assert "fitted on h200's launches that come with bitile" in first["notes"][0]
    assert CostTable.read(tmp_path / "cost.parquet").model_version.startswith("latency-")
    assert "latencies of finalists are predicted, not measured: no h200 here" in first["notes"][1]
    allocation = Allocation.read(tmp_path / "allocation.json")
    assert allocation.avg_weight_bits <= 4.6
    assert set(allocation.predicted_latency_us) == {"decode", "prefill"}
    measured = first["verification"]["finalists"]
    assert first["chosen"] == measured[0]["name"]
    assert measured[0]["mean_kl"] == min(one["mean_kl"] for one in measured)
    assert {"mixed", "one scheme a layer", "uniform w2a16_g-1_asym", "study"} <= {one["name"] for one in measured}
    assert all(set(one["launch_us"]) == {"decode", "prefill"} and one["measured_us"] == {} for one in measured)
    kl = {one["name"]: one["mean_kl"] for one in measured}
    assert kl["mixed"] < kl["uniform w2a16_g-1_asym"]
    assert "Predicted and measured" in (tmp_path / "report.html").read_text()

    assert main(call(checkpoint, tmp_path)) == 0
    again = json.loads(capsys.readouterr().out)
    assert set(again.pop("stages").values()) == {"found"}
    assert again == {key: value for key, value in first.items() if key != "stages"}

    assert main([*call(checkpoint, tmp_path), "--budget-bits", "8.6"]) == 0  # what it changes is made again, no more
    richer = json.loads(capsys.readouterr().out)
    made = {name for name, state in richer["stages"].items() if state == "made"}
    assert made == {"allocate", "study", "verify", "report"}
    (tmp_path / "cost.parquet").write_bytes(b"torn")
    assert main([*call(checkpoint, tmp_path), "--budget-bits", "8.6"]) == 0
    mended = json.loads(capsys.readouterr().out)
    assert {name for name, state in mended["stages"].items() if state == "made"} == {"cost"}
    assert mended["predicted_loss"] == richer["predicted_loss"]


def test_launches_are_measured_where_the_gpu_is(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    limits = ("--max-latency", "decode=1e6", "--study-trials", "6")
    assert main(call(checkpoint, out, *limits)) == 0
    predicted = json.loads(capsys.readouterr().out)
    bench = MadeUpBench()
    assert main(call(checkpoint, out, *limits), bench=bench) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name for name, state in found["stages"].items() if state == "made"} == {"latency", "report"}
    assert bench.measured
    finalists = found["verification"]["finalists"]
    assert all(set(one["measured_us"]) == {"decode", "prefill"} for one in finalists)
    assert "measured on h200: all 3 layers" in found["notes"][-1]
    text = (out / "report.html").read_text()
    assert "decode, us measured" in text
    assert f"{finalists[0]['measured_us']['decode']:,.1f}" in text
    assert "/ " in report_of(checkpoint, out, bench, limits, capsys)

    bench = MadeUpBench()
    assert main(call(checkpoint, out, *limits), bench=bench) == 0  # found again, not measured again
    assert json.loads(capsys.readouterr().out)["stages"]["latency"] == "found"
    assert bench.measured == []

    # A limit that only the finalist of most loss holds as measured: it comes first, whatever was predicted.
    decode = {one["name"]: one["measured_us"]["decode"] for one in finalists}
    least = min(decode, key=lambda name: decode[name])
    assert decode[least] < min(us for name, us in decode.items() if name != least)
    ranked = Verification.read(out / "verification.json").ranked({"decode": decode[least]})
    assert ranked.finalists[0].name == least
    by_latency = Verification.read(out / "verification.json").ranked({}, loss_weight=0.0)
    totals = [sum(us / min(decode.values()) for us in [one.measured_us["decode"]]) for one in by_latency.finalists]
    assert totals == sorted(totals)

    # Measured elsewhere and brought here.
    (out / "latencies.json").rename(tmp_path / "brought.json")
    assert main(call(checkpoint, out, *limits, "--latencies", str(tmp_path / "brought.json"))) == 0
    brought = json.loads(capsys.readouterr().out)
    assert [one["measured_us"] for one in brought["verification"]["finalists"]] == [
        one["measured_us"] for one in finalists
    ]
    assert "(brought.json)" in brought["notes"][-1]
    assert predicted["verification"]["finalists"][0]["measured_us"] == {}


def report_of(checkpoint: Path, out: Path, bench: MadeUpBench, more: tuple[str, ...], capsys) -> str:
    arguments = [argument for argument in call(checkpoint, out, *more) if argument != "--json"]
    assert main(arguments, bench=bench) == 0
    return capsys.readouterr().out


def test_a_study_is_left_out_where_it_cannot_be(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(call(checkpoint, tmp_path, "--granularity", "expert")) == 0
    found = json.loads(capsys.readouterr().out)
    assert "study" not in found["stages"]
    assert "--granularity asks for expert" in found["notes"][1]
    assert main(call(checkpoint, tmp_path, "--study-trials", "0")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["notes"][1] == "no outer study: --study-trials 0"
    assert "study" not in {one["name"] for one in found["verification"]["finalists"]}


@pytest.mark.timeout(400)
def test_a_killed_run_goes_on(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "allocator.tune", *call(checkpoint, tmp_path)]
    command.remove("--quiet")
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "layer" in line:  # calibration has its first layer
                process.kill()
                break
    assert not (tmp_path / "losses.parquet").exists()
    assert main(call(checkpoint, tmp_path)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stages"]["trace"] == "found"
    assert found["stages"]["calibrate"] == "made"
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--model", "nowhere"), "no such folder"),
        (("--gpu", "abacus"), "abacus"),
        (("--loads", "noon"), "decode, prefill are known; give noon a number of tokens"),
        (("--max-latency", "lunch=3"), "not one of --loads, decode, prefill"),
        (("--data", "nothing.txt"), "--data: no file nothing.txt"),
        (("--profile", "nothing.parquet"), "--profile nothing.parquet: no such file"),
        (("--budget-bits", "-1"), "avg_weight_bits is -1.0"),
        (("--schemes", "w5"), "w5"),
        (("--latencies", "nothing.json"), "--latencies nothing.json: no such file"),
        (("--loss-weight", "2"), "the loss weight must be from 0 to 1, not 2.0"),
        (("--study-trials", "-1"), "study trials: 0 for none, or a number, not -1"),
    ],
)
def test_mistakes_are_one_sentence(
    checkpoint: Path, tmp_path: Path, more: tuple[str, str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(call(checkpoint, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_loads() -> None:
    assert parse_loads("decode,long=9000") == {"decode": Batch(num_tokens=64), "long": Batch(num_tokens=9000)}
    assert parse_loads("decode@p95") == {"decode": Batch(num_tokens=64, skew_percentile=95)}
    for bad in ("decode,decode", "x=", "x=0", "=3", "decode@95", "decode@p0", "decode@p100", "decode@", "x@p5"):
        with pytest.raises(SpecError, match="--loads"):
            parse_loads(bad)
    rng = np.random.default_rng(0)
    trace = {i: TokenLoad(tokens_per_expert=tuple(rng.permutation(60).tolist()), source="t") for i in range(3)}
    load = typical_load(trace, QWEN, 1000, "decode")
    assert load == typical_load(trace, QWEN, 1000, "decode")
    counts = np.array(load.tokens_per_expert)
    assert load.total == 4000
    assert np.all(np.diff(counts) <= 0)
    assert np.allclose(counts, 4000 * np.arange(59, -1, -1) / 1770, atol=12)  # the busiest of equals has more
    one_hot = {0: TokenLoad(tokens_per_expert=(100, *(0,) * 59), source="t")}
    crowded = typical_load(one_hot, QWEN, 10, "x")  # a token goes to four different experts
    assert crowded.total == 40
    assert crowded.max == 10
    with pytest.raises(SpecError, match="at least 1 token"):
        typical_load(trace, QWEN, 0, "x")
    for bad in (
        {},
        {0: TokenLoad(tokens_per_expert=(0,) * 60, source="t")},
        {0: TokenLoad(tokens_per_expert=(1,), source="t")},
    ):
        with pytest.raises(DataError, match="the 60 experts of"):
            typical_load(bad, QWEN, 8, "x")


@pytest.mark.parametrize("name", ["qwen1.5-moe-a2.7b", "mixtral-8x7b", "deepseek-v3"])
@pytest.mark.parametrize("num_tokens", [1, 4, 16, 64, 512])
def test_a_typical_load_has_as_many_active_experts_as_real_draws(name: str, num_tokens: int) -> None:
    """The law of independent tokens, and draws by another way of routing: Gumbel top-k of the logits."""
    shape = model(name)
    trace = {layer: log_normal(shape.num_experts, 8192, shape.top_k, layer) for layer in range(4)}
    load = typical_load(trace, shape, num_tokens, "decode")
    assert load.total == num_tokens * shape.top_k
    assert load.max <= num_tokens
    shares = [np.array(one.tokens_per_expert) / one.total for one in trace.values()]
    expected = np.mean([np.sum(1 - (1 - np.minimum(1, shape.top_k * share)) ** num_tokens) for share in shares])
    assert abs(load.num_active - expected) <= 1.5  # rounding alone is half an expert, 64 draws a layer the rest
    drawn = [
        np.bincount(
            np.argsort(-(np.log(share) + rng.gumbel(size=(num_tokens, len(share)))))[:, : shape.top_k].ravel(),
            minlength=len(share),
        )
        for share in shares
        for rng in map(np.random.default_rng, range(20))
    ]
    assert abs(load.num_active - np.mean([np.count_nonzero(counts) for counts in drawn])) <= 2.5
    assert load.max == pytest.approx(np.mean([counts.max() for counts in drawn]), rel=0.15, abs=1)


def test_a_percentile_of_the_routing_skew() -> None:
    """So many of a hundred real draws are less skewed."""
    trace = {layer: log_normal(60, 8192, 4, layer) for layer in range(3)}
    loads = [skewed_load(trace, QWEN, 64, percentile, "decode") for percentile in (5, 50, 95)]
    assert all(load.total == 256 and load.max <= 64 for load in loads)
    spreads = [load.spread for load in loads]
    assert spreads == sorted(spreads)
    assert loads[0].num_active > loads[2].num_active
    rng, drawn = np.random.default_rng(5), []
    for layer in trace.values():
        logits = np.log(np.array(layer.tokens_per_expert))
        for _ in range(100):
            picked = np.argsort(-(logits + rng.gumbel(size=(64, 60))))[:, :4]
            drawn.append(np.bincount(picked.ravel(), minlength=60).std() / (256 / 60))
    for spread, percentile in zip(spreads, (5, 50, 95), strict=True):
        assert np.mean(np.array(drawn) < spread) == pytest.approx(percentile / 100, abs=0.1)


def test_predicted_and_profiled_tables_agree() -> None:
    loads = {"decode": typical_load({0: TokenLoad(tokens_per_expert=(5,) * 60, source="t")}, QWEN, 64, "decode")}
    some = tuple(map(schemes.parse, ("w4a16_g128_asym", "w8a8_g-1_sym")))
    table = predicted_table(gpu("h200"), QWEN, loads, some)
    frame = table.frame()
    assert set(frame["linear"]) == {"gate_up", "down", "shared_gate_up", "shared_down"}
    rows = [
        {
            "model": row["model"], "gpu": "h200", "linear": row["linear"], "status": Status.OK.value,
            "schemes": (row["scheme"],), "load_source": "some load", "latency_us": row["latency_us"],
            "tokens_per_expert": (64,) if row["linear"].startswith("shared") else loads["decode"].tokens_per_expert,
            "p20_us": row["latency_us"], "p80_us": row["latency_us"], "config": row["config"], "source": "measured",
        }
        for _, row in frame.iterrows()
    ]  # fmt: skip
    profile = pd.DataFrame(rows)
    looked_up, notes = profiled_table(profile, gpu("h200"), QWEN, loads)
    assert notes == ()
    assert np.allclose(looked_up.frame()["latency_us"], frame["latency_us"])
    assert set(looked_up.frame()["source"]) == {"measured"}
    more = {"prefill": TokenLoad(tokens_per_expert=(100,) * 60, source="p")}
    assert "no rows of 1500 tokens" in profiled_table(profile, gpu("h200"), QWEN, more)[1][0]
    with pytest.raises(DataError, match=r"no rows of mixtral-8x7b on h200; it has qwen1\.5"):
        profiled_table(profile, gpu("h200"), model("mixtral-8x7b"), loads)


def test_a_learned_table_has_every_linear_and_follows_what_was_measured() -> None:
    loads = {"decode": typical_load({0: log_normal(60, 8192, 4, 0)}, QWEN, 16, "decode")}
    some = tuple(map(schemes.parse, ("w4a16_g128_sym", "w8a8_g-1_sym", "w4a16_g64_asym")))
    h200 = gpu("h200")
    learned, analytic = learned_table(shipped.fitted(h200), QWEN, loads, some), predicted_table(h200, QWEN, loads, some)
    key = ["linear", "scheme", "scenario"]
    both = learned.frame().merge(analytic.frame(), on=key)
    assert len(both) == len(learned.frame()) == len(analytic.frame())
    assert set(both["linear"]) == {"gate_up", "down", "shared_gate_up", "shared_down"}
    assert (both["latency_us_x"] / both["latency_us_y"]).between(0.4, 2.5).all()
    evidence = Evidence.from_cost_table(learned, QWEN.name, QWEN.num_experts, loads)
    pricer = Pricer(replace(evidence, latency_model=shipped.fitted(h200)), ())
    kind = LaunchKind(linear="down", shape=GemmShape(m=1, n=QWEN.gemm(Linear.DOWN)[0], k=QWEN.gemm(Linear.DOWN)[1]),
                      loads=loads, rows=np.zeros((1, 60), dtype=np.int64))  # fmt: skip
    quick = candidates(some[:1], h200, Effort.QUICK, max_experts=60)
    least = pricer.uniforms_us(kind, "decode", some[:1], quick).min()
    row = learned.frame().query("linear == 'down' and scheme == 'w4a16_g128_sym'").iloc[0]
    assert row["latency_us"] <= least * (1 + 1e-6)  # a study finds nothing faster for one scheme than the table has
    with pytest.raises(SpecError, match="none of w4a4_g128_sym has a kernel for h200"):
        learned_table(shipped.fitted(h200), QWEN, loads, [schemes.parse("w4a4_g128_sym")])


def test_tables_name_kernels_that_a_study_can_build() -> None:
    """Kernels are built for tables of at least 256 experts, which few experts' largest tiles do not leave room for."""
    few, h200 = model("mixtral-8x7b"), gpu("h200")
    loads = {"prefill": typical_load({0: TokenLoad(tokens_per_expert=(5,) * 8, source="t")}, few, 4096, "prefill")}
    some = tuple(map(schemes.parse, ("w16a16", "w8a8_g-1_sym")))
    for table in (learned_table(shipped.fitted(h200), few, loads, some), predicted_table(h200, few, loads, some)):
        for row in table.frame().itertuples():
            size = table_size(few.num_experts)
            assert reasons(kernels.parse(row.config), (schemes.parse(row.scheme),), h200, max_experts=size) == ()


def test_a_stage_is_found_by_content(tmp_path: Path) -> None:
    source, out, made = tmp_path / "in", tmp_path / "out", []
    source.write_text("a")

    def ensure(text: str, setting: int = 0) -> None:
        def make() -> None:
            made.append(text)
            out.write_text(text)

        Stages(folder=tmp_path, say=lambda _: None).ensure(
            "copy", make, reads=[source], settings={"setting": setting}, writes=[out]
        )

    ensure("one")
    ensure("two")  # the same inputs: found
    source.write_text("b")
    ensure("three")
    ensure("four", setting=1)
    out.write_text("changed by hand")
    ensure("five", setting=1)
    (tmp_path / ".copy.stage.json").write_text("{")
    ensure("six", setting=1)
    assert made == ["one", "three", "four", "five", "six"]
