"""The comparison of two benchmark runs: verdicts, refusals, exit codes, and the stored baseline."""

import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from bench.compare import Comparison, Sample, Verdict, main, read_run, store

KIND = "some-processor-2-cores"


def document(times: dict[str, tuple[float, float]], kind: str = KIND) -> dict[str, Any]:
    return {
        "machine_info": {"kind": kind, "node": "secret-host", "python_version": "3.11.7"},
        "commit_info": {"author_time": "today"},
        "datetime": "2026-01-01T00:00:00",
        "benchmarks": [
            {
                "fullname": name,
                "stats": {"median": median, "iqr": iqr, "rounds": 9, "data": [median] * 9},
                "extra_info": {"kernel": "k 12ab"},
            }
            for name, (median, iqr) in times.items()
        ],
    }


def write(path: Path, times: dict[str, tuple[float, float]], kind: str = KIND) -> Path:
    path.write_text(json.dumps(document(times, kind)))
    return path


def verdict(before: tuple[float, float], now: tuple[float, float], floor: float = 0.0) -> Verdict:
    old, new = (Sample(median_s=median, iqr_s=iqr) for median, iqr in (before, now))
    return Comparison(name="x", baseline=old, current=new, floor=floor).verdict


@pytest.mark.parametrize(
    ("before", "now", "floor", "expected"),
    [
        ((1.0, 0.1), (1.13, 0.1), 0.0, Verdict.SAME),  # the noise of both is 0.141
        ((1.0, 0.1), (1.15, 0.1), 0.0, Verdict.SLOWER),
        ((1.0, 0.1), (0.85, 0.1), 0.0, Verdict.FASTER),
        ((1.0, 0.0), (1.0, 0.0), 0.0, Verdict.SAME),
        ((1.0, 0.0), (1.09, 0.0), 0.1, Verdict.SAME),
        ((1.0, 0.0), (1.11, 0.0), 0.1, Verdict.SLOWER),
        ((1.0, 0.3), (1.29, 0.0), 0.0, Verdict.SAME),  # a baseline that jumped about proves little
        ((1.0, 0.0), (1.29, 0.3), 0.0, Verdict.SAME),  # and so does a run that does
    ],
)
def test_a_change_counts_only_beyond_the_noise_of_both_runs(
    before: tuple[float, float], now: tuple[float, float], floor: float, expected: Verdict
) -> None:
    assert verdict(before, now, floor) is expected


times = st.floats(1e-9, 1e3)


@given(times, times, times, times, st.floats(0, 0.5), st.floats(1e-3, 1e3))
def test_the_verdict_does_not_depend_on_the_unit(
    before: float, before_iqr: float, now: float, now_iqr: float, floor: float, unit: float
) -> None:
    plain = Comparison(
        name="x",
        baseline=Sample(median_s=before, iqr_s=before_iqr),
        current=Sample(median_s=now, iqr_s=now_iqr),
        floor=floor,
    )
    scaled = Comparison(
        name="x",
        baseline=Sample(median_s=before * unit, iqr_s=before_iqr * unit),
        current=Sample(median_s=now * unit, iqr_s=now_iqr * unit),
        floor=floor,
    )
    assert scaled.ratio == pytest.approx(plain.ratio)
    assert scaled.noise_s == pytest.approx(plain.noise_s * unit)


@given(times, times, times, times)
def test_with_no_floor_slower_one_way_is_faster_the_other(
    before: float, before_iqr: float, now: float, now_iqr: float
) -> None:
    mirrored = {Verdict.FASTER: Verdict.SLOWER, Verdict.SLOWER: Verdict.FASTER, Verdict.SAME: Verdict.SAME}
    assert verdict((now, now_iqr), (before, before_iqr)) is mirrored[verdict((before, before_iqr), (now, now_iqr))]


def test_exit_code_1_on_a_regression_and_every_row_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = write(tmp_path / "old.json", {"a[w4]": (1.0, 0.01), "b": (1.0, 0.01), "c": (1.0, 0.01), "e": (1.0, 0.01)})
    new = write(tmp_path / "new.json", {"a[w4]": (2.0, 0.01), "b": (0.5, 0.01), "c": (1.01, 0.01), "d": (1.0, 0.01)})
    assert main([str(old), str(new)]) == 1
    printed = capsys.readouterr().out
    assert "1 faster, 1 same, 1 slower, 1 new, 1 gone" in printed
    assert all(name in printed for name in ("a[w4]", "b", "c", "d", "e"))


@pytest.mark.parametrize("now", [(1.05, 0.01), (0.5, 0.01)])
def test_exit_code_0_when_nothing_is_slower(tmp_path: Path, now: tuple[float, float]) -> None:
    old, new = write(tmp_path / "old.json", {"a": (1.0, 0.01)}), write(tmp_path / "new.json", {"a": now})
    assert main([str(old), str(new)]) == 0


def test_the_floor_is_the_users_to_set(tmp_path: Path) -> None:
    old, new = write(tmp_path / "old.json", {"a": (1.0, 0.0)}), write(tmp_path / "new.json", {"a": (1.2, 0.0)})
    assert main([str(old), str(new), "--floor", "5"]) == 1
    assert main([str(old), str(new), "--floor", "25"]) == 0


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not a pytest-benchmark file"),
        ("{}", "no list of benchmarks"),
        ("[1]", "no list of benchmarks"),
        (json.dumps(document({"a": (1.0, 0.1)}))[:-20], "not a pytest-benchmark file"),
        (
            json.dumps({"machine_info": {"kind": KIND}, "benchmarks": [{"fullname": "a"}]}),
            "without fullname, median or iqr",
        ),
        (json.dumps(document({"a": (float("nan"), 0.1)})), "a time is a positive number"),
        (json.dumps(document({"a": (0.0, 0.1)})), "a time is a positive number"),
        (json.dumps(document({"a": (1.0, -0.1)})), "a time is a positive number"),
        (json.dumps(document({"a": (1.0, 0.1)}, kind="")), "does not say its kind of machine"),
    ],
)
def test_a_bad_file_is_one_sentence_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, complaint: str
) -> None:
    good, bad = write(tmp_path / "good.json", {"a": (1.0, 0.1)}), tmp_path / "bad.json"
    bad.write_text(text)
    assert main([str(good), str(bad)]) == 2
    message = capsys.readouterr().err
    assert complaint in message
    assert str(bad) in message
    assert "Traceback" not in message


def test_a_missing_file_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "no.json"), str(tmp_path / "no.json")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_machines_of_different_kinds_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = (
        write(tmp_path / "o.json", {"a": (1.0, 0.1)}),
        write(tmp_path / "n.json", {"a": (1.0, 0.1)}, "other-kind"),
    )
    assert main([str(old), str(new)]) == 2
    assert "do not compare" in capsys.readouterr().err


def test_a_folder_gives_the_baseline_of_the_machines_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    current = write(tmp_path / "now.json", {"a": (3.0, 0.1)})
    folder = tmp_path / "baselines"
    folder.mkdir()
    assert main([str(folder), str(current)]) == 0
    assert "no baseline" in capsys.readouterr().out
    write(folder / f"{KIND}.json", {"a": (1.0, 0.1)})
    assert main([str(folder), str(current)]) == 1


def test_a_stored_baseline_keeps_times_and_no_host(tmp_path: Path) -> None:
    current = write(tmp_path / "now.json", {"b": (3.0, 0.1), "a": (2.0, 0.2)})
    stored = store(current, tmp_path)
    assert stored.name == f"{KIND}.json"
    assert read_run(stored).samples == read_run(current).samples
    assert "secret-host" not in stored.read_text()
    assert json.loads(stored.read_text())["benchmarks"][0]["extra_info"] == {"kernel": "k 12ab"}
    assert main([str(tmp_path), str(current)]) == 0


def test_stored_baselines_of_this_repository_can_be_read() -> None:
    paths = sorted((Path(__file__).parents[2] / "bench" / "baselines").glob("*.json"))
    assert paths
    for path in paths:
        run = read_run(path)
        assert run.machine_kind == path.stem
        assert run.samples
