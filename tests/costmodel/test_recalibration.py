"""Drift: found, named and corrected on made-up changes; not found where nothing changed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest

from costmodel import drift_check, features, model_file
from costmodel import recalibrate as command
from costmodel.drift import Cause, Effect, Explanation, explanations
from costmodel.fit import fit
from costmodel.kernel_use import of_rows
from costmodel.model_file import FittedModel
from costmodel.recalibration import corrected_model, recalibrate
from costmodel.recheck import choose
from profiles.errors import DataError, SpecError
from profiles.gpus import GpuSpec
from profiles.gpus import gpu as find_gpu
from profiles.records import ProfileRecord
from profiles.store import ProfileStore
from tests.costmodel.synthetic import profile

Array = npt.NDArray[np.float64]
SCHEME = "w8a8_g-1_sym"


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return profile(mixes=4, models=("alpha", "beta"))


@pytest.fixture(scope="module")
def base(rows: pd.DataFrame) -> FittedModel:
    return fit(rows)


def _times(gpu: GpuSpec, rows: pd.DataFrame) -> Array:
    """By the analytic core on a card that need not exist."""
    uses, loads, use_of, load_of = of_rows(rows, {})
    return features.as_frame(features.matrix(gpu, uses, loads, use_of, load_of))["latency_us"].to_numpy(np.float64)


def _slower_clock(rows: pd.DataFrame) -> Array:
    gpu = find_gpu("h200")
    tops = {math: 0.9 * rate for math, rate in gpu.tensor_tops.items()}
    slow = dataclasses.replace(gpu, boost_clock_mhz=0.9 * gpu.boost_clock_mhz, tensor_tops=tops)
    return _times(slow, rows) / _times(gpu, rows)


def _less_bandwidth(rows: pd.DataFrame) -> Array:
    gpu = find_gpu("h200")
    return _times(dataclasses.replace(gpu, dram_gbps=0.85 * gpu.dram_gbps), rows) / _times(gpu, rows)


def _slower_scheme(rows: pd.DataFrame) -> Array:
    return np.where(rows["schemes"].map(lambda names: set(names) == {SCHEME}), 1.2, 1.0)


def _again(rows: pd.DataFrame, factors: Array, seed: int) -> pd.DataFrame:
    """The same launches at another time: changed, and with noise that has a heavy tail."""
    noise = np.exp(0.008 * np.random.default_rng(seed).standard_t(3, len(rows)))
    return rows.assign(latency_us=rows["latency_us"] * factors * noise)


@pytest.mark.parametrize(
    ("change", "cause", "name", "factor"),
    [
        (_slower_clock, Cause.CLOCK, "SM clock", 1 / 0.9),
        (_less_bandwidth, Cause.BANDWIDTH, "DRAM bandwidth", 1 / 0.85),
        (_slower_scheme, Cause.SCHEME, f"scheme {SCHEME}", 1.2),
    ],
)
def test_a_change_is_named_sized_and_corrected_from_fifty_launches(
    rows: pd.DataFrame, base: FittedModel, change: object, cause: Cause, name: str, factor: float
) -> None:
    assert callable(change)
    now = _again(rows, change(rows), seed=3)
    some = choose(now, 50)
    found = recalibrate(base, some, rows)
    assert found.num_rows == found.num_paired == 50
    first = found.effects[0]
    assert first.explanation.cause is cause
    assert first.explanation.name == name
    assert first.is_drift
    assert first.factor == pytest.approx(factor, rel=0.04)
    X, y = features.of_profile(now), now["latency_us"].to_numpy()
    before = np.abs(base.model.predict(X) / y - 1.0).mean()
    predicted, lower, upper = found.fitted.model.predict(X, return_interval=True)
    after = np.abs(predicted / y - 1.0).mean()
    unchanged = np.abs(base.model.predict(X) / _again(rows, np.ones(len(rows)), seed=3)["latency_us"] - 1.0).mean()
    assert after < 0.75 * before
    assert after < unchanged + 0.012
    assert ((lower <= y) & (y <= upper)).mean() > 0.85


def test_noise_is_not_called_a_drift(rows: pd.DataFrame, base: FittedModel) -> None:
    alarms = 0
    for seed in range(20):
        some = choose(_again(rows, np.ones(len(rows)), seed), 50)
        alarms += bool(recalibrate(base, some, rows, seed=seed).effects)
    assert alarms <= 2  # of 20 at 1% each


def test_one_wild_launch_is_no_proof(rows: pd.DataFrame, base: FittedModel) -> None:
    some = choose(_again(rows, np.ones(len(rows)), seed=1), 50)
    wild = some["latency_us"].to_numpy().copy()
    wild[7] *= 2.0
    assert not recalibrate(base, some.assign(latency_us=wild), rows).effects


def test_without_records_predictions_are_compared(rows: pd.DataFrame, base: FittedModel) -> None:
    found = recalibrate(base, choose(_again(rows, 1.1 * np.ones(len(rows)), seed=2), 50))
    assert found.num_paired == 0
    assert found.effects[0].explanation.cause is Cause.EVERYTHING
    assert found.effects[0].factor == pytest.approx(1.1, rel=0.03)
    assert found.clock_ratio is None
    assert found.error_after < found.error_before


def test_every_explanation_is_corrected_where_it_holds_and_nowhere_else(rows: pd.DataFrame, base: FittedModel) -> None:
    X = features.of_profile(rows)
    matrix = X.to_numpy(dtype=np.float32)
    names = [used[0] if len(set(used)) == 1 else "" for used in rows["schemes"]]
    before = base.model.predict(X)
    causes = set()
    for explanation in explanations(matrix, names):
        effect = Effect(explanation=explanation, factor=1.05, low=1.0, high=1.1, p_value=0.001)
        ratio = corrected_model(base.model, [effect]).predict(X) / before
        assert base.model.core_ is not None
        column = explanation.column(matrix, base.model.core_, base.model.slope)
        if explanation.cause in (Cause.CLOCK, Cause.BANDWIDTH, Cause.FLOOR):
            np.testing.assert_allclose(np.log(ratio), column * np.log(1.05), atol=1e-6)
        else:
            np.testing.assert_allclose(ratio, np.where(column > 0, 1.05, 1.0))
        causes.add(explanation.cause)
    assert causes == set(Cause) - {Cause.FAMILY}  # the made-up profile has one family


def test_a_group_takes_no_more_questions_than_a_tree_has(rows: pd.DataFrame) -> None:
    X = features.of_profile(rows).to_numpy(dtype=np.float32)
    some = [each for each in explanations(X, [""] * len(X)) if each.values]
    assert max(len(each.thresholds()) for each in some) == 5
    family = Explanation(cause=Cause.FAMILY, name="family wgmma", values=(1.0,))
    assert family.thresholds() == [("is_wgmma", 0.5, True)]


def test_a_shallow_forest_grows_deeper_and_predicts_the_same(rows: pd.DataFrame) -> None:
    from costmodel.model import LatencyModel

    X, y = features.of_profile(rows), rows["latency_us"].to_numpy()
    shallow = LatencyModel(depth=2, num_trees=10, num_folds=2).fit(X, y)
    names = [used[0] if len(set(used)) == 1 else "" for used in rows["schemes"]]
    scheme = next(e for e in explanations(X.to_numpy(dtype=np.float32), names) if e.cause is Cause.SCHEME)
    effect = Effect(explanation=scheme, factor=1.5, low=1.4, high=1.6, p_value=0.001)
    ratio = corrected_model(shallow, [effect]).predict(X) / shallow.predict(X)
    np.testing.assert_allclose(np.unique(ratio.round(9)), [1.0, 1.5])


def test_the_chosen_launches_cover_every_scheme_and_tile(rows: pd.DataFrame) -> None:
    some = choose(rows, 30)
    assert len(some) == 30
    assert {name for used in some["schemes"] for name in used} == {name for used in rows["schemes"] for name in used}
    assert set(some["config"].str.split("_").str[1]) == set(rows["config"].str.split("_").str[1])
    assert len(choose(rows.iloc[:9], 30)) == 9
    with pytest.raises(SpecError, match="at least one"):
        choose(rows, 0)


def test_command(rows: pd.DataFrame, base: FittedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_file.write(tmp_path / "base.npz", base)
    _store(tmp_path / "recorded.parquet", rows.iloc[::3])
    now = choose(_again(rows.iloc[::3], _slower_scheme(rows.iloc[::3]), seed=5), 50).assign(sm_clock_mhz=1800.0)
    _store(tmp_path / "now.parquet", now)
    words = ["--base", str(tmp_path / "base.npz"), "--measured", str(tmp_path / "now.parquet")]
    out = ["--out", str(tmp_path / "new.npz")]
    recorded = ["--recorded", str(tmp_path / "recorded.parquet")]
    assert command.main([*words, *recorded, *out, "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["drift"] is True
    assert body["effects"][0]["name"] == f"scheme {SCHEME}"
    assert body["num_paired"] == 50
    again = model_file.read(tmp_path / "new.npz")
    assert again.version != base.version
    assert again.configs == base.configs
    assert command.main([*words, *recorded, *out]) == 0
    assert f"drift: scheme {SCHEME}: " in capsys.readouterr().out
    for wrong, said in (
        (["--base", str(tmp_path / "no.npz"), *words[2:], *out], "no.npz"),
        ([*words, "--recorded", str(tmp_path / "no.parquet"), *out], "no such profile"),
    ):
        assert command.main(wrong) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1


def test_too_few_rows_and_another_gpu_are_refused(rows: pd.DataFrame, base: FittedModel) -> None:
    with pytest.raises(DataError, match="at least 12"):
        recalibrate(base, rows.iloc[:11])
    with pytest.raises(DataError, match="are of rtx4090, the model of h200"):
        recalibrate(base, rows.iloc[:50].assign(gpu="rtx4090"))


def _store(path: Path, rows: pd.DataFrame) -> None:
    with ProfileStore(path) as store:
        for row in rows.to_dict("records"):
            latency_us = float(row["latency_us"])
            store.append(ProfileRecord.from_row(row | {"p20_us": 0.99 * latency_us, "p80_us": 1.01 * latency_us}))


def test_the_check_of_drifts(rows: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _store(tmp_path / "profile.parquet", rows[rows["load_source"].str.contains("uniform")])
    words = ["--profile", str(tmp_path / "profile.parquet"), "--out", str(tmp_path / "out"), "--trials", "2"]
    monkey = pytest.MonkeyPatch()
    monkey.setattr(drift_check, "_NUM_UNCHANGED", 2)
    assert drift_check.main(words) == 0
    monkey.undo()
    shown = capsys.readouterr().out
    assert shown == (tmp_path / "out" / "drift.md").read_text()
    trials = {each["change"]: each for each in json.loads((tmp_path / "out" / "drift.json").read_text())}
    assert sum(each["num_named"] for each in trials.values()) >= 4  # of 6
    assert trials["nothing"]["num_with_more"] == 0
    assert all(each["error_after"] < each["error_before"] for name, each in trials.items() if "lower" in name)
    assert drift_check.main(["--profile", str(tmp_path / "no.parquet"), "--out", str(tmp_path)]) == 2
    assert "no such profile" in capsys.readouterr().err
