"""The real thing on whatever GPU is here: build, launch, check, time; the second sweep measures nothing."""

import json
from pathlib import Path

import pytest

from kernel_gen.sweep import main
from kernel_gen.sweeping.detect import installed_gpus, matching_gpus
from profiles.gpus import GPUS
from profiles.records import Source
from profiles.store import ProfileStore

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 512,
    "moe_intermediate_size": 320,
    "num_experts": 12,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


@pytest.fixture
def gpu_name() -> str:
    names = [spec.name for spec in GPUS.values() if matching_gpus(spec, installed_gpus())]
    if not names:
        pytest.skip("the GPU here is not one that is known")
    return names[0]


def test_a_small_sweep_measures_right_kernels(
    gpu_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    out = tmp_path / "p.parquet"
    words = ["--gpu", gpu_name, "--backend", "cuda", "--model", str(tmp_path / "config.json"), "--tokens", "1,100"]
    words += [
        "--load",
        "uniform,one_hot",
        "--schemes",
        "w4a16_g128_asym,w8a8_g-1_sym",
        "--tries",
        "1",
        "--json",
        "--out",
        str(out),
    ]
    words += ["--mixed", "w4a16_g128_sym+w8a8_g-1_sym:2"]
    assert main(words) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["failures"] == []
    rows = ProfileStore(out).records()
    assert set(rows["source"]) == {Source.MEASURED.value}
    assert (rows["num_samples"] >= 20).all()
    assert rows["sm_clock_mhz"].between(200, 4000).all()
    assert rows["latency_us"].between(1, 1000).all()
    ratios = [float(versions["reference_ratio"]) for versions in rows["versions"]]
    assert all(0.5 < ratio < 3 for ratio in ratios)
    assert len(body["best"]) == 2 * 2 * 2 * 3

    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["rows"]["new"] == 0
