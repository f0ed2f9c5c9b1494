"""`python -m bench.calibration_layer`, at a size for tests."""

import json
from pathlib import Path

import pytest

from bench import calibration_layer

SIZES = {"experts": 4, "hidden": 64, "intermediate": 32, "num-sequences": 4, "sequence-length": 32}


def test_stages_make_up_the_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [part for name, value in SIZES.items() for part in (f"--{name}", str(value))]
    assert calibration_layer.main([*given, "--device", "cpu", "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert json.loads(capsys.readouterr().out) == found
    assert (found["tokens"], found["schemes"], found["experts"], found["device"]) == (128, 8, 4, "cpu")
    assert set(found["stages"]) == {*calibration_layer.STAGES, "forward, backward, losses"}
    assert sum(found["stages"].values()) == pytest.approx(found["seconds"], abs=0.05)
    assert found["stages"]["GPTQ"] > 0


def test_a_result_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [part for name, value in SIZES.items() for part in (f"--{name}", str(value))]
    assert calibration_layer.main([*given, "--device", "cpu", "--json", str(tmp_path / "no" / "found.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err
