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
from allocator.study.objective import params_of, sample
from allocator.study.problem import of as problem_of
from allocator.study.run import evaluator_of
from kernel_gen.legality import reasons
from profiles import loads
from profiles.errors import DataError, SpecError
from profiles.gpus import gpu
from tests.allocator.study.small import EVIDENCE, MODEL, NAMES, a_sensitivity, an_evaluator


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_every_sampled_kernel_is_legal(seed):
    evaluator = an_evaluator()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    choice = sample(study.ask(), evaluator)
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
    evaluator = an_evaluator()
    for choice in warm.choices(evaluator).values():
        again = sample(optuna.trial.FixedTrial(params_of(choice, evaluator)), evaluator)
        assert again.compiled == choice.compiled
        assert again.configs == choice.configs
        assert again.latency_weights == pytest.approx(choice.latency_weights)


def test_the_inner_problem_is_the_exact_solvers():
    evaluator = an_evaluator()
    problem = evaluator.problem
    choice = replace(warm.choices(evaluator)["least loss"], latency_weights=dict.fromkeys(problem.scenarios, 1e-4))
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
    choice = warm.with_best_kernels(evaluator, dict.fromkeys(("gate_up", "down"), (wide,)), 1e-4)
    inner = evaluator.solve(choice)
    assert inner.excess_bits == pytest.approx(inner.avg_bits - 4.25)
    assert inner.excess_bits > 3


def test_latency_weights_buy_latency():
    evaluator = an_evaluator()
    first = warm.choices(evaluator)["least loss"]
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
