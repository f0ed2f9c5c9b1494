"""The menu: what may be sampled. A set of schemes is offered only if a kernel can be generated for all of it at once,
and a configuration only if it is legal for the set: hard limits are filtered before sampling, not penalised after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from allocator.allocate import MAX_SCHEMES_PER_LAUNCH
from allocator.study.pricing import Pricer
from allocator.study.problem import LaunchKind, Problem
from kernel_gen.legality import reasons
from kernel_gen.select import table_size
from kernel_gen.space import Effort, candidates
from profiles.errors import DataError
from profiles.kernels import KernelConfig
from profiles.schemes import QuantScheme

NUM_RANKS = 8
"""Configurations of a launch that are worth sampling: the fastest few for its schemes."""
MOST_RANKS = NUM_RANKS + MAX_SCHEMES_PER_LAUNCH
"""With the best of each scheme alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a trial takes as given.

    Attributes:
        compiled: by linear, the schemes that its kernels hold.
        configs: by (linear, scenario), the configuration that runs the launch under that load; for those that are
            left out, `Evaluator.settle` takes the one whose price is least.
        latency_weights: by scenario, the relative loss that one unit of relative latency is worth.
        latency_caps_us: by scenario, the most that the shares of latency may add up to in the inner problem; absent
            ones are not limited.
        own_kernels: the inner problem counts each scheme's latency with its own best kernel, not with the launch's.
        error_weights: by name, a factor on some blocks' losses in the inner problem; absent ones are 1.
        start: an assignment, indices of the problem's schemes, that is judged beside the inner problem's.
    """

    compiled: Mapping[str, tuple[QuantScheme, ...]]
    configs: Mapping[tuple[str, str], KernelConfig]
    latency_weights: Mapping[str, float]
    latency_caps_us: Mapping[str, float] = field(default_factory=dict)
    own_kernels: bool = False
    error_weights: Mapping[str, float] = field(default_factory=dict)
    start: tuple[int, ...] | None = None


class Menu:
    """Legal scheme sets and configurations of a problem's launches."""

    def __init__(self, problem: Problem, pricer: Pricer, *, max_schemes: int = MAX_SCHEMES_PER_LAUNCH) -> None:
        """DataError: a launch that no scheme can run, or that has no scheme with a loss for all its experts."""
        self.problem, self.pricer, self.max_schemes = problem, pricer, max_schemes
        self._legal: dict[tuple[str, frozenset[QuantScheme]], tuple[KernelConfig, ...]] = {}
        self._ranked: dict[tuple[str, str, frozenset[QuantScheme]], tuple[KernelConfig, ...]] = {}
        self._measured: dict[str, tuple[KernelConfig, ...]] = {
            kind.linear: tuple(
                dict.fromkeys(key.config for key in problem.evidence.latency_us if key.linear == kind.linear)
            )
            for kind in problem.kinds
        }
        self.schemes = {kind.linear: self._offered(kind) for kind in problem.kinds}

    def _offered(self, kind: LaunchKind) -> tuple[QuantScheme, ...]:
        loss = self.problem.loss[kind.rows.ravel()]
        schemes = [s for column, s in enumerate(self.problem.schemes) if np.isfinite(loss[:, column]).all()]
        offered = tuple(scheme for scheme in schemes if self.legal_configs(kind, (scheme,)))
        if not offered:
            names = ", ".join(scheme.name for scheme in schemes) or "none"
            raise DataError(
                f"{kind.linear}: no scheme has losses for all experts and a kernel on {self.pricer.gpu.name}"
                f" (with losses: {names})"
            )
        return offered

    def legal_configs(self, kind: LaunchKind, schemes: Sequence[QuantScheme]) -> tuple[KernelConfig, ...]:
        """Measured configurations and those of the quick space that hold all these schemes in one kernel."""
        key = (kind.linear, frozenset(schemes))
        if key not in self._legal:
            gpu, slots = self.pricer.gpu, tuple(sorted(key[1], key=lambda scheme: scheme.name))
            size = table_size(next(iter(kind.loads.values())).num_experts)
            quick = candidates(slots, gpu, Effort.QUICK, max_experts=size)
            measured = [c for c in self._measured[kind.linear] if not reasons(c, slots, gpu, max_experts=size)]
            self._legal[key] = tuple(dict.fromkeys((*measured, *quick)))
        return self._legal[key]

    def ranked_configs(
        self, kind: LaunchKind, scenario: str, schemes: Sequence[QuantScheme]
    ) -> tuple[KernelConfig, ...]:
        """The NUM_RANKS legal configurations with the least mean log latency of uniform launches, fastest first; after
        them those that are the best of one of the schemes alone.
        """
        key = (kind.linear, scenario, frozenset(schemes))
        if key not in self._ranked:
            configs = self.legal_configs(kind, schemes)
            slots = sorted(key[2], key=lambda scheme: scheme.name)
            latency = self.pricer.uniforms_us(kind, scenario, slots, configs)
            order = np.argsort(np.log(latency).mean(axis=0), kind="stable")[:NUM_RANKS]
            self._ranked[key] = tuple(configs[i] for i in dict.fromkeys([*order, *latency.argmin(axis=1)]))
        return self._ranked[key]

    def compatible(self, kind: LaunchKind, schemes: Sequence[QuantScheme]) -> tuple[QuantScheme, ...]:
        """These schemes without repetition, less each that no kernel can hold together with those before it."""
        held: tuple[QuantScheme, ...] = ()
        for scheme in schemes:
            if scheme not in held and len(held) < self.max_schemes and self.legal_configs(kind, (*held, scheme)):
                held = (*held, scheme)
        return held

    def config(self, kind: LaunchKind, scenario: str, schemes: Sequence[QuantScheme], rank: int) -> KernelConfig:
        """The legal configuration of that rank, the last where there are fewer."""
        ranked = self.ranked_configs(kind, scenario, schemes)
        return ranked[min(rank, len(ranked) - 1)]

    def rank(self, kind: LaunchKind, scenario: str, schemes: Sequence[QuantScheme], config: KernelConfig) -> int:
        """The inverse of `config`; 0 for one that is not ranked."""
        ranked = self.ranked_configs(kind, scenario, schemes)
        return ranked.index(config) if config in ranked else 0
