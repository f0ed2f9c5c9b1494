"""nvMatmulHeuristics as a baseline: where it applies, what it is asked, and how it is refused."""

from __future__ import annotations

import importlib.util
import json
import subprocess

import numpy as np
import pandas as pd
import pytest

from costmodel import matmul_heuristics
from costmodel.evaluation import HeldOut, estimators, evaluate
from costmodel.features import of_profile
from costmodel.matmul_heuristics import NvMatmulHeuristics, why_not
from profiles.errors import UnsupportedError, UserError
from tests.costmodel.synthetic import SCHEMES, profile

needs_it = pytest.mark.skipif(
    importlib.util.find_spec("nvMatmulHeuristics") is None, reason="needs nvidia-matmul-heuristics"
)


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return profile(mixes=4, models=("alpha", "beta"))


def _uniform(rows: pd.DataFrame) -> np.ndarray:
    dense = {"w8a8_g-1_sym", "w16a16"}
    return rows["schemes"].map(lambda used: len(set(used)) == 1 and used[0] in dense).to_numpy()


def test_it_applies_to_dense_launches_of_one_scheme(rows: pd.DataFrame) -> None:
    assert set(SCHEMES) > {"w8a8_g-1_sym", "w16a16"}
    np.testing.assert_array_equal(NvMatmulHeuristics().applies(of_profile(rows)), _uniform(rows))


@needs_it
def test_its_estimates_are_of_the_right_size_and_know_the_tile(rows: pd.DataFrame) -> None:
    X, y = of_profile(rows), rows["latency_us"].to_numpy()
    some = _uniform(rows)
    fitted = NvMatmulHeuristics(gpu="h200").fit(X, y)
    predicted = fitted.predict(X[some])
    assert 0.2 < fitted.factor_ < 5
    large = (rows["tokens_per_expert"].map(sum) >= 512).to_numpy()[some]
    assert np.median(np.abs(predicted / y[some] - 1.0)[large]) < 1.0
    few, many = (X["tile_n"][some] == width for width in (8, 128))
    assert predicted[many & large].min() < predicted[few & large].max()
    again = NvMatmulHeuristics(gpu="rtx4090").fit(X[some], y[some])
    assert again.factor_ != fitted.factor_


@needs_it
def test_it_refuses_what_it_does_not_know(rows: pd.DataFrame) -> None:
    X, y = of_profile(rows), rows["latency_us"].to_numpy()
    fitted = NvMatmulHeuristics().fit(X, y)
    with pytest.raises(UnsupportedError, match=f"{int((~_uniform(rows)).sum())} of {len(rows)} launches"):
        fitted.predict(X)
    assert NvMatmulHeuristics().fit(X[~_uniform(rows)], y[~_uniform(rows)]).factor_ == 1.0
    assert "does not know b200x" in str(why_not("b200x"))


def test_without_the_package_it_says_so(rows: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install" in str(why_not("h200"))
    assert "nvMatmulHeuristics" not in estimators("h200")
    with pytest.raises(UserError, match="pip install 'bitile"):
        NvMatmulHeuristics().fit(of_profile(rows), rows["latency_us"].to_numpy())


@needs_it
def test_a_child_that_fails_is_one_sentence(rows: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = of_profile(rows), rows["latency_us"].to_numpy()
    monkeypatch.setattr(matmul_heuristics, "_CHILD", "no.such.module")
    with pytest.raises(UserError, match="nvMatmulHeuristics failed, exit code 1"):
        NvMatmulHeuristics().fit(X, y)

    def none_known(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 0, stdout=json.dumps([0.0]), stderr="")

    monkeypatch.setattr(subprocess, "run", none_known)
    with pytest.raises(UserError, match="no estimate"):
        NvMatmulHeuristics().fit(X, y)


@needs_it
def test_it_is_evaluated_where_it_applies(rows: pd.DataFrame) -> None:
    every = estimators("h200")
    some = {name: every[name] for name in ("nvMatmulHeuristics", "dummy")}
    assert set(estimators()) == set(every) - {"nvMatmulHeuristics"}
    assert "nvMatmulHeuristics" not in estimators("b200")
    metrics = evaluate(rows, kinds=[HeldOut.SHAPE], make=some, num_folds=2).results[HeldOut.SHAPE].metrics
    assert metrics["nvMatmulHeuristics"].num_rows == _uniform(rows).sum()
    assert metrics["dummy"].num_rows == len(rows)
    assert 0 < metrics["nvMatmulHeuristics"].mean_ape < metrics["dummy"].mean_ape
