"""What the outer study is compared with, on the same problem, objective and number of trials."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from optuna.trial import Trial, TrialState

from allocator.front import solve_product
from allocator.problem import Ints
from allocator.study import warm
from allocator.study.evaluate import INNER_EFFORT, Evaluator
from allocator.study.menu import NUM_RANKS, Choice
from allocator.study.objective import Goal, is_feasible
from allocator.study.problem import LaunchKind
from allocator.study.sets import Additive, SetSolver


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


def one_pass(evaluator: Evaluator, goal: Goal) -> Outcome:
    """Best kernel per scheme first, bits second: the exact product of additive loss and latency, once."""
    problem, solver = evaluator.problem, SetSolver(evaluator)
    r = goal.loss_weight
    corner = solve_product(
        solver.table.loss,
        problem.bits,
        latency_us=solver.table.relative_latency.sum(axis=2),
        loss_weight=r,
        avg_bits=problem.avg_bits,
        sizes=problem.sizes,
        effort=INNER_EFFORT,
    )
    loss = float(solver.table.loss[np.arange(len(problem.ids)), corner.solution.assignment].sum())
    price = (1 - r) / r * loss / corner.latency_us / evaluator.reference_loss
    return sequential(evaluator, goal, [price])[0]


def sequential(evaluator: Evaluator, goal: Goal, prices: Iterable[float]) -> tuple[Outcome, Choice, Ints]:
    """Best kernel per scheme first, bits second: an exact solve for each price of latency, of which the one is kept
    whose launches are best.

    At most four schemes a linear, chosen by the solver; a launch then runs with the fastest of its schemes' own kernels
    that holds them all, each priced as a launch.
    """
    solver = SetSolver(evaluator)
    best: tuple[Outcome, Choice, Ints] | None = None
    for price in prices:
        weights = dict.fromkeys(evaluator.problem.scenarios, float(price))
        assignment = solver.assign(solver.cost(weights), evaluator.problem.avg_bits)
        compiled = solver.compiled(assignment)
        if any(
            evaluator.problem.schemes[column] not in compiled[kind.linear]
            for kind in evaluator.problem.kinds
            for column in np.unique(assignment[kind.rows.ravel()])
        ):
            continue  # no kernel holds these schemes together
        choice = _own_kernels(
            evaluator, solver.table, Choice(compiled=compiled, configs={}, latency_weights=weights), assignment
        )
        found = outcome(evaluator, goal, choice, assignment)
        if best is None or found.value < best[0].value:
            best = found, choice, assignment
    assert best is not None
    return best


def _own_kernels(evaluator: Evaluator, table: Additive, choice: Choice, assignment: Ints) -> Choice:
    """Each launch with the fastest of its schemes' own kernels that holds them all; without one, the fastest legal."""
    choice = evaluator.settle(choice)
    configs = {}
    for kind in evaluator.problem.kinds:
        held = choice.compiled[kind.linear]
        legal = evaluator.menu.legal_configs(kind, held)
        for scenario in evaluator.problem.scenarios:
            own = {table.configs[kind.linear, scenario, scheme] for scheme in held} & set(legal)
            tried = {
                config: evaluator.launches_us(_with(choice, kind, scenario, config), assignment, scenario)
                for config in sorted(own, key=lambda config: config.name)
            }
            fallback = evaluator.menu.config(kind, scenario, held, 0)
            configs[kind.linear, scenario] = min(tried, key=lambda config: tried[config]) if tried else fallback
    return replace(choice, configs=configs)


def _with(choice: Choice, kind: LaunchKind, scenario: str, config: object) -> Choice:
    return replace(choice, configs={**choice.configs, (kind.linear, scenario): config})  # type: ignore[dict-item]


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
            found.append(outcome(evaluator, goal, choice, assignment))
    return min((one for one in found if one.avg_bits <= problem.avg_bits), key=lambda one: one.value, default=NOTHING)


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
    choice, assignment = start or (evaluator.settle(warm.choices(SetSolver(evaluator))["least loss"]), None)
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
