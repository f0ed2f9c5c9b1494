"""First trials: the uniform schemes that the budget admits, and the Lagrangian breakpoints of the additive problem, in
which every scheme has its own best kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from allocator.arrays import InfeasibleError, solve_arrays
from allocator.front import pareto_front, solve_product
from allocator.problem import Floats, Ints
from allocator.study.evaluate import INNER_EFFORT, Evaluator
from allocator.study.menu import Choice
from allocator.study.objective import LATENCY_WEIGHTS
from profiles.kernels import KernelConfig
from profiles.schemes import QuantScheme

MOST_UNIFORM = 4
LOSS_WEIGHTS = (0.9, 0.75, 0.5, 0.25)
FRONT_POINTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Additive:
    """Each scheme with its own fastest kernel. relative_latency: [B, S], each block's share, summing to 1 for the
    fastest uniform scheme. loss: inf where a scheme is not offered. configs: by (linear, scenario, scheme).
    """

    loss: Floats
    relative_latency: Floats
    configs: dict[tuple[str, str, QuantScheme], KernelConfig]


def additive(evaluator: Evaluator) -> Additive:
    """The problem of the sequential pipeline: best kernel per scheme first."""
    problem = evaluator.problem
    loss, latency = np.full_like(problem.loss, np.inf), np.zeros_like(problem.loss)
    configs = {}
    for kind in problem.kinds:
        rows = kind.rows.ravel()
        for scheme in evaluator.menu.schemes[kind.linear]:
            column = problem.schemes.index(scheme)
            loss[rows, column] = problem.loss[rows, column]
            for scenario in problem.scenarios:
                config = evaluator.menu.config(kind, scenario, (scheme,), 0)
                configs[kind.linear, scenario, scheme] = config
                share = evaluator.pricer.shares_us(kind, scenario, scheme, config)
                scale = evaluator.fastest_uniform_us[scenario] * len(problem.scenarios)
                latency[rows, column] += np.tile(share, len(kind.rows)) / scale
    return Additive(loss=loss, relative_latency=latency, configs=configs)


def choices(evaluator: Evaluator) -> dict[str, Choice]:
    """The first trials by name, without repetition of scheme sets at equal weights."""
    found = breakpoints(evaluator) | uniforms(evaluator)
    seen: set[str] = set()
    kept = {}
    for name, choice in found.items():
        text = repr((choice.compiled, choice.latency_weights))
        if text not in seen:
            kept[name] = choice
        seen.add(text)
    return kept


def uniforms(evaluator: Evaluator) -> dict[str, Choice]:
    """One scheme for all linears, those of least loss within the average bits; if there are none, the leanest."""
    problem = evaluator.problem
    offered = [s for s in problem.schemes if all(s in held for held in evaluator.menu.schemes.values())]
    columns = [problem.schemes.index(scheme) for scheme in offered]
    bits = [float(np.average(problem.bits[:, column], weights=problem.sizes)) for column in columns]
    fits = [i for i in range(len(offered)) if bits[i] <= problem.avg_bits * (1 + 1e-12)]
    fits = sorted(fits, key=lambda i: float(problem.loss[:, columns[i]].sum()))[:MOST_UNIFORM]
    if not fits and offered:
        fits = [int(np.argmin(bits))]
    found = {}
    for scheme in (offered[i] for i in fits):
        compiled = {kind.linear: (scheme,) for kind in problem.kinds}
        found[f"uniform {scheme.name}"] = with_best_kernels(evaluator, compiled, LATENCY_WEIGHTS[0])
    return found


def breakpoints(evaluator: Evaluator) -> dict[str, Choice]:
    """Scheme sets and multipliers of the additive problem's corners: products of loss and latency, and fewer bits."""
    problem, table = evaluator.problem, additive(evaluator)
    limit = problem.avg_bits if np.isfinite(problem.avg_bits) else float(problem.bits.max()) + 1
    common: dict[str, Any] = {"sizes": problem.sizes, "effort": INNER_EFFORT}
    found: dict[str, Choice] = {}
    try:
        plain = solve_arrays(table.loss, problem.bits, avg_bits=limit, **common)
    except InfeasibleError:
        return found
    if plain.loss > 0:
        for r in LOSS_WEIGHTS:
            corner = solve_product(
                table.loss,
                problem.bits,
                latency_us=table.relative_latency,
                loss_weight=r,
                good_gap=1e-2,
                avg_bits=limit,
                **common,
            )
            loss = _loss(table.loss, corner.solution.assignment)
            weight = (1 - r) / r * loss / corner.latency_us / evaluator.reference_loss
            compiled = most_used(evaluator, corner.solution.assignment)
            found[f"product, r = {r:g}"] = with_best_kernels(evaluator, compiled, weight)
    for point in pareto_front(table.loss, problem.bits, num_points=FRONT_POINTS, **common):
        if point.avg_bits <= limit * (1 + 1e-12):
            compiled = most_used(evaluator, point.assignment)
            found[f"front, {point.avg_bits:.3f} bits"] = with_best_kernels(evaluator, compiled, LATENCY_WEIGHTS[0])
    compiled = most_used(evaluator, plain.assignment)
    found["least loss"] = with_best_kernels(evaluator, compiled, LATENCY_WEIGHTS[0])
    return found


def most_used(evaluator: Evaluator, assignment: Ints) -> dict[str, tuple[QuantScheme, ...]]:
    """By linear, the schemes that most blocks have, as many as a kernel can hold together; and, so that the budget can
    be met, the leanest of those in use among them.
    """
    problem, menu = evaluator.problem, evaluator.menu
    compiled = {}
    for kind in problem.kinds:
        columns, counts = np.unique(assignment[kind.rows.ravel()], return_counts=True)
        order = columns[np.argsort(-counts, kind="stable")]
        leanest = columns[problem.bits[kind.rows[0, 0], columns].argmin()]
        kept = [*order[: menu.max_schemes - 1], leanest, *order[menu.max_schemes - 1 :]]
        compiled[kind.linear] = menu.compatible(kind, [problem.schemes[column] for column in kept])
    return compiled


def with_best_kernels(
    evaluator: Evaluator, compiled: Mapping[str, tuple[QuantScheme, ...]], latency_weight: float
) -> Choice:
    """These sets, each launch with its fastest legal configuration."""
    problem, menu = evaluator.problem, evaluator.menu
    return Choice(
        compiled=compiled,
        configs={
            (kind.linear, scenario): menu.config(kind, scenario, compiled[kind.linear], 0)
            for kind in problem.kinds
            for scenario in problem.scenarios
        },
        latency_weights={name: float(np.clip(latency_weight, *LATENCY_WEIGHTS)) for name in problem.scenarios},
    )


def _loss(loss: Floats, assignment: Ints) -> float:
    return float(loss[np.arange(len(loss)), assignment].sum())
