"""What a tuning run takes from a study: its best allocation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import optuna
from optuna.trial import FrozenTrial

from allocator.allocation import Allocation
from allocator.study import run
from allocator.study.evaluate import Evaluator
from allocator.study.storage import open_storage


def best_of_study(
    evaluator: Evaluator,
    settings: run.Settings,
    storage: str | None,
    *,
    on_trial: Callable[[FrozenTrial], None] | None = None,
) -> Allocation | None:
    """The best allocation of a study with one objective, begun or gone on with; None: no trial holds the limits.

    storage: as `open_storage` takes it; None keeps the trials in memory.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # its line a trial is longer than all that is said here
    with nullcontext() if storage is None else open_storage(storage) as opened:
        study = run.run(evaluator, settings, opened, on_trial=on_trial)
        trials = run.best_trials(study)
        return run.allocation_of(trials[0], evaluator, settings.goal) if trials else None
