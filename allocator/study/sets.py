"""Scheme sets by the exact solver: with every scheme at its own best kernel, which few schemes should a linear hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from allocator.arrays import InfeasibleError, solve_arrays
from allocator.problem import Floats, Ints
from allocator.solver import Effort
from allocator.study.evaluate import CAPPED_EFFORT, INNER_EFFORT, Evaluator
from profiles.kernels import KernelConfig
from profiles.schemes import QuantScheme

SETS_EFFORT = Effort(good_gap=1e-3, small_items=0, milp_variables=0)
"""For sets of schemes alone, a trial solves its own bits; without HiGHS, whose seconds a seed would not repeat."""
Sets = dict[str, tuple[QuantScheme, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Additive:
    """Each scheme with its own fastest kernel. relative_latency: [B, S, scenarios], each block's share, summing to
    1 / scenarios for the fastest uniform scheme. loss: inf where a scheme is not offered. configs: by (linear,
    scenario, scheme).
    """

    loss: Floats
    relative_latency: Floats
    configs: dict[tuple[str, str, QuantScheme], KernelConfig]


class SetSolver:
    """Solves for sets; what was asked once is remembered."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator
        self._solved: dict[tuple[tuple[float, ...], tuple[tuple[str, float], ...]], Sets] = {}

    @cached_property
    def table(self) -> Additive:
        """The problem of the sequential pipeline: best kernel per scheme first."""
        evaluator, problem = self.evaluator, self.evaluator.problem
        loss = np.full_like(problem.loss, np.inf)
        latency = np.zeros((*problem.loss.shape, len(problem.scenarios)))
        configs = {}
        for kind in problem.kinds:
            rows = kind.rows.ravel()
            for scheme in evaluator.menu.schemes[kind.linear]:
                column = problem.schemes.index(scheme)
                loss[rows, column] = problem.loss[rows, column]
                for i, scenario in enumerate(problem.scenarios):
                    config = evaluator.menu.config(kind, scenario, (scheme,), 0)
                    configs[kind.linear, scenario, scheme] = config
                    share = evaluator.pricer.shares_us(kind, scenario, scheme, config)
                    scale = evaluator.fastest_uniform_us[scenario] * len(problem.scenarios)
                    latency[rows, column, i] = np.tile(share, len(kind.rows)) / scale
        return Additive(loss=loss, relative_latency=latency, configs=configs)

    @cached_property
    def launch_labels(self) -> Ints:
        """[B], equal for all blocks of a linear: its launches are compiled for the same schemes."""
        labels = np.empty(len(self.evaluator.problem.ids), dtype=np.int64)
        for label, kind in enumerate(self.evaluator.problem.kinds):
            labels[kind.rows.ravel()] = label
        return labels

    def cost(self, latency_weights: Mapping[str, float]) -> Floats:
        """Relative loss plus weighted relative latency, [B, S]."""
        weights = np.array([latency_weights[name] for name in self.evaluator.problem.scenarios])
        return np.asarray(self.table.loss / self.evaluator.reference_loss + self.table.relative_latency @ weights)

    def assign(self, cost: Floats, avg_bits: float) -> Ints:
        """Least cost [B, S] within the average bits when all launches of a linear hold the same few schemes."""
        problem = self.evaluator.problem
        return solve_arrays(
            cost,
            problem.bits,
            avg_bits=avg_bits,
            sizes=problem.sizes,
            launches=self.launch_labels,
            max_schemes=self.evaluator.menu.max_schemes,
            effort=SETS_EFFORT,
        ).assignment

    def within(self, limits_us: Mapping[str, float]) -> Ints:
        """Least loss within the bits and the limits on shares of latency, all launches of a linear holding the same few
        schemes. InfeasibleError: nothing holds them.
        """
        evaluator, problem = self.evaluator, self.evaluator.problem
        names = [name for name in problem.scenarios if name in limits_us]
        return solve_arrays(
            self.table.loss,
            problem.bits,
            avg_bits=problem.bits_limit,
            latency_us=self._units(names),
            max_latency_us=[limits_us[name] / evaluator.fastest_uniform_us[name] for name in names],
            sizes=problem.sizes,
            launches=self.launch_labels,
            max_schemes=evaluator.menu.max_schemes,
            scenarios=names,
            effort=INNER_EFFORT,
        ).assignment

    def _units(self, names: Sequence[str]) -> Floats:
        """[B, S, names]: shares of latency, in units of the fastest uniform launches."""
        problem = self.evaluator.problem
        columns = [problem.scenarios.index(name) for name in names]
        return np.asarray(self.table.relative_latency[:, :, columns] * len(problem.scenarios))

    def prices(self, caps_us: Mapping[str, float]) -> dict[str, float]:
        """What latency weighs at the least loss within the bits and the caps on shares of latency, were all schemes
        compiled; 0 in a scenario without a cap. InfeasibleError: nothing holds them.
        """
        evaluator, problem = self.evaluator, self.evaluator.problem
        names = [name for name in problem.scenarios if name in caps_us]
        found = solve_arrays(
            self.table.loss / evaluator.reference_loss,
            problem.bits,
            avg_bits=problem.bits_limit,
            latency_us=self._units(names),
            max_latency_us=[caps_us[name] / evaluator.fastest_uniform_us[name] for name in names],
            sizes=problem.sizes,
            scenarios=names,
            effort=CAPPED_EFFORT,
        )
        scale = len(problem.scenarios)  # prices are of units, weights of their mean over scenarios
        priced = {name: float(np.max(found.prices[f"max_latency_us[{name}]"])) * scale for name in names}
        return dict.fromkeys(problem.scenarios, 0.0) | priced

    def compiled(self, assignment: Ints) -> Sets:
        """By linear, the schemes in use, most blocks first; less those that no kernel can hold beside them."""
        problem, menu = self.evaluator.problem, self.evaluator.menu
        compiled = {}
        for kind in problem.kinds:
            columns, counts = np.unique(assignment[kind.rows.ravel()], return_counts=True)
            order = columns[np.argsort(-counts, kind="stable")]
            compiled[kind.linear] = menu.compatible(kind, [problem.schemes[column] for column in order])
        return compiled

    def solved(self, latency_weights: Mapping[str, float], caps_us: Mapping[str, float] | None = None) -> Sets:
        """The sets for these weights and caps; the leanest scheme alone where no few schemes hold them."""
        problem, caps = self.evaluator.problem, caps_us or {}
        key = tuple(latency_weights[name] for name in problem.scenarios), tuple(sorted(caps.items()))
        if key not in self._solved:
            try:
                priced = self.prices(caps) if caps else dict(latency_weights)
                weights = {name: max(weight, priced[name]) for name, weight in latency_weights.items()}
                found = self.compiled(self.assign(self.cost(weights), problem.bits_limit))
            except InfeasibleError:
                found = {
                    kind.linear: (
                        min(
                            self.evaluator.menu.schemes[kind.linear],
                            key=lambda scheme: scheme.bits_per_weight(kind.shape.k),
                        ),
                    )
                    for kind in problem.kinds
                }
            self._solved[key] = found
        return self._solved[key]
