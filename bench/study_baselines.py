"""What the outer study is compared with, on the same problem, objective and number of trials."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from optuna.trial import Trial, TrialState

from allocator.arrays import solve_arrays
from allocator.front import solve_product
from allocator.problem import Ints
from allocator.study import warm
from allocator.study.evaluate import INNER_EFFORT, Evaluator
from allocator.study.menu import NUM_RANKS, Choice
from allocator.study.objective import Goal, Objective, is_feasible
from allocator.study.problem import LaunchKind
from allocator.study.sets import Additive, SetSolver


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The best assignment that a method found; value inf where it found none within every limit."""

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
    holds = all(latency[name] <= limit for name, limit in problem.budget.max_latency_us.items())
    value = goal.values(loss, relative)[0] if holds and bits <= problem.avg_bits * (1 + 1e-12) else np.inf
    return Outcome(value=value, loss=loss, relative_latency=relative, avg_bits=bits)


def excess(evaluator: Evaluator, choice: Choice, assignment: Ints) -> dict[str, float]:
    """By limited scenario, how far an assignment's launches are above the limit, relative."""
    limits = evaluator.problem.budget.max_latency_us
    return {name: evaluator.launches_us(choice, assignment, name) / limit - 1 for name, limit in limits.items()}


def one_pass(evaluator: Evaluator, goal: Goal) -> Outcome:
    """Best kernel per scheme first, bits second, once: the exact least of the additive goal within the additive limits.

    Where launches then take more than the limits, it found nothing.
    """
    problem, solver = evaluator.problem, SetSolver(evaluator)
    limits = problem.budget.max_latency_us
    if goal.objective is Objective.LOSS:
        share = solver.table.relative_latency * len(problem.scenarios)  # in units of the fastest uniform launch
        solution = solve_arrays(
            solver.table.loss,
            problem.bits,
            avg_bits=problem.avg_bits,
            latency_us=share,
            max_latency_us=[limits[name] / evaluator.fastest_uniform_us[name] for name in problem.scenarios],
            sizes=problem.sizes,
            launches=solver.launch_labels,
            max_schemes=evaluator.menu.max_schemes,
            effort=INNER_EFFORT,
        )
        found = _as_launches(evaluator, goal, solver, solution.assignment, dict.fromkeys(problem.scenarios, 0.0))
        return NOTHING if found is None else found[0]
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
    found = sequential(evaluator, goal, [dict.fromkeys(problem.scenarios, price)])
    return NOTHING if found is None else found[0]


Found = tuple[Outcome, Choice, Ints]


def sequential(evaluator: Evaluator, goal: Goal, prices: Iterable[Mapping[str, float]]) -> Found | None:
    """Best kernel per scheme first, bits second: an exact solve for each set of prices of latency, of which the one is
    kept whose launches are best; None where none of them has launches at all.

    As many schemes a linear as a launch may hold, chosen by the solver; a launch then runs with the fastest of its
    schemes' own kernels that holds them all, each priced as a launch.
    """
    solver = SetSolver(evaluator)
    best: Found | None = None
    for weights in prices:
        assignment = solver.assign(solver.cost(weights), evaluator.problem.avg_bits)
        found = _as_launches(evaluator, goal, solver, assignment, weights)
        if found is not None and (best is None or found[0].value < best[0].value):
            best = found
    return best


def _as_launches(
    evaluator: Evaluator, goal: Goal, solver: SetSolver, assignment: Ints, weights: Mapping[str, float]
) -> Found | None:
    """None: no kernel holds some linear's schemes together."""
    problem, compiled = evaluator.problem, solver.compiled(assignment)
    for kind in problem.kinds:
        used = {problem.schemes[column] for column in np.unique(assignment[kind.rows.ravel()])}
        if not used <= set(compiled[kind.linear]):
            return None
    choice = Choice(compiled=compiled, configs={}, latency_weights=weights)
    choice = _own_kernels(evaluator, solver.table, choice, assignment)
    return outcome(evaluator, goal, choice, assignment), choice, assignment


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
        this = replace(choice, configs=configs)
        found = outcome(evaluator, goal, this, chosen)
        trial.set_constraint("avg_bits", max(0.0, found.avg_bits - problem.avg_bits * (1 + 1e-12)))
        for name, above in excess(evaluator, this, chosen).items():
            trial.set_constraint(f"max_latency_us[{name}]", above)
        for name, value in (("loss", found.loss), ("latency", found.relative_latency), ("bits", found.avg_bits)):
            trial.set_user_attr(name, value)
        return goal.values(found.loss, found.relative_latency)[0]

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
