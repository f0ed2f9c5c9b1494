"""`python -m bench.study` on one layer, a few trials."""

import json

import pytest

from bench.present import MIXED, UNIFORM
from bench.study import METHODS, main, table


@pytest.mark.slow
def test_the_comparison_is_made_and_the_study_wins_against_what_needs_no_luck(tmp_path, capsys):
    out = tmp_path / "study.json"
    assert main(["--instance", "1,16,1", "--setting", "product, r = 0.75", "--out", str(out)]) in (0, 1)
    report = json.loads(out.read_text())
    rows = {row["method"]: row for row in report["instances"][0]["rows"]}
    assert list(rows) == list(METHODS)
    study = rows.pop("outer study")
    assert study["avg_bits"] <= 4.25
    for name in ("sequential pipeline", "best uniform scheme", "TPE over blocks", "NSGA-II over blocks"):
        assert rows[name]["value"] is None or study["value"] < rows[name]["value"] * (1 + 1e-9)
    assert table(report) in capsys.readouterr().out


def test_what_allocation_benches_read_is_there():
    assert [path for path in (UNIFORM, MIXED) if not path.is_file()] == []


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "no" / "study.json")]) == 2
    assert "its folder does not exist" in capsys.readouterr().err
