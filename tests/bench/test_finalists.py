"""`python -m bench.finalists` makes what `allocator.latency` measures."""

import json

import pytest

from allocator.latency import main as measure
from allocator.latency import read_finalists
from bench.finalists import main
from tests.allocator.benches import MadeUpBench


@pytest.mark.slow
def test_its_files_are_what_the_measuring_command_takes(tmp_path):
    assert main(["--model", "mixtral-8x7b", "--layers", "2", "--out", str(tmp_path)]) == 0
    found = read_finalists([tmp_path / "finalists.json"])
    assert {"mixed", "one scheme an expert", "study, r = 0.5"} <= set(found)
    assert all(one.avg_weight_bits <= 4.25 or name.startswith("uniform") for name, one in found.items())
    out = tmp_path / "latencies.json"
    arguments = ["--allocation", str(tmp_path / "finalists.json"), "--trace", str(tmp_path / "trace.json"),
                 "--gpu", "h200", "--loads", "decode=64,prefill=4096", "--out", str(out)]  # fmt: skip
    assert measure(arguments, bench=MadeUpBench()) == 0
    assert set(json.loads(out.read_text())["total_us"]) == set(found)


def test_an_unknown_model_is_one_sentence(tmp_path, capsys):
    assert main(["--model", "abacus", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
