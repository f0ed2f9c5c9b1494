"""A choice, solved and priced: the exact inner solver picks each block's scheme among the compiled ones, then whole
launches are priced with the chosen kernels under the scenarios' loads.

The inner problem is a sum over blocks, weighted loss plus weighted latency within the average bits; the outer study
moves its weights and what it may choose from, and judges what it returns by launches and by the corrected loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from allocator.allocate import MAX_SCHEMES_PER_LAUNCH
from allocator.arrays import InfeasibleError, Solution, solve_arrays
from allocator.problem import Floats, Ints
from allocator.solver import Effort
from allocator.study.menu import Choice, Menu
from allocator.study.pricing import MixedLaunch, Pricer
from allocator.study.problem import LaunchKind, Problem
from profiles.kernels import KernelConfig
from profiles.models import LinearId
from profiles.schemes import QuantScheme

ERROR_WEIGHTS = ("down", "activations", "late_layers")
"""What an error weight may act on: down projections, schemes that quantise activations, the later half of layers."""
INNER_EFFORT = Effort(good_gap=1e-4, small_items=300, milp_seconds=2.0)
"""A trial stops at a gap of 0.01%: finer differences are below what launches are known to."""

CAPPED_EFFORT = Effort(good_gap=1e-3, small_items=0, narrow=(300, 30), wide=(300, 30), milp_variables=0)
"""Under several caps, which move: a bound and a rounding are enough."""
PRICED_LAYERS = 4
"""Layers whose launches decide between configurations: they differ little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    """What the inner solver returned.

    assignment: int64 [blocks], indices of the problem's schemes. objective, bound, gap: of the inner problem, its bits
    and the compiled schemes given. excess_bits: how far the average bits are above the budget; positive only where the
    compiled schemes cannot hold it (the assignment is then the leanest).
    """

    assignment: Ints
    objective: float
    bound: float
    gap: float
    avg_bits: float
    excess_bits: float
    loss: float


class Evaluator:
    """Solves and prices choices of one problem."""

    def __init__(self, problem: Problem, pricer: Pricer, menu: Menu) -> None:
        self.problem, self.pricer, self.menu = problem, pricer, menu
        self._late = _late_layers(problem)

    @classmethod
    def of(cls, problem: Problem, *, max_schemes: int = MAX_SCHEMES_PER_LAUNCH) -> Evaluator:
        """Of one problem's choices, with at most so many schemes a launch. DataError: a launch that nothing can run."""
        pricer = Pricer(problem.evidence, problem.kinds)
        return cls(problem, pricer, Menu(problem, pricer, max_schemes=max_schemes))

    @cached_property
    def fastest_uniform_us(self) -> dict[str, float]:
        """By scenario, the least latency of all layers in one scheme a linear: what latencies are relative to."""
        return {
            scenario: sum(
                len(kind.rows)
                * min(
                    self.pricer.uniform_us(kind, scenario, s, self.menu.config(kind, scenario, (s,), 0))
                    for s in self.menu.schemes[kind.linear]
                )
                for kind in self.problem.kinds
            )
            for scenario in self.problem.scenarios
        }

    @cached_property
    def reference_loss(self) -> float:
        """A loss to measure weights in: the mean over blocks of the geometric mean of positive losses, times blocks."""
        finite = self.problem.loss[np.isfinite(self.problem.loss) & (self.problem.loss > 0)]
        return float(np.exp(np.log(finite).mean())) * len(self.problem.ids) if finite.size else 1.0

    def relative_latency(self, latency_us: Mapping[str, float]) -> float:
        """Mean over scenarios of latency over the fastest uniform one's; 1 is as fast as one scheme can be."""
        return float(np.mean([us / self.fastest_uniform_us[name] for name, us in latency_us.items()]))

    def settle(self, choice: Choice) -> Choice:
        """The choice with a configuration for every launch: where none is given, of the ranked ones the fastest for
        what the inner solver assigns, priced as launches of a few layers.
        """
        problem, menu = self.problem, self.menu
        launches = [(kind, name) for kind in problem.kinds for name in problem.scenarios]
        left = [(kind, name) for kind, name in launches if (kind.linear, name) not in choice.configs]
        if not left:
            return choice
        first = {(kind.linear, name): menu.config(kind, name, choice.compiled[kind.linear], 0) for kind, name in left}
        begun = replace(choice, configs={**choice.configs, **first})
        assignment = self.solve(begun).assignment
        priced = {(kind.linear, name): self._fastest(kind, name, begun, assignment) for kind, name in left}
        return replace(choice, configs={**choice.configs, **priced})

    def _fastest(self, kind: LaunchKind, scenario: str, choice: Choice, assignment: Ints) -> KernelConfig:
        ranked = self.menu.ranked_configs(kind, scenario, choice.compiled[kind.linear])
        layers = kind.rows[np.linspace(0, len(kind.rows) - 1, min(PRICED_LAYERS, len(kind.rows))).astype(int)]
        launches = [
            MixedLaunch(
                kind=kind,
                scenario=scenario,
                config=config,
                compiled=choice.compiled[kind.linear],
                schemes=tuple(self.problem.schemes[s] for s in assignment[rows]),
            )
            for config in ranked
            for rows in layers
        ]
        total = self.pricer.launches_us(launches).reshape(len(ranked), len(layers)).sum(axis=1)
        return ranked[int(total.argmin())]

    def solve(self, choice: Choice) -> Inner:
        """The inner problem's solution; where nothing holds the caps, the one without them."""
        problem = self.problem
        loss, bits, latency, columns = self.arrays(choice)
        cost = self._cost(choice, loss, latency, columns)
        rows = np.arange(len(problem.ids))
        found = self._within(choice, cost, bits, latency)
        if found is not None:
            chosen, objective, bound, gap = found.assignment, found.loss, found.bound, found.gap
        else:
            chosen = np.where(np.isfinite(cost), bits, np.inf).argmin(axis=1)
            objective = bound = float(cost[rows, chosen].sum())
            gap = 0.0
        return self._inner(columns[rows, chosen], objective, bound, gap)

    def at(self, choice: Choice, assignment: Ints, bound: float) -> Inner:
        """Another assignment of the compiled schemes, with the inner problem's value of it."""
        loss, _, latency, columns = self.arrays(choice)
        rows = np.arange(len(assignment))
        slot = (columns == assignment[:, None]).argmax(axis=1)
        objective = float(self._cost(choice, loss, latency, columns)[rows, slot].sum())
        bound = min(bound, objective)
        return self._inner(assignment, objective, bound, (objective - bound) / (max(abs(objective), abs(bound)) or 1.0))

    def _inner(self, assignment: Ints, objective: float, bound: float, gap: float) -> Inner:
        problem, limit = self.problem, self.problem.bits_limit
        bits = problem.bits[np.arange(len(assignment)), assignment]
        avg_bits = float(np.average(bits, weights=problem.sizes))
        return Inner(
            assignment=assignment,
            objective=objective,
            bound=bound,
            gap=gap,
            avg_bits=avg_bits,
            excess_bits=avg_bits - limit if avg_bits > limit * (1 + 1e-12) else min(0.0, avg_bits - limit),
            loss=problem.corrected_loss(assignment),
        )

    def _cost(self, choice: Choice, loss: Floats, latency: Floats, columns: Ints) -> Floats:
        """[B, slots]."""
        scale = len(self.problem.scenarios)
        weights = [
            choice.latency_weights[name] / scale / self.fastest_uniform_us[name] for name in self.problem.scenarios
        ]
        errors = loss * self._error_factors(choice, columns) / self.reference_loss
        return np.asarray(errors + latency @ np.array(weights))

    def _within(self, choice: Choice, cost: Floats, bits: Floats, latency: Floats) -> Solution | None:
        """Least cost within bits and caps, else as near to the caps as the bits allow; None: the bits cannot be held by
        the compiled schemes.
        """
        problem = self.problem
        capped = [i for i, name in enumerate(problem.scenarios) if name in choice.latency_caps_us]
        common: dict[str, Any] = {"avg_bits": problem.bits_limit, "sizes": problem.sizes}
        if capped:
            caps = [choice.latency_caps_us[problem.scenarios[i]] for i in capped]
            try:
                return solve_arrays(
                    cost, bits, latency_us=latency[:, :, capped], max_latency_us=caps, effort=CAPPED_EFFORT, **common
                )
            except InfeasibleError:  # said by the trial's constraints, which the launches then break
                cost = np.where(np.isfinite(cost), (latency[:, :, capped] / np.array(caps)).sum(axis=2), np.inf)
        try:
            return solve_arrays(cost, bits, effort=INNER_EFFORT, **common)
        except InfeasibleError:
            return None

    def launches_us(self, choice: Choice, assignment: Ints, scenario: str, only: LaunchKind | None = None) -> float:
        """All layers' launches under one load, of one linear if only that is asked for, priced as launches."""
        schemes = self.problem.schemes
        launches = [
            MixedLaunch(
                kind=kind,
                scenario=scenario,
                config=choice.configs[kind.linear, scenario],
                compiled=choice.compiled[kind.linear],
                schemes=tuple(schemes[s] for s in assignment[rows]),
            )
            for kind in (self.problem.kinds if only is None else [only])
            for rows in kind.rows
        ]
        return float(self.pricer.launches_us(launches).sum())

    def best_launches_us(self, assignment: Mapping[LinearId, QuantScheme]) -> dict[str, float] | None:
        """By scenario, all launches of all layers, each with the fastest of the ranked configurations that hold its
        schemes; None where no kernel holds a launch's schemes together.
        """
        total = dict.fromkeys(self.problem.scenarios, 0.0)
        for kind in self.problem.kinds:
            for rows in kind.rows:
                schemes = tuple(assignment[self.problem.ids[row]] for row in rows)
                held = tuple(sorted(set(schemes), key=lambda scheme: scheme.name))
                if not self.menu.legal_configs(kind, held):
                    return None
                for scenario in self.problem.scenarios:
                    launches = [
                        MixedLaunch(kind=kind, scenario=scenario, config=config, compiled=held, schemes=schemes)
                        for config in self.menu.ranked_configs(kind, scenario, held)
                    ]
                    total[scenario] += float(self.pricer.launches_us(launches).min())
        return total

    def arrays(self, choice: Choice) -> tuple[Floats, Floats, Floats, Ints]:
        """What the inner problem chooses from: loss (inf beyond a launch's schemes) and bits [B, slots], shares of
        latency [B, slots, scenarios], and the scheme of each column [B, slots].
        """
        problem = self.problem
        width = max(len(held) for held in choice.compiled.values())
        shape = (len(problem.ids), width)
        loss, bits = np.full(shape, np.inf), np.zeros(shape)
        latency, columns = np.zeros((*shape, len(problem.scenarios))), np.zeros(shape, dtype=np.int64)
        for kind in problem.kinds:
            rows = kind.rows.ravel()
            for slot, scheme in enumerate(choice.compiled[kind.linear]):
                column = problem.schemes.index(scheme)
                loss[rows, slot], bits[rows, slot] = problem.loss[rows, column], problem.bits[rows, column]
                columns[rows, slot] = column
                latency[rows, slot] = self._of_launch(kind, choice, slot)
        return loss, bits, latency, columns

    def _of_launch(self, kind: LaunchKind, choice: Choice, slot: int) -> Floats:
        """[layers * experts, scenarios]."""
        scheme = choice.compiled[kind.linear][slot]
        configs = [
            self.menu.config(kind, name, (scheme,), 0) if choice.own_kernels else choice.configs[kind.linear, name]
            for name in self.problem.scenarios
        ]
        one_layer = [
            self.pricer.shares_us(kind, name, scheme, config)
            for name, config in zip(self.problem.scenarios, configs, strict=True)
        ]
        return np.tile(np.stack(one_layer, axis=1), (len(kind.rows), 1))

    def _error_factors(self, choice: Choice, columns: Ints) -> Floats:
        """[blocks, slots]."""
        problem, weights = self.problem, choice.error_weights
        factors = np.ones(columns.shape)
        is_down = np.array([block.linear.value == "down" for block in problem.ids])
        is_weight_only = np.array([scheme.is_weight_only for scheme in problem.schemes])
        factors[is_down] *= weights.get("down", 1.0)
        factors[self._late] *= weights.get("late_layers", 1.0)
        factors[~is_weight_only[columns]] *= weights.get("activations", 1.0)
        return factors


def _late_layers(problem: Problem) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    layers = np.array([block.layer for block in problem.ids])
    return np.asarray(layers > np.median(np.unique(layers)), dtype=np.bool_)
