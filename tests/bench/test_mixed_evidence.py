"""The evidence command on a random model: same size, same quantiser, and a speed-up only over what is no worse."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

import transformers

from allocator import Sensitivity
from bench.mixed_evidence import Row, main, markdown, priced_as
from profiles import schemes
from profiles.errors import DataError
from profiles.models import Linear, LinearId, model_from_config
from tests.allocator.calibration import tiny

PROFILE = Path(__file__).parents[2] / "profiles" / "data" / "h200" / "hopper.parquet"
SCHEMES = ("w2a16_g128_asym", "w3a16_g128_asym", "w8a16_g-1_sym", "w4a4_g128_sym", "w8a8_g-1_sym", "w2a16_g-1_asym")


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = tiny.SIZES | {"hidden_size": 128, "num_hidden_layers": 2}
    config = transformers.Qwen3MoeConfig(
        **sizes, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128, head_dim=16
    )
    folder = tiny.save(config, tmp_path / "random")
    np.save(folder / "a.npy", tiny.token_ids(256, 1).reshape(8, 32))
    np.save(folder / "b.npy", tiny.token_ids(256, 2).reshape(8, 32))
    rng, shape = np.random.default_rng(0), model_from_config(folder)
    losses = {
        (LinearId(layer=layer, expert=expert, linear=linear), scheme): weight * 4.0**-scheme.weight_bits
        for layer in range(2)
        for expert in range(shape.num_experts)
        for linear in Linear
        for weight in [float(rng.lognormal())]
        for scheme in map(schemes.parse, SCHEMES)
    }
    where = {"model": shape.name, "metric": "m", "data": "d", "num_samples": 1, "seed": 0}
    Sensitivity.from_losses(losses, **where).write(tmp_path / "s.parquet")
    call = ["--model", str(folder), "--data", str(folder / "b.npy"), "--calibration", str(folder / "a.npy")]
    call += ["--length", "32", "--sensitivity", str(tmp_path / "s.parquet"), "--out", str(tmp_path / "e.json")]
    assert main([*call, "--profile", str(PROFILE), "--tokens", "16"]) == 0
    assert capsys.readouterr().out == (tmp_path / "e.md").read_text()
    rows = json.loads((tmp_path / "e.json").read_text())["rows"]
    sized = [row for row in rows if not row["latency_us"]]
    plain, sized = sized[:3], sized[3:]
    assert all(row["quantizer"] == "gptq" and not row["is_mixed"] for row in plain)
    for uniform, mixed in zip(sized[::2], sized[1::2], strict=True):
        assert uniform["group"] == mixed["group"]
        assert not uniform["is_mixed"]
        assert mixed["is_mixed"]
        assert mixed["avg_weight_bits"] <= max(uniform["avg_weight_bits"], float(mixed["group"].split()[0])) + 1e-9
    priced = [row for row in rows if row["latency_us"]]
    assert {row["name"] for row in priced if not row["is_mixed"]} == set(SCHEMES) - {"w4a4_g128_sym"}  # none on an H200
    fastest = min(row["latency_us"]["16 tokens"] for row in priced if not row["is_mixed"])
    assert all(row["latency_us"]["16 tokens"] >= fastest for row in priced)


def test_speed_is_over_what_is_no_worse() -> None:
    def row(name: str, us: float, perplexity: float, *, is_mixed: bool) -> Row:
        return Row(
            name=name, group="16 tokens" if is_mixed else "uniform", is_mixed=is_mixed, quantizer="q",
            avg_weight_bits=4.0,
            mean_kl=perplexity / 100, perplexity=perplexity, latency_us={"16 tokens": us},
        )  # fmt: skip

    rows = [
        row("fast", 10, 9.0, is_mixed=False),
        row("good", 30, 6.0, is_mixed=False),
        row("slow", 90, 5.5, is_mixed=False),
    ]
    rows += [row("mixed", 20, 6.0, is_mixed=True), row("best", 40, 5.0, is_mixed=True)]
    sized = [
        Row(
            name=name, group=group, is_mixed=name == "m", quantizer="q", avg_weight_bits=2.0,
            mean_kl=kl, perplexity=5 + kl,
            latency_us={},
        )
        for group in ("2.25 bits, weights", "3.25 bits, weights", "5 bits, weights and activations")
        for name, kl in (("u", 0.4), ("m", 0.1))
    ]  # fmt: skip
    on = {"model": "x", "data": "d", "calibration": "c", "losses": "l", "priced_as": "p", "profile": "f"}
    text = markdown("command", on, [*sized, *rows], 5.0)
    assert "| mixed | 20.0 | 4.00 | 6.0000 | good | 30.0 | +50.0% |" in text
    assert "| best | 40.0 | 4.00 | 5.0000 | none is | |  |" in text
    assert text.count("75.0% | 75.0% |") == 3


def test_a_profile_without_the_model_is_refused() -> None:
    with pytest.raises(DataError, match="no measured launches of olmoe-1b-7b with 16 tokens"):
        priced_as(PROFILE, "olmoe-1b-7b", "x", [16], 8)
