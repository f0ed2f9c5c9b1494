"""The loop of a study, resumable at any trial, and the allocations that its trials stand for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FixedTrial, FrozenTrial, TrialState

from allocator.allocation import Allocation, Granularity, LaunchKernel, Uniform
from allocator.arrays import solve_arrays
from allocator.problem import Ints
from allocator.study import warm
from allocator.study.assigned import assigned
from allocator.study.evaluate import Evaluator
from allocator.study.menu import Choice
from allocator.study.objective import (
    START,
    WARM_START,
    Goal,
    Objective,
    is_feasible,
    params_of,
    sample,
)
from allocator.study.problem import Problem
from allocator.study.sets import SetSolver
from allocator.study.trial import BoundPruner, run_trial
from profiles.errors import SpecError

DONE = (TrialState.COMPLETE, TrialState.PRUNED)
WARM_STARTS = "warm_starts"
"""Attribute of a study: the names of its first trials."""
MOST_PRICES = 200
"""Prices of latency that the sequential pipeline is solved for at first: as many as the study has trials, or these."""
LOCAL_SHARE = 0.9
MOST_FREE = 3
"""Sampled trials that keep one of the best trials' parameters but for 1 to MOST_FREE of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """goal: what is minimised. num_trials: of the whole study, first trials included, finished or pruned. seed: of the
    sampler.
    """

    goal: Goal
    num_trials: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_trials < 1:
            raise SpecError(f"a study needs at least 1 trial, not {self.num_trials}")
        if self.seed < 0:
            raise SpecError(f"a seed is a number of at least 0, not {self.seed}")


def evaluator_of(problem: Problem) -> Evaluator:
    """What solves and prices a problem's choices. DataError: a launch that nothing can run."""
    return Evaluator.of(problem)


def study_name(problem: Problem, goal: Goal) -> str:
    """The same inputs and goal, the same study."""
    weight = f"-r{goal.loss_weight:g}" if goal.objective is Objective.PRODUCT else ""
    return f"{problem.model}-{problem.evidence.gpu.name}-{goal.objective.value}{weight}-{problem.digest}"


def open_study(problem: Problem, goal: Goal, storage: BaseStorage | None) -> optuna.Study:
    """The study of these inputs, begun or continued. storage None: in memory."""
    if goal.objective is Objective.LOSS and not problem.budget.max_latency_us:
        raise SpecError("the loss alone is allocator.solve's to minimise: limit a latency, or take product or both")
    study = optuna.create_study(
        study_name=study_name(problem, goal),
        storage=storage,
        load_if_exists=True,
        directions=["minimize"] * (2 if goal.objective is Objective.BOTH else 1),
        pruner=BoundPruner(),
    )
    study.set_user_attr("model", problem.model)
    study.set_user_attr("gpu", problem.evidence.gpu.name)
    study.set_user_attr("budget_avg_bits", problem.avg_bits)
    return study


def run(
    evaluator: Evaluator,
    settings: Settings,
    storage: BaseStorage | None = None,
    *,
    on_trial: Callable[[FrozenTrial], None] | None = None,
) -> optuna.Study:
    """Trials until the study has as many as asked for; on_trial is called after each.

    What is finished is in the storage at once. The sampler is seeded anew for every trial, by the seed and how many
    are finished: a study that is interrupted and continued samples what it would have sampled.
    """
    study = open_study(evaluator.problem, settings.goal, storage)
    solver = SetSolver(evaluator)
    _enqueue(study, solver, settings)
    while (done := num_done(study)) < settings.num_trials:
        running = len(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))
        # Two workers may take one waiting trial at the same moment: who is done with it second is told so, and goes on.
        with warnings.catch_warnings(), suppress(UpdateFinishedTrialError):
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.sampler = _sampler(study, np.random.default_rng([settings.seed, done, running]))
            study.optimize(
                lambda trial: run_trial(trial, solver, settings.goal),
                n_trials=1,
                callbacks=None if on_trial is None else [lambda _, trial: on_trial(trial)],
            )
    return study


def num_done(study: optuna.Study) -> int:
    """Trials that were finished or pruned."""
    return len(study.get_trials(deepcopy=False, states=DONE))


def _sampler(study: optuna.Study, rng: np.random.Generator) -> optuna.samplers.BaseSampler:
    """TPE over all parameters, or, more often, over a few of them around one of the best trials: most of a good choice
    stays good, and a hundred trials are few for all parameters at once.
    """
    tpe = optuna.samplers.TPESampler(seed=int(rng.integers(2**31)), n_startup_trials=1, constant_liar=True)
    best = best_trials(study)
    if not best or rng.random() >= LOCAL_SHARE:
        return tpe
    params = best[int(rng.integers(len(best)))].params
    free = rng.choice(sorted(params), size=int(rng.integers(1, MOST_FREE + 1)), replace=False)
    return optuna.samplers.PartialFixedSampler({k: v for k, v in params.items() if k not in free}, tpe)


def _enqueue(study: optuna.Study, solver: SetSolver, settings: Settings) -> None:
    """Queue the first trials that are not there, or that failed before they were finished."""
    names = study.user_attrs.get(WARM_STARTS)
    if names is not None and set(names) <= _started(study):
        return
    choices = warm.choices(solver, settings.goal, min(settings.num_trials, MOST_PRICES))
    study.set_user_attr(WARM_STARTS, list(choices))
    for name, choice in choices.items():
        if name not in _started(study):  # asked each time: another worker may be queueing them too
            start = {} if choice.start is None else {START: list(choice.start)}
            study.enqueue_trial(params_of(choice, solver), user_attrs={WARM_START: name} | start)


def _started(study: optuna.Study) -> set[object]:
    """Names of the first trials that wait, run or are finished."""
    trials = study.get_trials(deepcopy=False)
    return {trial.user_attrs.get(WARM_START) for trial in trials if trial.state is not TrialState.FAIL}


def best_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The best feasible trial, or the front of two objectives by loss. Empty: no trial holds the constraints."""
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    feasible = [trial for trial in finished if is_feasible(trial)]
    if len(study.directions) == 1:
        return sorted(feasible, key=lambda trial: (trial.values[0], trial.number))[:1]
    front: list[FrozenTrial] = []
    for trial in sorted(feasible, key=lambda trial: (*trial.values, trial.number)):
        if not front or trial.values[1] < front[-1].values[1]:
            front.append(trial)
    return front


def nearest(study: optuna.Study) -> dict[str, float]:
    """By limit, what the trial that comes nearest to holding all of them is over it, in the limit's unit; empty where
    none was finished.
    """
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    over = [{name: above for name, above in trial.constraints.items() if above > 0} for trial in finished]
    return min(over, key=lambda each: (len(each), sum(each.values())), default={})


def choice_of(trial: FrozenTrial, evaluator: Evaluator) -> Choice:
    """What a trial sampled."""
    fixed = FixedTrial(trial.params)
    if START in trial.user_attrs:
        fixed.set_user_attr(START, trial.user_attrs[START])
    return sample(fixed, SetSolver(evaluator))


def allocation_of(trial: FrozenTrial, evaluator: Evaluator, goal: Goal) -> Allocation:
    """A trial's allocation with a bound on its loss.

    The bound is the exact solver's: no allocation of the compiled schemes has less loss within the average bits, if the
    sum of its shares of latency is no more than this one's. Where that solution is better for the goal as launches too,
    it is taken instead of the trial's.
    """
    problem = evaluator.problem
    choice, inner = assigned(evaluator, choice_of(trial, evaluator), goal)
    loss, bits, latency, columns = evaluator.arrays(choice)
    scale = np.array([evaluator.fastest_uniform_us[name] for name in problem.scenarios]) * len(problem.scenarios)
    relative = (latency / scale).sum(axis=2)
    rows = np.arange(len(problem.ids))
    slot = (columns == inner.assignment[:, None]).argmax(axis=1)
    solution = solve_arrays(
        loss,
        bits,
        avg_bits=max(problem.avg_bits, inner.avg_bits) if np.isfinite(problem.avg_bits) else float(bits.max()) + 1,
        latency_us=relative,
        max_latency_us=[float(relative[rows, slot].sum())],
        sizes=problem.sizes,
    )
    price = solution.prices["avg_bits"]
    candidates = [inner.assignment, columns[rows, solution.assignment]]
    best = min(candidates, key=lambda assignment: _rank(evaluator, goal, choice, assignment))
    return _allocation(evaluator, choice, best, solution.bound, price if isinstance(price, float) else 0.0)


def _rank(evaluator: Evaluator, goal: Goal, choice: Choice, assignment: Ints) -> tuple[bool, float]:
    """Least first: whether a limit is broken, then the value (of two objectives, their product)."""
    problem = evaluator.problem
    latency = {name: evaluator.launches_us(choice, assignment, name) for name in problem.scenarios}
    breaks = any(latency[name] > limit for name, limit in problem.budget.max_latency_us.items())
    values = goal.values(problem.corrected_loss(assignment), evaluator.relative_latency(latency))
    return breaks, float(np.prod(values))


def _allocation(evaluator: Evaluator, choice: Choice, assignment: Ints, bound: float, price: float) -> Allocation:
    problem = evaluator.problem
    rows = np.arange(len(problem.ids))
    loss = float(problem.loss[rows, assignment].sum())
    avg_bits = float(np.average(problem.bits[rows, assignment], weights=problem.sizes))
    bound = min(bound, loss)
    used = {kind.linear: {problem.schemes[s] for s in assignment[kind.rows.ravel()]} for kind in problem.kinds}
    return Allocation(
        model=problem.model,
        gpu=problem.evidence.gpu.name,
        cost_model_version=problem.evidence.version,
        sensitivity=problem.sensitivity,
        budget=problem.budget,
        granularity=Granularity.LINEAR,
        assignment={block: problem.schemes[s] for block, s in zip(problem.ids, assignment, strict=True)},
        kernel_configs=tuple(
            LaunchKernel(scenario=scenario, linear=linear, scheme=scheme, config=config)
            for (linear, scenario), config in choice.configs.items()
            for scheme in choice.compiled[linear]
            if scheme in used[linear]
        ),
        avg_weight_bits=avg_bits,
        weight_bytes=round(avg_bits * float(problem.sizes.sum()) / 8),
        predicted_latency_us={name: evaluator.launches_us(choice, assignment, name) for name in problem.scenarios},
        predicted_loss=loss,
        bound=bound,
        gap=(loss - bound) / max(abs(loss), abs(bound)) if loss > bound else 0.0,
        shadow_prices={"avg_bits": price},
        uniform=tuple(_uniforms(evaluator)),
    )


def _uniforms(evaluator: Evaluator) -> Iterable[Uniform]:
    problem = evaluator.problem
    table = SetSolver(evaluator).table
    for column, scheme in enumerate(problem.schemes):
        if not np.isfinite(table.loss[:, column]).all():
            continue
        bits = float(np.average(problem.bits[:, column], weights=problem.sizes))
        latency = {
            name: sum(
                len(kind.rows)
                * evaluator.pricer.uniform_us(kind, name, scheme, table.configs[kind.linear, name, scheme])
                for kind in problem.kinds
            )
            for name in problem.scenarios
        }
        holds = all(latency[name] <= limit for name, limit in problem.budget.max_latency_us.items())
        yield Uniform(
            scheme=scheme,
            avg_weight_bits=bits,
            loss=float(problem.loss[:, column].sum()),
            latency_us=latency,
            within_budget=holds and bits <= problem.avg_bits * (1 + 1e-12),
        )
