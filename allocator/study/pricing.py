"""Latency of launches: the latency model, scaled by what was measured nearest to each.

The model is the one that evidence brings, fitted on measurements, else the analytic one. A launch of one scheme that
was measured costs what was measured. A mixed launch costs what the model says of its tile list under its load, times
its schemes' mean ratio of measured to modelled, weighed by each scheme's share of the work: where a fitted model has
not seen a launch the ratio is 1, where the analytic one has not it is that of the same tile. On 172 mixed launches of
one H200 (earlier/mixed_v2.parquet, 2026-11-24) the median error is 5.4% by the analytic model (17% at 90%), 3.6% by one
fitted without that set of schemes (12%).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from allocator.problem import Floats
from allocator.study.evidence import Evidence, LaunchKey
from allocator.study.problem import LaunchKind
from costmodel import features
from costmodel.analytic import launch_latencies, marginal_expert_cost
from costmodel.launches import Launch
from kernel_gen.legality import estimated_facts
from kernel_gen.select import table_size
from profiles.kernels import KernelConfig
from profiles.schemes import QuantScheme


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedLaunch:
    """One launch to price. compiled: the schemes that its kernel holds. schemes: one for each expert."""

    kind: LaunchKind
    scenario: str
    config: KernelConfig
    compiled: tuple[QuantScheme, ...]
    schemes: tuple[QuantScheme, ...]


class Pricer:
    """Prices launches of one model on one GPU; what was asked once is remembered."""

    def __init__(self, evidence: Evidence, kinds: Sequence[LaunchKind]) -> None:
        self.evidence, self.gpu = evidence, evidence.gpu
        self._base: dict[LaunchKey, float] = {}
        self._share: dict[LaunchKey, Floats] = {}
        self._ratios: dict[LaunchKey, float] = {}
        of_linear = {kind.linear: kind for kind in kinds}
        known = [key for key in evidence.latency_us if key.linear in of_linear and key.scenario in evidence.loads]
        self._predict([(of_linear[key.linear], key) for key in known])
        self._by_tile: dict[tuple[object, ...], list[float]] = {}
        self._by_scheme: dict[tuple[str, str, QuantScheme], list[float]] = {}
        for key in known:
            ratio = evidence.latency_us[key] / self._base[key]
            self._by_tile.setdefault(_tile(key), []).append(ratio)
            self._by_scheme.setdefault((key.linear, key.scenario, key.scheme), []).append(ratio)
        every = [ratio for ratios in self._by_scheme.values() for ratio in ratios]
        self._overall = float(np.median(every)) if every else 1.0

    def uniform_us(self, kind: LaunchKind, scenario: str, scheme: QuantScheme, config: KernelConfig) -> float:
        """A launch whose experts all have one scheme."""
        key = LaunchKey(linear=kind.linear, scenario=scenario, scheme=scheme, config=config)
        known = self.evidence.latency_us.get(key)
        return self.base_us(kind, key) * self.ratio(kind, key) if known is None else known

    def uniforms_us(
        self, kind: LaunchKind, scenario: str, schemes: Sequence[QuantScheme], configs: Sequence[KernelConfig]
    ) -> Floats:
        """`uniform_us` of all pairs, [schemes, configs]."""
        keys = [
            LaunchKey(linear=kind.linear, scenario=scenario, scheme=scheme, config=config)
            for scheme in schemes
            for config in configs
        ]
        self._predict([(kind, key) for key in keys if key not in self._base])
        latency = [self.uniform_us(kind, scenario, key.scheme, key.config) for key in keys]
        return np.array(latency).reshape(len(schemes), len(configs))

    def base_us(self, kind: LaunchKind, key: LaunchKey) -> float:
        """What the latency model says alone."""
        if key not in self._base:
            self._predict([(kind, key)])
        return self._base[key]

    def ratio(self, kind: LaunchKind, key: LaunchKey) -> float:
        """Measured over modelled: of this launch, else of the same tile, of the same scheme, of all; a fitted model has
        learned from those already.
        """
        if key not in self._ratios:
            known = self.evidence.latency_us.get(key)
            if known is not None:
                self._ratios[key] = known / self.base_us(kind, key)
            elif self.evidence.latency_model is not None:
                self._ratios[key] = 1.0
            else:
                near = self._by_tile.get(_tile(key)) or self._by_scheme.get((key.linear, key.scenario, key.scheme))
                self._ratios[key] = float(np.median(near)) if near else self._overall
        return self._ratios[key]

    def shares_us(self, kind: LaunchKind, scenario: str, scheme: QuantScheme, config: KernelConfig) -> Floats:
        """Each expert's part of a uniform launch [experts]; they sum to its latency.

        A batch leaves experts idle, the next one leaves others idle: an idle expert's part is that of one with a token,
        lest the inner problem find its bits free.
        """
        key = LaunchKey(linear=kind.linear, scenario=scenario, scheme=scheme, config=config)
        if key not in self._share:
            tokens = kind.loads[scenario].tokens_per_expert
            facts = estimated_facts(config, (scheme,), self.gpu, max_experts=table_size(len(tokens)))
            counts, place = np.unique(np.maximum(tokens, 1), return_inverse=True)
            cost = marginal_expert_cost(self.gpu, kind.shape, scheme, config, facts, counts.tolist())[place]
            self._share[key] = self.uniform_us(kind, scenario, scheme, config) * cost / cost.sum()
        return self._share[key]

    def launches_us(self, launches: Sequence[MixedLaunch]) -> Floats:
        """Latency of each launch, in order."""
        if not launches:
            return np.zeros(0)
        base = self._modelled([self._launch(launch) for launch in launches])
        return np.asarray(base * [self._mean_ratio(launch) for launch in launches], dtype=np.float64)

    def _modelled(self, launches: Sequence[Launch]) -> Floats:
        fitted = self.evidence.latency_model
        if fitted is None:
            return np.asarray(launch_latencies(self.gpu, launches)["latency_us"].to_numpy(), dtype=np.float64)
        return np.asarray(fitted.model.predict(features.of_launches(self.gpu, launches)), dtype=np.float64)

    def _launch(self, launch: MixedLaunch) -> Launch:
        load = launch.kind.loads[launch.scenario]
        size = table_size(load.num_experts)
        facts = estimated_facts(launch.config, launch.compiled, self.gpu, max_experts=size)
        return Launch(shape=launch.kind.shape, load=load, schemes=launch.schemes, config=launch.config, facts=facts)

    def _mean_ratio(self, launch: MixedLaunch) -> float:
        """The schemes' ratios, weighed by their active experts' shares."""
        ratios, weights = [], []
        active = np.array(launch.kind.loads[launch.scenario].tokens_per_expert) > 0
        of_expert = np.array([launch.compiled.index(scheme) for scheme in launch.schemes])
        for slot in np.unique(of_expert):
            scheme = launch.compiled[slot]
            key = LaunchKey(linear=launch.kind.linear, scenario=launch.scenario, scheme=scheme, config=launch.config)
            ratios.append(self.ratio(launch.kind, key))
            shares = self.shares_us(launch.kind, launch.scenario, scheme, launch.config)
            weights.append(float(shares[(of_expert == slot) & active].sum()))
        return float(np.average(ratios, weights=weights)) if sum(weights) else float(np.mean(ratios))

    def _predict(self, keys: Sequence[tuple[LaunchKind, LaunchKey]]) -> None:
        """Fill `_base`."""
        launches = [
            self._launch(
                MixedLaunch(
                    kind=kind,
                    scenario=key.scenario,
                    config=key.config,
                    compiled=(key.scheme,),
                    schemes=(key.scheme,),
                )
            )
            for kind, key in keys
        ]
        if launches:
            latency = self._modelled(launches).tolist()
            self._base |= {key: us for (_, key), us in zip(keys, latency, strict=True)}


def _tile(key: LaunchKey) -> tuple[object, ...]:
    """Launches that differ in stages, order or CTAs an SM only."""
    config = key.config
    return key.linear, key.scenario, key.scheme, config.family, config.tile, config.warps
