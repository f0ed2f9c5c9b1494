"""Speed at equal perplexity: what is launched, measured on devices that are made up, and put beside each other."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

import transformers

from allocator import Sensitivity
from allocator.latency import main as measure
from allocator.latency import read_finalists
from bench.speed_curve import main
from bench.speed_report import Row, compared
from profiles import schemes
from profiles.loads import log_normal, write_trace
from profiles.models import Linear, LinearId, model_from_config
from tests.allocator.benches import MadeUpBench
from tests.allocator.calibration import tiny

SCHEMES = ("w4a8_g128_sym", "w8a8_g-1_sym", "w4a16_g128_sym")


@pytest.mark.slow
def test_plan_quality_measure_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = tiny.SIZES | {"hidden_size": 128, "num_hidden_layers": 2}
    config = transformers.Qwen3MoeConfig(
        **sizes, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128, head_dim=16
    )
    folder, plan, out = tiny.save(config, tmp_path / "random"), tmp_path / "plan", tmp_path / "out"
    plan.mkdir()
    out.mkdir()
    np.save(folder / "a.npy", tiny.token_ids(256, 1).reshape(8, 32))
    np.save(folder / "b.npy", tiny.token_ids(256, 2).reshape(8, 32))
    shape, rng = model_from_config(folder), np.random.default_rng(0)
    losses = {
        (LinearId(layer=layer, expert=expert, linear=linear), scheme): weight * 4.0**-scheme.weight_bits
        for layer in range(2)
        for expert in range(8)
        for linear in Linear
        for weight in [float(rng.lognormal())]
        for scheme in map(schemes.parse, SCHEMES)
    }
    table = Sensitivity.from_losses(losses, model=shape.name, metric="m", data="d", num_samples=1, seed=0)
    table.write(tmp_path / "s.parquet")
    trace = tmp_path / "trace.json"
    write_trace({layer: log_normal(8, 4096, 2, layer) for layer in range(2)}, trace)
    size = tmp_path / "large.json"
    fields = {"hidden_size": 2048, "moe_intermediate_size": 1024, "num_experts": 8, "num_experts_per_tok": 2}
    size.write_text(json.dumps(fields | {"_name_or_path": "large", "model_type": "qwen3_moe", "num_hidden_layers": 2}))

    same = ["--size", str(size), "--trace", str(trace), "--loads", "t64=64"]
    asked = ["--uniform", ",".join(SCHEMES), "--trials", "4", "--out", str(plan)]
    assert main(["plan", *same, "--sensitivity", str(tmp_path / "s.parquet"), *asked]) == 0
    found = read_finalists([plan / "t64.json"])
    assert {*SCHEMES, "mixed, 30% of the way", "outer study"} <= set(found)
    us = {name: one.predicted_latency_us["t64"] for name, one in found.items()}
    for name, one in found.items():
        if name.startswith("mixed"):
            assert us["w4a8_g128_sym"] <= us[name] <= us["w8a8_g-1_sym"]
            assert one.predicted_loss <= found["w4a8_g128_sym"].predicted_loss

    texts = ["--data", str(folder / "b.npy"), "--calibration", str(folder / "a.npy"), "--length", "32"]
    assert main(["quality", "--model", str(folder), *texts, "--plan", str(plan)]) == 0
    given = ["--allocation", str(plan / "t64.json"), "--trace", str(trace), "--model", str(size), "--gpu", "h200"]
    assert measure([*given, "--loads", "t64=64", "--out", str(out / "t64.json")], bench=MadeUpBench()) == 0
    capsys.readouterr()
    assert main(["report", *same, "--plan", str(plan), "--latencies", str(out), "--out", str(out / "e.json")]) == 0
    assert capsys.readouterr().out == (out / "e.md").read_text()
    assert (out / "e.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((out / "e.json").read_text())["curves"]["t64"]
    assert len(rows) == len(found)
    assert all(row["measured_us"] > 0 and row["predicted_us"] > 0 for row in rows)
    assert all((row["faster"] is None) for row in rows if not row["is_mixed"])


def test_a_mixed_row_stands_beside_the_fastest_that_is_no_worse() -> None:
    def row(name: str, measured: float, added: float, perplexity: float, *, is_mixed: bool = False) -> Row:
        return Row(
            name=name, is_mixed=is_mixed, avg_weight_bits=4.0, perplexity=perplexity, mean_kl=perplexity / 10,
            added_us=added, predicted_us=measured, measured_us=measured,
        )  # fmt: skip

    rows = [row("fast", 10, 11, 9.0), row("good", 30, 28, 6.0), row("slow", 90, 95, 5.5)]
    rows += [row("mixed", 20, 16, 6.0, is_mixed=True), row("best", 40, 40, 5.0, is_mixed=True)]
    mixed, best = compared(rows)[3:]
    assert (mixed.beside, mixed.faster, mixed.faster_added) == ("good", 0.5, 0.75)
    assert (best.beside, best.faster) == (None, None)  # no uniform scheme is as good
    equal = compared([row("near", 30, 30, 6.0059), row("mixed", 20, 20, 6.0, is_mixed=True)])
    assert equal[1].beside == "near"
    assert equal[1].beside_kl is None  # its KL is more
    assert (mixed.beside_kl, mixed.faster_kl) == ("good", 0.5)


def test_a_folder_without_a_plan_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--sensitivity", "s", "--trace", "t", "--size", "x", "--out", str(tmp_path / "no")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
