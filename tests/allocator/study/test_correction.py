"""Losses that do not add up: the report of allocator.additivity decides between trials, error weights are sampled."""

import json

import numpy as np
import pytest

from allocator.budget import Budget
from allocator.study import run
from allocator.study.correction import read_correction
from allocator.study.objective import Goal
from allocator.study.problem import of as problem_of
from profiles.errors import DataError
from tests.allocator.study.small import EVIDENCE, MODEL, NAMES, a_sensitivity

SENSITIVITY = a_sensitivity()
BY_SCHEME = {name: 3.0 if "a8" in name else 1.0 for name in sorted(NAMES)}


@pytest.fixture
def report(tmp_path):
    path = tmp_path / "additivity.json"
    path.write_text(json.dumps({"chosen": "scheme-weights", "weights": list(BY_SCHEME.values())}))
    return path


def test_a_trials_loss_is_the_corrected_one(report):
    corrected = read_correction(report, SENSITIVITY, MODEL)
    problem = problem_of(SENSITIVITY, MODEL, Budget(avg_weight_bits=4.25), EVIDENCE, corrected_loss=corrected)
    evaluator = run.evaluator_of(problem)
    study = run.run(evaluator, run.Settings(goal=Goal(), num_trials=40))
    best = run.best_trials(study)[0]
    inner = evaluator.solve(run.choice_of(best, evaluator))
    weights = np.array([BY_SCHEME[scheme.name] for scheme in problem.schemes])
    chosen = problem.loss[np.arange(len(problem.ids)), inner.assignment]
    assert best.user_attrs["loss"] == pytest.approx(float((chosen * weights[inner.assignment]).sum()))
    sampled = [trial for trial in study.trials if "warm_start" not in trial.user_attrs]
    assert sampled
    assert {"error_weight.down", "error_weight.activations", "error_weight.late_layers"} <= sampled[0].params.keys()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not a report"),
        ('{"chosen": "magic", "weights": [1]}', "not a report"),
        ('{"chosen": "scheme-weights", "weights": [1, 2]}', "its 2 weights are of another sensitivity"),
    ],
)
def test_a_report_that_does_not_fit_is_refused(tmp_path, content, words):
    path = tmp_path / "additivity.json"
    path.write_text(content)
    with pytest.raises(DataError, match=words):
        read_correction(path, SENSITIVITY, MODEL)
