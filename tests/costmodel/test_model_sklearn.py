"""LatencyModel and TransferModel as scikit-learn's own checks see it."""

from __future__ import annotations

from typing import Any

from sklearn.utils.estimator_checks import parametrize_with_checks

from costmodel.model import LatencyModel
from costmodel.transfer_model import TransferModel


@parametrize_with_checks([LatencyModel(num_trees=60), TransferModel(num_trees=20)])
def test_conventions(estimator: Any, check: Any) -> None:
    check(estimator)
