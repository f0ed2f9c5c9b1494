"""Nothing illegal is ever sampled, and what is sampled is solved exactly."""

from dataclasses import replace

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator import solve_arrays
from allocator.budget import Budget
from allocator.study import warm
from allocator.study.evidence import Evidence
from allocator.study.menu import Choice
from allocator.study.objective import Goal, params_of, sample
from allocator.study.problem import of as problem_of
from allocator.study.run import evaluator_of
from allocator.study.sets import SetSolver
from kernel_gen.legality import reasons
from profiles import loads
from profiles.errors import DataError, SpecError
from profiles.gpus import gpu
from tests.allocator.study.small import EVIDENCE, MODEL, NAMES, a_sensitivity, an_evaluator

GOAL = Goal()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_every_sampled_kernel_is_legal(seed):
    evaluator = an_evaluator()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    choice = sample(study.ask(), SetSolver(evaluator))
    for (linear, _), config in choice.configs.items():
        held = choice.compiled[linear]
        assert 1 <= len(held) <= 4
        assert len(set(held)) == len(held)
        assert reasons(config, held, evaluator.pricer.gpu) == ()


def test_schemes_that_the_gpu_cannot_run_are_never_offered():
    evidence = Evidence(gpu=gpu("a100"), loads=EVIDENCE.loads)
    evaluator = evaluator_of(problem_of(a_sensitivity(), MODEL, Budget(avg_weight_bits=4.25), evidence))
    for offered in evaluator.menu.schemes.values():
        assert {scheme.name for scheme in offered} == {name for name in NAMES if not name.endswith("e4m3")}


def test_a_choice_survives_its_parameters():
    solver = SetSolver(an_evaluator())
    for choice in warm.choices(solver, GOAL, 4).values():
        again = sample(optuna.trial.FixedTrial(params_of(choice, solver)), solver)
        assert choice.configs == {} or again.configs == choice.configs
        assert again.compiled == choice.compiled
        assert again == sample(optuna.trial.FixedTrial(params_of(again, solver)), solver)
        assert again.latency_weights == pytest.approx(choice.latency_weights)


def test_the_inner_problem_is_the_exact_solvers():
    evaluator = an_evaluator()
    problem = evaluator.problem
    choice = evaluator.settle(warm.breakpoints(SetSolver(evaluator))["least loss"])
    inner = evaluator.solve(choice)
    held = {linear: [problem.schemes.index(s) for s in schemes] for linear, schemes in choice.compiled.items()}
    allowed = np.array([[s in held[block.linear.value] for s in range(len(problem.schemes))] for block in problem.ids])
    best = solve_arrays(problem.loss, problem.bits, avg_bits=4.25, sizes=problem.sizes, allowed=allowed)
    assert inner.avg_bits <= 4.25
    assert best.loss <= inner.loss <= best.loss * 1.001
    assert inner.gap <= 1e-4
    assert inner.bound <= inner.objective


def test_a_set_that_cannot_hold_the_budget_says_by_how_much():
    evaluator = an_evaluator()
    wide = next(s for s in evaluator.problem.schemes if s.name == "w8a16_g-1_sym")
    compiled = dict.fromkeys(("gate_up", "down"), (wide,))
    weights = dict.fromkeys(evaluator.problem.scenarios, 1e-4)
    inner = evaluator.solve(evaluator.settle(Choice(compiled=compiled, configs={}, latency_weights=weights)))
    assert inner.excess_bits == pytest.approx(inner.avg_bits - 4.25)
    assert inner.excess_bits > 3


def test_latency_weights_buy_latency():
    evaluator = an_evaluator()
    first = evaluator.settle(warm.breakpoints(SetSolver(evaluator))["least loss"])
    latency = []
    for weight in (1e-4, 10.0):
        choice = replace(first, latency_weights=dict.fromkeys(evaluator.problem.scenarios, weight))
        assignment = evaluator.solve(choice).assignment
        latency.append(evaluator.launches_us(choice, assignment, "prefill"))
    assert latency[1] < latency[0]


def test_inputs_that_do_not_fit_are_refused():
    budget = Budget(avg_weight_bits=4.25)
    frame = a_sensitivity().frame()
    from allocator import Sensitivity

    with pytest.raises(DataError, match="63 experts of 64"):
        problem_of(Sensitivity(frame[frame["expert"] != 3]), MODEL, budget, EVIDENCE)
    with pytest.raises(DataError, match="scenario x has 8 experts, olmoe-1b-7b has 64"):
        problem_of(a_sensitivity(), MODEL, budget, Evidence(gpu=gpu("h200"), loads={"x": loads.uniform(8, 8, 2)}))
    with pytest.raises(SpecError, match="no scenario 'night' to limit"):
        problem_of(a_sensitivity(), MODEL, Budget(max_latency_us={"night": 5.0}), EVIDENCE)
    with pytest.raises(SpecError, match="per_layer"):
        problem_of(a_sensitivity(), MODEL, Budget(avg_weight_bits=4.0, per_layer=True), EVIDENCE)


def test_kernels_left_open_are_the_fastest_ranked_ones():
    evaluator = an_evaluator()
    choice = evaluator.settle(warm.breakpoints(SetSolver(evaluator))["least loss"])
    weighed = evaluator.problem.kinds[0]
    ranked = evaluator.menu.ranked_configs(weighed, "prefill", choice.compiled[weighed.linear])
    assert len(ranked) > 3
    first = {
        (kind.linear, name): evaluator.menu.config(kind, name, choice.compiled[kind.linear], 0)
        for kind in evaluator.problem.kinds
        for name in evaluator.problem.scenarios
    }
    assignment = evaluator.solve(replace(choice, configs=first)).assignment
    times = [
        evaluator.launches_us(
            replace(choice, configs={**first, (weighed.linear, "prefill"): config}), assignment, "prefill"
        )
        for config in ranked
    ]
    assert choice.configs[weighed.linear, "prefill"] == ranked[int(np.argmin(times))]


def test_the_solvers_sets_are_better_than_a_launchs_most_used_schemes():
    evaluator = an_evaluator()
    solver, problem = SetSolver(evaluator), evaluator.problem
    weights = dict.fromkeys(problem.scenarios, 1e-4)
    cost = solver.cost(weights)
    rows = np.arange(len(problem.ids))
    free = solve_arrays(cost, problem.bits, avg_bits=4.25, sizes=problem.sizes)
    chosen = solver.assign(cost, 4.25)
    assert all(len(held) <= 4 for held in solver.solved(weights).values())
    assert free.bound <= cost[rows, chosen].sum() < 1.2 * free.loss
