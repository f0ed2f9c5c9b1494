"""What is known of errors, guided measuring and its replay, on made-up profiles."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from costmodel import replay as replay_command
from costmodel import worth
from costmodel.error_field import ON_CORE, TERMS, ErrorField, Places, Scales
from costmodel.features import of_profile
from costmodel.groups import launch_ids
from costmodel.guide import Candidates, Costs, Guide, best_rows, expected_loss
from costmodel.model import LatencyModel
from costmodel.recorded import Recorded, candidates_of, recorded
from costmodel.replay import STRATEGIES, replay
from costmodel.worth import gain_over, rehearse
from profiles.errors import DataError, SpecError
from profiles.records import ProfileRecord
from profiles.store import ProfileStore
from tests.costmodel.synthetic import profile


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return profile(mixes=0, models=("alpha", "beta"))


@pytest.fixture(scope="module")
def models(rows: pd.DataFrame) -> list[Recorded]:
    return recorded(rows)


def _candidates(rows: pd.DataFrame) -> Candidates:
    return candidates_of(rows, of_profile(rows))


def test_covariance_is_one_and_measuring_takes_it_away(rows: pd.DataFrame) -> None:
    X = of_profile(rows).to_numpy(dtype=np.float32)
    field = ErrorField(Places.of(X), ON_CORE)
    some = np.arange(0, len(X), 5)
    covariance = field.between(some, some)
    np.testing.assert_allclose(covariance, covariance.T)
    np.testing.assert_allclose(covariance.diagonal(), field.variance)
    assert np.linalg.eigvalsh(covariance).min() > 0.9 * ON_CORE.own**2
    np.testing.assert_allclose(field.paired(some[:-1], some[1:]), covariance.diagonal(1))
    errors = np.linspace(-0.1, 0.1, len(some))
    posterior = field.given(some, errors)
    np.testing.assert_allclose(posterior.mean[some], errors, atol=0.01)
    assert posterior.variance()[some].max() < 4 * ON_CORE.repeat**2
    rest = np.setdiff1d(np.arange(len(X)), some)
    assert (posterior.variance()[rest] <= field.variance).all()
    np.testing.assert_allclose(posterior.between(rest, rest).diagonal(), posterior.variance()[rest], atol=1e-9)
    np.testing.assert_allclose(posterior.paired(rest[:-1], rest[1:]), posterior.between(rest, rest).diagonal(1))


def test_posterior_by_hand(rows: pd.DataFrame) -> None:
    """One term that all rows share: the measured error is everybody's, as far as it is not the row's own."""
    X = of_profile(rows.iloc[:3]).to_numpy(dtype=np.float32)
    shared = tuple(0.3 if term == ("all", "anywhere") else 0.0 for term in TERMS)
    field = ErrorField(Places.of(X), Scales(terms=shared, own=0.1, repeat=0.0))
    posterior = field.given(np.asarray([0]), np.asarray([0.2]))
    np.testing.assert_allclose(posterior.mean, [0.2, 0.18, 0.18])
    np.testing.assert_allclose(posterior.variance(), [0.0, 0.1 - 0.09**2 / 0.1, 0.1 - 0.09**2 / 0.1], atol=1e-12)


@pytest.mark.parametrize(("gap", "deviation"), [(0.0, 0.1), (0.05, 0.1), (0.3, 0.1), (0.2, 0.5)])
def test_expected_loss_is_the_integral(gap: float, deviation: float) -> None:
    wanted, _ = quad(lambda x: -x * norm.pdf(x, gap, deviation), gap - 12 * deviation, 0)
    assert expected_loss(np.asarray(gap), np.asarray(deviation)) == pytest.approx(wanted, abs=1e-9)


def test_costs_by_hand(rows: pd.DataFrame) -> None:
    some = _candidates(rows.iloc[:7])  # six configurations of one launch, and one of another scheme
    costs = Costs(measure=1.0, inputs=10.0, weights=100.0, compile=1000.0)
    built = np.zeros(7, dtype=np.bool_)
    assert costs.of(some, np.asarray([0, 1]), built) == 2112.0
    assert costs.of(some, np.asarray([0, 6]), built) == 2222.0
    built[0] = True
    assert costs.of(some, np.asarray([0, 1]), built) == 1112.0
    each = costs.each(some, np.asarray([0, 1, 6]), np.asarray([1]), built)
    np.testing.assert_array_equal(each, [1.0, 1.0, 1111.0])


def test_everything_is_measured_once_and_failures_are_avoided(rows: pd.DataFrame) -> None:
    some = rows[rows["model"] == "alpha"].iloc[::3].reset_index(drop=True)
    candidates, y = _candidates(some), some["latency_us"].to_numpy()
    guide, measured = Guide.of(candidates, batch=24), np.zeros(len(some), dtype=np.bool_)
    latency = np.full(len(some), np.nan)
    while len(batch := guide.next(belief := guide.believe(measured, latency))):
        assert not measured[batch].any()
        assert len(set(batch)) == len(batch) <= 24
        measured[batch] = True
        latency[batch] = np.where(batch % 7 == 0, np.nan, y[batch])
    assert guide.expected_regret(belief) < 0.005
    assert np.isfinite(belief.log_us[belief.chosen]).all()
    np.testing.assert_array_equal(np.unique(launch_ids(some)), candidates.launches[belief.chosen])
    # What was never measured cannot win: the choices are the best of what worked.
    worked = np.where(np.arange(len(y)) % 7 == 0, np.inf, y)
    best = best_rows(worked, candidates.launches)
    assert (y[belief.chosen] / y[best] - 1.0).mean() < 0.01


def test_guided_measuring_beats_every_other_strategy(models: list[Recorded]) -> None:
    last = {}
    for name in STRATEGIES:
        curve = replay(models[0], name, batch=12, max_share=0.06)
        assert [point.num_measured for point in curve] == sorted({point.num_measured for point in curve})
        assert curve[0].seconds == curve[0].num_measured == 0
        last[name] = curve[-1]
    guided = last.pop("guided")
    assert guided.regret_mean < 0.01
    without_model = min(last[name].regret_mean for name in ("random", "grid", "TPE (Optuna)"))
    assert max(guided.regret_mean, last["guided, no profile"].regret_mean) < without_model
    assert guided.seconds < last["random"].seconds
    assert guided.expected_regret is not None
    assert guided.expected_regret < 0.03


def test_a_base_is_not_fitted_on_the_model_it_is_for(rows: pd.DataFrame, models: list[Recorded]) -> None:
    other = (rows["model"] == "beta").to_numpy()
    X, y = of_profile(rows), rows["latency_us"].to_numpy()
    base = LatencyModel(num_folds=2).fit(X[other], y[other])
    assert models[0].base is not None
    np.testing.assert_array_equal(models[0].base.predict(X), base.predict(X))


def test_replay_command(rows: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ProfileStore(tmp_path / "h200.parquet") as store:
        for row in rows[rows["load_source"].str.contains("uniform")].to_dict("records"):
            store.append(ProfileRecord.from_row(row))
    arguments = ["--profile", str(tmp_path / "h200.parquet"), "--out", str(tmp_path / "out"), "--max-share", "0.05"]
    assert replay_command.main(arguments) == 0
    out = capsys.readouterr().out
    assert "| alpha |" in out
    assert "TPE" in out
    assert (tmp_path / "out" / "replay.md").read_text() == out
    assert (tmp_path / "out" / "replay.png").read_bytes().startswith(b"\x89PNG")
    body = json.loads((tmp_path / "out" / "replay.json").read_text())
    assert {point["strategy"] for point in body["points"]} == set(STRATEGIES)
    assert body["exhaustive_seconds"].keys() == {"alpha", "beta"}
    assert [each["num_questions"] for each in body["worth"]] == [6, 6]  # three schemes of two models
    assert all(abs(each["predicted"] - each["realised"]) < 0.05 for each in body["worth"])
    assert "| the analytic model's pick | 6 |" in out
    assert replay_command.main(["--profile", str(tmp_path / "no.parquet"), "--out", str(tmp_path)]) == 2
    assert "no such profile" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        replay_command.main(["--profile", "x", "--out", str(tmp_path), "--max-share", "nan"])
    assert "--max-share nan: a share above 0 and at most 1 is needed" in capsys.readouterr().err


def test_too_little_is_refused(rows: pd.DataFrame) -> None:
    with pytest.raises(DataError, match="two configurations"):
        recorded(rows.iloc[:1])
    some = _candidates(rows.iloc[:6])
    with pytest.raises(SpecError, match="at least one"):
        Guide.of(some, batch=0)
    with pytest.raises(SpecError, match="as many"):
        Candidates(
            features=some.features, launches=some.launches[:2], kernels=some.kernels, inputs=some.inputs,
            weights=some.weights,
        )  # fmt: skip


def test_gain_holds_what_measuring_gains(models: list[Recorded]) -> None:
    data = models[1]
    guide, y = data.guide(16), data.latency_us
    none, unknown = np.zeros(len(y), dtype=np.bool_), np.full(len(y), np.nan)
    default = np.unique(guide.candidates.launches, return_index=True)[1]  # each launch's first configuration
    gain = gain_over(guide, guide.believe(none, unknown), default)
    best = y[best_rows(y, guide.candidates.launches)]
    assert gain.low <= (1.0 - best / y[default]).mean() <= gain.high
    assert gain.low < gain.expected < gain.high
    every = guide.believe(~none, y)
    certain = gain_over(guide, every, every.chosen)
    assert certain.high < 0.005  # nothing is left to gain


def test_rehearsal_is_near_the_performance(models: list[Recorded], monkeypatch: pytest.MonkeyPatch) -> None:
    guide = models[0].guide(8)
    effort = rehearse(guide, goal=0.01, max_measurements=1000)
    curve = replay(models[0], "guided", batch=8)
    stop = next(point for point in curve if point.expected_regret is not None and point.expected_regret <= 0.01)
    assert 0 < effort.num_measurements < 3 * stop.num_measured + 24
    assert effort.seconds > 0
    few = rehearse(guide, goal=0.0, max_measurements=20)
    assert few.num_measurements == 20
    monkeypatch.setattr(worth, "_MOST_REHEARSING", 6)  # of 36 launches
    assert rehearse(guide, goal=0.0, max_measurements=60).num_measurements == pytest.approx(60, abs=6)
