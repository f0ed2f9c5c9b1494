"""The evidence command on a random model: same size, same quantiser."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

import transformers

from allocator import Sensitivity
from bench.mixed_evidence import Row, main, markdown
from profiles import schemes
from profiles.models import Linear, LinearId, model_from_config
from tests.allocator.calibration import tiny

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
    assert main(call) == 0
    assert capsys.readouterr().out == (tmp_path / "e.md").read_text()
    rows = json.loads((tmp_path / "e.json").read_text())["rows"]
    plain, sized = rows[:3], rows[3:]
    assert all(row["quantizer"] == "gptq" and not row["is_mixed"] for row in plain)
    for uniform, mixed in zip(sized[::2], sized[1::2], strict=True):
        assert uniform["group"] == mixed["group"]
        assert not uniform["is_mixed"]
        assert mixed["is_mixed"]
        assert mixed["avg_weight_bits"] <= max(uniform["avg_weight_bits"], float(mixed["group"].split()[0])) + 1e-9


def test_the_share_removed_is_of_the_uniform_row() -> None:
    sized = [
        Row(
            name=name, group=group, is_mixed=name == "m", quantizer="q", avg_weight_bits=2.0,
            mean_kl=kl, perplexity=5 + kl,
        )
        for group in ("2.25 bits, weights", "3.25 bits, weights", "5 bits, weights and activations")
        for name, kl in (("u", 0.4), ("m", 0.1))
    ]  # fmt: skip
    on = {"model": "x", "data": "d", "calibration": "c", "losses": "l"}
    text = markdown("command", on, sized, 5.0)
    assert text.count("75.0% | 75.0% |") == 3
