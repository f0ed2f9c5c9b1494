"""What the outer study is compared with, on the same problem, objective and number of trials."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from optuna.trial import Trial, TrialState

from allocator.arrays import solve_arrays
from allocator.problem import Ints
from allocator.study import warm
from allocator.study.evaluate import INNER_EFFORT, Evaluator
from allocator.study.menu import NUM_RANKS, Choice
from allocator.study.objective import LATENCY_WEIGHTS, Goal, is_feasible
from allocator.study.problem import LaunchKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The best feasible assignment that a method found; value inf where it found none."""

    value: float
    loss: float
    relative_latency: float
    avg_bits: float


NOTHING = Outcome(value=np.inf, loss=np.inf, relative_latency=np.inf, avg_bits=np.inf)


def outcome(evaluator: Evaluator, goal: Goal, choice: Choice, assignment: Ints) -> Outcome:
    """An assignment, priced as launches."""
    problem = evaluator.problem
    latency = {name: evaluator.launches_us(choice, assignment, name) for name in problem.scenarios}
    relative, loss = evaluator.relative_latency(latency), problem.corrected_loss(assignment)
    bits = float(np.average(problem.bits[np.arange(len(assignment)), assignment], weights=problem.sizes))
    return Outcome(value=goal.values(loss, relative)[0], loss=loss, relative_latency=relative, avg_bits=bits)


def sequential(evaluator: Evaluator, goal: Goal, num_trials: int) -> tuple[Outcome, Choice, Ints]:
    """Best kernel per scheme first, bits second: one exact solve for each of `num_trials` prices of latency.

    The four schemes that most blocks take are compiled, bits are solved again with those; a launch then runs with the
    fastest of its schemes' own kernels, each priced as a launch.
    """
    problem, table = evaluator.problem, warm.additive(evaluator)
    best: tuple[Outcome, Choice, Ints] | None = None
    for price in np.geomspace(*LATENCY_WEIGHTS, num_trials):
        cost = table.loss / evaluator.reference_loss + price * table.relative_latency
        assignment = _solve(evaluator, cost)
        compiled = warm.most_used(evaluator, assignment)
        kept = np.full_like(cost, np.inf)
        for kind in problem.kinds:
            columns = np.array([problem.schemes.index(scheme) for scheme in compiled[kind.linear]])
            part = np.ix_(kind.rows.ravel(), columns)
            kept[part] = cost[part]
        assignment = _solve(evaluator, kept)
        choice = _own_kernels(evaluator, table, warm.with_best_kernels(evaluator, compiled, float(price)), assignment)
        found = outcome(evaluator, goal, choice, assignment)
        if best is None or found.value < best[0].value:
            best = found, choice, assignment
    assert best is not None
    return best


def _solve(evaluator: Evaluator, cost: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Ints:
    problem = evaluator.problem
    return solve_arrays(
        cost, problem.bits, avg_bits=problem.avg_bits, sizes=problem.sizes, effort=INNER_EFFORT
    ).assignment


def _own_kernels(evaluator: Evaluator, table: warm.Additive, choice: Choice, assignment: Ints) -> Choice:
    """Each launch with the fastest of its schemes' own kernels that holds them all; without one, as it was."""
    configs = dict(choice.configs)
    for kind in evaluator.problem.kinds:
        held = choice.compiled[kind.linear]
        legal = evaluator.menu.legal_configs(kind, held)
        for scenario in evaluator.problem.scenarios:
            own = {table.configs[kind.linear, scenario, scheme] for scheme in held} & set(legal)
            tried = {
                config: evaluator.launches_us(_with(choice, kind, scenario, config), assignment, scenario)
                for config in sorted(own, key=lambda config: config.name)
            }
            if tried:
                configs[kind.linear, scenario] = min(tried, key=lambda config: tried[config])
    return replace(choice, configs=configs)


def _with(choice: Choice, kind: LaunchKind, scenario: str, config: object) -> Choice:
    return replace(choice, configs={**choice.configs, (kind.linear, scenario): config})  # type: ignore[dict-item]


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
    choice, assignment = start or (warm.choices(evaluator)["least loss"], None)
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
                rank = trial.suggest_int(f"{kind.linear}.{scenario}.kernel", 0, NUM_RANKS - 1)
                configs[kind.linear, scenario] = menu.config(kind, scenario, held, rank)
        found = outcome(evaluator, goal, replace(choice, configs=configs), chosen)
        trial.set_constraint("avg_bits", max(0.0, found.avg_bits - problem.avg_bits * (1 + 1e-12)))
        for name, value in (("loss", found.loss), ("latency", found.relative_latency), ("bits", found.avg_bits)):
            trial.set_user_attr(name, value)
        return found.value

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
