"""LatencyModel and TransferModel as scikit-learn's own checks see it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from costmodel.model import LatencyModel
from costmodel.transfer_model import TransferModel


@parametrize_with_checks([LatencyModel(num_trees=60), TransferModel(num_trees=20)])
def test_conventions(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_trees", 0), ("depth", 0), ("depth", 9), ("learning_rate", 0.0), ("learning_rate", 1.5), ("l2", 0.0)),
        *(("l2", np.nan), ("slope", 0.0), ("slope", 1.1), ("num_folds", 1), ("coverage", 0.0), ("coverage", 1.0)),
        *(("num_trees", 2.5), ("num_trees", "2"), ("depth", None), ("slope", "1"), ("num_folds", 2.0)),
    ],
)
def test_parameters_that_cannot_be_are_named(name: str, value: object) -> None:
    X, y = np.random.default_rng(0).random((20, 3)), np.full(20, 7.0)
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got {value!r}$"):
        LatencyModel(**{"num_trees": 2, name: value}).fit(X, y)


def test_a_coverage_set_after_fitting_is_checked() -> None:
    X, y = np.random.default_rng(0).random((20, 3)), np.full(20, 7.0)
    model = LatencyModel(num_trees=2).fit(X, y).set_params(coverage=1.5)
    with pytest.raises(ValueError, match=r"coverage: expected between 0 and 1, got 1\.5"):
        model.predict(X, return_interval=True)
