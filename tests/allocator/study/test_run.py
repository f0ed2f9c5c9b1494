"""A study is seeded, pruned, resumable, and its trials carry their certificate."""

from dataclasses import replace

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from allocator.allocation import Allocation
from allocator.study import run, sequential, warm
from allocator.study.assigned import assigned
from allocator.study.objective import START, WARM_START, Goal, Objective, is_feasible
from allocator.study.sets import SetSolver
from allocator.study.storage import open_storage
from profiles.errors import SpecError
from tests.allocator.study.small import an_evaluator

optuna.logging.set_verbosity(optuna.logging.WARNING)
PRODUCT = Goal()


def settings(trials, goal=PRODUCT, seed=0):
    return run.Settings(goal=goal, num_trials=trials, seed=seed)


def trace(study):
    return [(t.params, t.values, t.state) for t in study.trials if t.state in run.DONE]


@pytest.fixture(scope="module")
def study():
    return run.run(an_evaluator(), settings(24))


def test_the_first_trials_are_uniform_schemes_and_breakpoints(study):
    names = [trial.user_attrs.get(WARM_START) for trial in study.trials]
    first = list(warm.choices(SetSolver(an_evaluator()), PRODUCT, 24))
    assert names[: len(first)] == first
    assert any(name.startswith("uniform") for name in names if name)
    assert any(name.startswith("product") for name in names if name)
    assert names[-1] is None


def test_trials_carry_bits_bound_gap_and_constraints(study):
    for trial in study.trials:
        assert {"avg_bits", "bound", "gap", "loss", "schemes", "kernels"} <= trial.user_attrs.keys()
        assert trial.user_attrs["bound"] <= trial.user_attrs["inner_objective"] * (1 + 1e-12)
        assert 0 <= trial.user_attrs["gap"] <= (1 if START in trial.user_attrs else 1e-4)
        assert (trial.constraints["avg_bits"] <= 0) == (trial.user_attrs["avg_bits"] <= 4.25 * (1 + 1e-12))


def test_a_trials_value_is_its_launches_and_loss(study):
    evaluator = an_evaluator()
    best = run.best_trials(study)[0]
    choice = run.choice_of(best, evaluator)
    _, inner = assigned(evaluator, choice, PRODUCT)
    latency = {s: evaluator.launches_us(choice, inner.assignment, s) for s in evaluator.problem.scenarios}
    assert best.values == list(PRODUCT.values(inner.loss, evaluator.relative_latency(latency)))
    assert latency["decode"] == best.user_attrs["latency_us[decode]"]


def test_pruned_trials_could_not_have_won(study):
    evaluator = an_evaluator()
    pruned = [trial for trial in study.trials if trial.state is TrialState.PRUNED]
    assert pruned
    best = run.best_trials(study)[0].values[0]
    for trial in pruned:
        choice = run.choice_of(trial, evaluator)
        _, inner = assigned(evaluator, choice, PRODUCT)
        latency = {s: evaluator.launches_us(choice, inner.assignment, s) for s in evaluator.problem.scenarios}
        assert PRODUCT.values(inner.loss, evaluator.relative_latency(latency))[0] >= best


def test_the_same_seed_gives_the_same_study_and_another_another(study):
    assert trace(run.run(an_evaluator(), settings(24))) == trace(study)
    assert trace(run.run(an_evaluator(), settings(24, seed=1))) != trace(study)


@pytest.mark.parametrize("stop_at", [1, 5, None])
def test_an_interrupted_study_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch, study, stop_at):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    evaluator, calls = an_evaluator(), 0
    after_first = stop_at is None
    if after_first:  # in the first sampled trial
        first = [t for t in study.trials if WARM_START in t.user_attrs]
        stop_at = 1 + sum(name.startswith("latency_us[") for t in first for name in t.user_attrs)
    price = type(evaluator).launches_us

    def interrupted(self, *arguments):
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt
        return price(self, *arguments)

    monkeypatch.setattr(type(evaluator), "launches_us", interrupted)
    with open_storage(url) as storage, pytest.raises(KeyboardInterrupt):
        run.run(evaluator, settings(24), storage)
    with open_storage(url) as storage:
        again = run.run(evaluator, settings(24), storage)
        found, done = trace(again), run.num_done(again)
        assert run.num_done(run.run(evaluator, settings(24), storage)) == done == 24
    assert {str(params) for params, _, _ in found} >= {
        str(t.params) for t in study.trials if WARM_START in t.user_attrs
    }
    if after_first:  # all first trials were done: nothing is out of order
        assert found == trace(study)


def test_a_trial_that_another_worker_finished_is_let_go(monkeypatch):
    """Optuna's storages may give one waiting trial to two workers at the same moment."""
    finished = []
    tell = optuna.storages.InMemoryStorage.set_trial_state_values

    def meddled(self, trial_id, state, values=None):
        if state is TrialState.COMPLETE and len(finished) < 2:
            finished.append(trial_id)
            tell(self, trial_id, state, values)  # the other worker
        return tell(self, trial_id, state, values)

    monkeypatch.setattr(optuna.storages.InMemoryStorage, "set_trial_state_values", meddled)
    study = run.run(an_evaluator(), settings(8))
    assert len(finished) == 2
    assert run.num_done(study) == 8


def test_other_inputs_are_another_study(tmp_path):
    with open_storage(f"sqlite:///{tmp_path / 'study.db'}") as storage:
        names = {
            run.open_study(an_evaluator(bits).problem, goal, storage).study_name
            for bits in (3.25, 4.25)
            for goal in (PRODUCT, Goal(loss_weight=0.5), Goal(objective=Objective.BOTH))
        }
    assert len(names) == 6


def test_two_objectives_give_a_front():
    goal = Goal(objective=Objective.BOTH)
    front = run.best_trials(run.run(an_evaluator(), settings(30, goal)))
    assert len(front) >= 3
    losses, latencies = zip(*(trial.values for trial in front), strict=True)
    assert list(losses) == sorted(losses)
    assert list(latencies) == sorted(latencies, reverse=True)


def test_a_latency_limit_is_a_constraint_on_launches():
    free = an_evaluator()
    choice = free.settle(warm.breakpoints(SetSolver(free))["least loss"])
    slow = free.launches_us(choice, free.solve(choice).assignment, "decode")
    fast = free.fastest_uniform_us["decode"]
    limit = fast + 0.5 * (slow - fast)
    evaluator, goal = an_evaluator(4.25, limit), Goal(objective=Objective.LOSS)
    study = run.run(evaluator, settings(30, goal))
    best = run.best_trials(study)
    assert best
    assert best[0].user_attrs["latency_us[decode]"] <= limit
    broken = [t for t in study.trials if t.constraints.get("max_latency_us[decode]", 0) > 0]
    assert broken
    assert not any(is_feasible(trial) for trial in broken)
    allocation = run.allocation_of(best[0], evaluator, goal)
    assert allocation.predicted_latency_us["decode"] <= limit
    with pytest.raises(SpecError, match="limit a latency"):
        run.run(free, settings(3, goal))


@pytest.mark.parametrize(
    ("goal", "num_trials"), [(PRODUCT, 6), (Goal(loss_weight=0.4), 2), (Goal(objective=Objective.LOSS), 3)]
)
def test_a_study_is_never_worse_than_the_sequential_pipeline(goal, num_trials):
    """On the same number of trials as that has prices of latency, however few."""
    limit = None if goal.objective is not Objective.LOSS else 1.3 * an_evaluator().fastest_uniform_us["decode"]
    evaluator = an_evaluator(4.25, limit)
    solver = SetSolver(evaluator)
    prices = sequential.prices_of(evaluator, goal, num_trials)
    found = [sequential.one_pass(solver, goal), sequential.swept(solver, goal, prices)]
    least = min(one.value for one in found if one is not None)
    best = run.best_trials(run.run(evaluator, settings(num_trials, goal)))
    assert least == float("inf") if not best else best[0].values[0] <= least


def test_a_start_is_what_a_trial_gives_where_it_is_better():
    evaluator = an_evaluator()
    problem = evaluator.problem
    judged = sequential.one_pass(SetSolver(evaluator), PRODUCT)
    choice = replace(judged.choice, start=tuple(judged.assignment.tolist()))
    spoiled = replace(choice, latency_weights=dict.fromkeys(problem.scenarios, 100.0))  # the solver's own is worse now
    _, inner = assigned(evaluator, spoiled, PRODUCT)
    assert inner.assignment.tolist() == judged.assignment.tolist()
    assert inner.bound <= inner.objective
    worst = np.array([kept[-1] for kept in np.argsort(problem.loss, axis=1)])
    held = {scheme for held in choice.compiled.values() for scheme in held}
    start = [s if problem.schemes[s] in held else a for s, a in zip(worst, judged.assignment, strict=True)]
    _, inner = assigned(evaluator, replace(choice, start=tuple(int(s) for s in start)), PRODUCT)
    assert inner.loss <= problem.corrected_loss(judged.assignment) * 1.05


def test_slack_under_the_limits_is_spent():
    """No block alone can still move to a scheme of less loss."""
    limit = 1.4 * an_evaluator().fastest_uniform_us["decode"]
    evaluator, goal = an_evaluator(4.25, limit), Goal(objective=Objective.LOSS)
    choice = evaluator.settle(warm.at_limits(SetSolver(evaluator))["limits times 0.9"])
    choice, inner = assigned(evaluator, choice, goal)
    loss, _, _, columns = evaluator.arrays(choice)
    took = evaluator.launches_us(choice, inner.assignment, "decode")
    assert took <= limit
    possible = 0
    for block in range(len(loss)):
        now = list(columns[block]).index(inner.assignment[block])
        for slot in range(loss.shape[1]):
            if loss[block, slot] < loss[block, now]:
                moved = inner.assignment.copy()
                moved[block] = columns[block, slot]
                bits = evaluator.at(choice, moved, inner.bound).excess_bits
                possible += bits <= 0 and evaluator.launches_us(choice, moved, "decode") <= limit
    assert possible <= 0.05 * len(loss)


def test_the_allocation_of_a_trial_is_certified_and_a_file(study, tmp_path):
    evaluator = an_evaluator()
    best = run.best_trials(study)[0]
    allocation = run.allocation_of(best, evaluator, PRODUCT)
    assert allocation.bound <= allocation.predicted_loss <= best.user_attrs["loss"] * (1 + 1e-9)
    assert allocation.avg_weight_bits <= 4.25
    assert 0 <= allocation.gap < 0.05
    used = {(kernel.linear, kernel.scheme) for kernel in allocation.kernel_configs}
    assert used == {(block.linear.value, scheme) for block, scheme in allocation.assignment.items()}
    allocation.write(tmp_path / "a.json")
    assert Allocation.read(tmp_path / "a.json") == allocation
