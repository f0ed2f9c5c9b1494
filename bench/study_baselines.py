"""What the outer study is compared with, on the same problem, objective and number of trials."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from optuna.trial import Trial, TrialState

from allocator.problem import Ints
from allocator.study import warm
from allocator.study.evaluate import Evaluator
from allocator.study.menu import MOST_RANKS, Choice
from allocator.study.objective import Goal, is_feasible
from allocator.study.sequential import Judged, judge
from allocator.study.sets import SetSolver


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The best assignment that a method found; value inf where it found none within every limit."""

    value: float
    loss: float
    relative_latency: float
    avg_bits: float


NOTHING = Outcome(value=np.inf, loss=np.inf, relative_latency=np.inf, avg_bits=np.inf)


def outcome(evaluator: Evaluator, judged: Judged | None) -> Outcome:
    """What is told of a result."""
    if judged is None or not np.isfinite(judged.value):
        return NOTHING
    return Outcome(
        value=judged.value,
        loss=judged.loss,
        relative_latency=evaluator.relative_latency(judged.latency_us),
        avg_bits=judged.avg_bits,
    )


def best_uniform(evaluator: Evaluator, goal: Goal) -> Outcome:
    """The best scheme for all linears within the average bits, each launch with its fastest kernel."""
    problem = evaluator.problem
    found = [NOTHING]
    for scheme in problem.schemes:
        if all(scheme in offered for offered in evaluator.menu.schemes.values()):
            compiled = {kind.linear: (scheme,) for kind in problem.kinds}
            weights = dict.fromkeys(problem.scenarios, 0.0)
            choice = evaluator.settle(Choice(compiled=compiled, configs={}, latency_weights=weights))
            assignment = np.full(len(problem.ids), problem.schemes.index(scheme))
            found.append(outcome(evaluator, judge(evaluator, goal, choice, assignment)))
    return min(found, key=lambda one: one.value)


def direct(
    evaluator: Evaluator,
    goal: Goal,
    sampler: BaseSampler,
    num_trials: int,
    start: tuple[Choice, Ints] | None = None,
) -> Outcome:
    """A sampler over every block's scheme and every launch's kernel, without the inner solver.

    It is given what the sequential pipeline compiles (so that launches hold at most four schemes) and, as its first
    trial, every block in the leanest of them; or, with `start`, the sequential pipeline's own assignment.
    """
    problem, menu = evaluator.problem, evaluator.menu
    choice, assignment = start or (evaluator.settle(warm.breakpoints(SetSolver(evaluator))["least loss"]), None)
    study = optuna.create_study(sampler=sampler)

    def objective(trial: Trial) -> float:
        chosen = np.empty(len(problem.ids), dtype=np.int64)
        configs = {}
        for kind in problem.kinds:
            held = choice.compiled[kind.linear]
            names = [scheme.name for scheme in held]
            for row in kind.rows.ravel():
                name = trial.suggest_categorical(f"block{row}", names)
                chosen[row] = problem.schemes.index(held[names.index(name)])
            for scenario in problem.scenarios:
                rank = trial.suggest_int(f"{kind.linear}.{scenario}.kernel", 0, MOST_RANKS - 1)
                configs[kind.linear, scenario] = menu.config(kind, scenario, held, rank)
        this = replace(choice, configs=configs)
        found = judge(evaluator, goal, this, chosen)
        relative = evaluator.relative_latency(found.latency_us)
        trial.set_constraint("avg_bits", max(0.0, found.avg_bits - problem.avg_bits * (1 + 1e-12)))
        for name, limit in problem.budget.max_latency_us.items():
            trial.set_constraint(f"max_latency_us[{name}]", found.latency_us[name] / limit - 1)
        for name, value in (("loss", found.loss), ("latency", relative), ("bits", found.avg_bits)):
            trial.set_user_attr(name, value)
        return goal.values(found.loss, relative)[0]

    study.enqueue_trial(_first(evaluator, choice, assignment))
    study.optimize(objective, n_trials=num_trials)
    done = [trial for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if is_feasible(trial)]
    if not done:
        return NOTHING
    best = min(done, key=lambda trial: trial.values[0])
    loss, latency, bits = (best.user_attrs[name] for name in ("loss", "latency", "bits"))
    return Outcome(value=best.values[0], loss=loss, relative_latency=latency, avg_bits=bits)


def _first(evaluator: Evaluator, choice: Choice, assignment: Ints | None) -> dict[str, object]:
    problem, params = evaluator.problem, dict[str, object]()
    for kind in problem.kinds:
        held = choice.compiled[kind.linear]
        leanest = min(held, key=lambda scheme: scheme.bits_per_weight(kind.shape.k))
        for row in kind.rows.ravel():
            params[f"block{row}"] = (leanest if assignment is None else problem.schemes[assignment[row]]).name
        for scenario in problem.scenarios:
            rank = evaluator.menu.rank(kind, scenario, held, choice.configs[kind.linear, scenario])
            params[f"{kind.linear}.{scenario}.kernel"] = rank
    return params
