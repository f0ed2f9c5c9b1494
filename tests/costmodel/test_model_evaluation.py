"""Evaluation, its report and commands, on made-up profiles."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from costmodel import evaluate as evaluate_command
from costmodel import fit as fit_command
from costmodel import model_file
from costmodel.baselines import AnalyticCore, Dummy, RawBoosting, Roofline, SlopeTimesTiles
from costmodel.evaluation import MODEL, estimators, evaluate, fold_intervals, measure
from costmodel.features import of_profile
from costmodel.groups import HeldOut, group_labels
from costmodel.model import LatencyModel
from costmodel.regret import regrets
from costmodel.report import as_json, write_report
from profiles.errors import DataError
from profiles.records import ProfileRecord
from profiles.store import ProfileStore
from tests.costmodel.synthetic import profile

METRICS = {"mean_ape", "median_ape", "coverage_90", "regret_mean", "regret_p99", "regret_top4_mean"}


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return profile(mixes=6, models=("alpha", "beta", "gamma"))


@pytest.fixture(scope="module")
def stored(rows: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "h200.parquet"
    with ProfileStore(path) as store:
        for row in rows.iloc[::5].to_dict("records"):
            store.append(ProfileRecord.from_row(row))
    return path


def _few_trees() -> dict[str, object]:
    return {**estimators(), MODEL: lambda: LatencyModel(num_trees=40, num_folds=3)}


def test_model_beats_every_baseline_on_unseen_groups(rows: pd.DataFrame, tmp_path: Path) -> None:
    found = evaluate(rows, kinds=[HeldOut.SHAPE, HeldOut.MIX], make=_few_trees(), num_folds=3)
    data = json.loads(as_json(found))
    assert set(data["held_out"]) == {"shape", "mix"}
    for by_estimator in data["held_out"].values():
        assert set(by_estimator) == set(estimators())
        assert all(metrics.keys() >= METRICS for metrics in by_estimator.values())
        model = by_estimator.pop(MODEL)
        assert all(model["mean_ape"] < other["mean_ape"] for other in by_estimator.values())
        for name, other in by_estimator.items():
            if name != "nvMatmulHeuristics":  # it may apply to one fold's rows only
                assert 0.5 < other["coverage_90"] <= 1.0
                assert other["interval_width"] > model["interval_width"]
        assert 0.6 < model["coverage_90"] <= 1.0
        assert 0.0 <= model["regret_top4_mean"] <= model["regret_mean"] <= model["regret_p99"]
    html, markdown, as_data = write_report(found, tmp_path / "report")
    assert json.loads(as_data.read_text()) == json.loads(as_json(found))
    page = html.read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "http" not in page
    assert "| LatencyModel |" in markdown.read_text()
    assert "noise floor |" not in markdown.read_text()


def test_noise_floor_stands_beside_every_figure(rows: pd.DataFrame, tmp_path: Path) -> None:
    again = profile(seed=3, mixes=0, models=("alpha",)).assign(timestamp="2026-01-02T00:00:00+00:00")
    some = pd.concat([rows.iloc[::4], again], ignore_index=True)
    make = {MODEL: lambda: LatencyModel(num_trees=5, num_folds=2), "dummy": Dummy}
    found = evaluate(some, kinds=[HeldOut.SHAPE, HeldOut.LOAD], make=make, num_folds=3)
    assert found.noise.num_repeats > 50
    text = write_report(found, tmp_path)[1].read_text()
    assert text.count("| noise floor | 1.") == 2


def test_held_out_rows_are_not_learned_from(rows: pd.DataFrame) -> None:
    """An estimator that remembers what it saw must be asked for nothing that it saw."""

    class Remembers:
        def fit(self, X: pd.DataFrame, y: np.ndarray, groups: np.ndarray) -> Remembers:
            self.seen = set(X.index)
            return self

        def predict(self, X: pd.DataFrame) -> np.ndarray:
            assert self.seen.isdisjoint(X.index)
            asked.update(X.index)
            return np.ones(len(X))

    for kind in HeldOut:
        asked: set[int] = set()
        evaluate(rows, kinds=[kind], make={MODEL: Remembers, "other": Remembers}, num_folds=3)
        labels = group_labels(rows, kind)
        assert asked == {row for row, label in enumerate(labels) if label is not None}


def test_a_scheme_held_out_is_in_no_mix_learned_from(rows: pd.DataFrame) -> None:
    from costmodel.evaluation import _leaks

    labels = group_labels(rows, HeldOut.SCHEME)
    held_out = np.flatnonzero(labels == "w16a16")
    seen = rows[~_leaks(HeldOut.SCHEME, rows, labels, held_out)]
    assert len(seen)
    assert not seen["schemes"].map(lambda names: "w16a16" in names).any()


def test_regret_by_hand() -> None:
    y = np.asarray([10.0, 12.0, 11.0, 7.0, 5.0, 9.0])
    launches = np.asarray([0, 0, 0, 1, 1, 2])
    first, best_of_two = regrets(y, np.asarray([3.0, 1.0, 2.0, 1.0, 2.0, 1.0]), launches, top=2)
    np.testing.assert_allclose(first, [0.2, 0.4])
    np.testing.assert_allclose(best_of_two, [0.1, 0.0])


def test_a_baselines_intervals_reach_as_far_as_its_errors_on_other_folds() -> None:
    rng = np.random.default_rng(0)
    error = rng.uniform(0, 0.3, 4000) * rng.choice([-1, 1], 4000)
    y, fold = np.exp(rng.normal(4, 1, 4000)), np.repeat([0, 1, 2, -1], 1000)
    predicted = y * np.exp(error)
    intervals = fold_intervals(y, predicted, fold)
    assert np.isnan(intervals[fold == -1]).all()
    lower, upper = np.log(intervals[fold >= 0] / predicted[fold >= 0, None]).T
    np.testing.assert_allclose([lower, upper], [np.full(3000, -0.27), np.full(3000, 0.27)], atol=0.01)
    worse = np.where(fold == 0, y * 5, predicted)  # what a fold's own errors are does not move its intervals
    np.testing.assert_allclose(fold_intervals(y, worse, fold)[fold == 0] / worse[fold == 0, None],
                               intervals[fold == 0] / predicted[fold == 0, None])  # fmt: skip
    alone = np.where(fold == 0, predicted, np.nan)
    assert np.isnan(fold_intervals(y, alone, fold)).all()
    assert measure(y[fold == 0], y[fold == 0], np.zeros(1000, dtype=np.int64), 1,
                   np.full((1000, 2), np.nan)).coverage_90 is None  # fmt: skip


def test_baselines_say_what_they_are(rows: pd.DataFrame) -> None:
    X, y = of_profile(rows), rows["latency_us"].to_numpy()
    for make in (Dummy, Roofline, AnalyticCore, SlopeTimesTiles, RawBoosting):
        predicted = make().fit(X, y).predict(X)
        assert predicted.shape == y.shape
        assert (predicted > 0).all()
    np.testing.assert_allclose(AnalyticCore().fit(X, y).predict(X), X["latency_us"], rtol=1e-6)
    assert len(set(Dummy().fit(X, y).predict(X))) == 1
    with pytest.raises(ValueError, match="columns"):
        Roofline().fit(np.ones((5, 3)), np.ones(5))


def test_commands(stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit_command.main(["--profile", str(stored), "--out", str(tmp_path / "model.npz")]) == 0
    assert model_file.read(tmp_path / "model.npz").gpu == "h200"
    capsys.readouterr()
    arguments = ["--profile", str(stored), "--out", str(tmp_path / "report"), "--held-out", "shape", "--folds", "2"]
    assert evaluate_command.main([*arguments, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["held_out"]) == {"shape"}
    for command in (fit_command, evaluate_command):
        assert command.main(["--profile", str(tmp_path / "no.parquet"), "--out", str(tmp_path / "x")]) == 2
        assert "no such profile" in capsys.readouterr().err
        assert command.main(["--profile", "/", "--out", str(tmp_path / "x")]) == 2
        assert capsys.readouterr().err == "error: /: a folder; give a profile's Parquet file\n"
    assert fit_command.main(["--profile", str(stored), "--out", "."]) == 2
    assert capsys.readouterr().err == "error: .: cannot be written (Is a directory)\n"
    with pytest.raises(SystemExit, match="2"):
        fit_command.main(["--profile", str(stored), "--out", str(tmp_path / "x"), "--seed", "-1"])
    assert "--seed: -1: it must not be negative" in capsys.readouterr().err


def test_what_was_learned_from_predictions_says_so(
    rows: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "predicted.parquet"
    with ProfileStore(path) as store:
        for row in rows.iloc[::9].assign(source="predicted").to_dict("records"):
            store.append(ProfileRecord.from_row(row))
    assert fit_command.main(["--profile", str(path), "--out", str(tmp_path / "model.npz")]) == 0
    assert "launches, predicted, none of them measured, " in capsys.readouterr().out
    few = {MODEL: lambda: LatencyModel(num_trees=2, num_folds=2)}
    found = evaluate(rows.assign(source="predicted"), kinds=[HeldOut.MODEL], make=few, num_folds=2)
    assert "launches, predicted, none of them measured, on h200" in write_report(found, tmp_path)[1].read_text()


def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_command, "evaluate", lambda *_, **__: pytest.fail("it evaluated"))
    assert evaluate_command.main(["--profile", str(stored), "--out", str(stored)]) == 2
    assert f"{stored}: nothing can be written there" in capsys.readouterr().err


def test_too_little_is_refused(rows: pd.DataFrame) -> None:
    with pytest.raises(DataError, match="at least 50"):
        fit_command.fit(rows.iloc[:10])
    with pytest.raises(DataError, match="no finished row"):
        evaluate(rows.assign(status="timeout"))
    with pytest.raises(DataError, match="no kind"):
        evaluate(rows[rows["model"] == "alpha"], kinds=[HeldOut.SHAPE])
