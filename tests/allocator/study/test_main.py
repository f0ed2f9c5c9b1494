"""`python -m allocator.study`, from files, stopped and continued."""

import json
import os
import signal
import subprocess
import sys

import pytest

from allocator.allocation import Allocation
from allocator.study.__main__ import main
from costmodel.table import CostTable
from profiles.store import ProfileStore
from tests.allocator.study.small import LOADS, MODEL, a_profile, a_sensitivity


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    a_sensitivity().write(folder / "losses.parquet")
    a_profile(folder / "profile.parquet")
    CostTable.from_profile(ProfileStore(folder / "profile.parquet").records()).write(folder / "cost.parquet")
    return folder


def command(files, *more, known=("--profile", "profile.parquet")):
    option, name = known
    return ["--sensitivity", str(files / "losses.parquet"), option, str(files / name), *more]


def test_a_study_from_a_profile(files, tmp_path, capsys):
    out = tmp_path / "best.json"
    more = ["--budget-bits", "4.25", "--trials", "14", "--out", str(out), "--json"]
    for name, load in LOADS.items():
        more += ["--scenario", f"{name}={load.source}"]
    assert main(command(files, *more)) == 0
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert summary["trials"] == 14
    assert "trial 0 complete" in printed.err
    allocation = Allocation.read(out)
    assert allocation.model == MODEL.name
    assert allocation.predicted_loss == summary["best"][0]["predicted_loss"]
    assert set(allocation.predicted_latency_us) == {"decode", "prefill"}
    assert (tmp_path / "best.db").is_file()
    assert main(command(files, *more, "--quiet")) == 0  # done already: nothing is run again
    assert json.loads(capsys.readouterr().out) == summary


def test_a_front_from_a_cost_table(files, tmp_path, capsys):
    more = ["--budget-bits", "4.25", "--trials", "14", "--objective", "both", "--out", str(tmp_path / "front.json")]
    assert main(command(files, *more, "--quiet", known=("--cost", "cost.parquet"))) == 0
    written = sorted(tmp_path.glob("front-*.json"))
    assert len(written) >= 2
    assert all(Allocation.read(path).avg_weight_bits <= 4.25 for path in written)
    assert capsys.readouterr().out.count("wrote") == len(written)


def test_ctrl_c_loses_nothing(files, tmp_path):
    more = ["--budget-bits", "4.25", "--trials", "400", "--out", str(tmp_path / "best.json"), "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "allocator.study", *command(files, *more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    seen = [process.stderr.readline() for _ in range(5)]
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "the same command goes on" in stderr
    assert "Traceback" not in stderr
    assert json.loads(stdout)["trials"] >= len(seen)
    Allocation.read(tmp_path / "best.json")


DECODE = f"decode={LOADS['decode'].source}"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budget-bits", "1.0"], "avg_bits 1 is 1.25 below the least possible, 2.25"),
        (
            ["--budget-bits", "4.25", "--objective", "loss", "--max-latency", "decode=1", "--scenario", DECODE],
            "the nearest is over max_latency_us[decode] by",
        ),
        (["--budget-bits", "4.25", "--max-latency", "decode=9", "--max-latency", "decode=8"], "decode is there twice"),
        (["--budget-bits", "4.25", "--seed", "-1"], "a seed is a number of at least 0"),
        (["--budget-bits", "4.25", "--out", "."], "--out .: it is a folder"),
        (["--budget-bits", "4.25", "--storage", "sqlite://"], "trials in memory are lost"),
        (["--budget-bits", "4.25", "--latency-model", "none.npz"], "none.npz: no such file"),
        (["--budget-bits", "-1"], "avg_weight_bits is -1.0"),
        (["--budget-bits", "4.25", "--trials", "0"], "at least 1 trial"),
        (["--budget-bits", "4.25", "--loss-weight", "2"], "from 0 to 1"),
        (["--budget-bits", "4.25", "--storage", "nonsense"], "expected sqlite:///FILE"),
        (["--budget-bits", "4.25", "--storage", "grpc://nowhere"], "expected grpc://HOST:PORT"),
        (["--budget-bits", "4.25", "--storage", "sqlite:////no/such/folder/study.db"], "cannot be opened"),
        (["--budget-bits", "4.25", "--storage", "postgresql://localhost:1/none"], "cannot be opened"),
        (["--budget-bits", "4.25", "--max-latency", "decode"], "expected NAME=VALUE"),
        (["--budget-bits", "4.25", "--max-latency", "decode=soon"], "expected a number"),
        (["--budget-bits", "4.25", "--max-latency", "night=4"], "no scenario 'night'"),
        (["--budget-bits", "4.25", "--scenario", "decode=night"], "no load 'night'"),
        (["--budget-bits", "4.25", "--schemes", "w5a5"], "w5a5"),
        (["--budget-bits", "4.25", "--model", "no-such-model"], "no-such-model"),
        (["--budget-bits", "4.25", "--objective", "loss"], "limit a latency"),
    ],
)
def test_a_mistake_is_one_sentence(files, tmp_path, capsys, options, words):
    more = [*options, "--quiet"]
    if "--out" not in options:
        more += ["--out", str(tmp_path / "best.json")]
    if "--trials" not in options:
        more += ["--trials", "3"]
    assert main(command(files, *more)) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert words in printed.err
    assert not (tmp_path / "best.json").exists()


def test_missing_files_are_one_sentence(files, tmp_path, capsys):
    out = ["--budget-bits", "4.25", "--out", str(tmp_path / "best.json")]
    assert main(["--sensitivity", "none.parquet", "--profile", str(files / "profile.parquet"), *out]) == 2
    assert "none.parquet: no such file" in capsys.readouterr().err
    assert main(command(files, *out, known=("--profile", "none.parquet"))) == 2
    assert "no such file" in capsys.readouterr().err
    away = ["--budget-bits", "4.25", "--out", os.fspath(tmp_path / "no" / "best.json")]
    assert main(command(files, *away)) == 2
    assert "its folder does not exist" in capsys.readouterr().err
