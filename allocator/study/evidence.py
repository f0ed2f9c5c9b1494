"""Evidence: the token loads that an allocation is for, and launches that were measured or predicted under them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import pandas as pd

from costmodel.analytic import model_version
from costmodel.model_file import FittedModel
from costmodel.table import CostTable
from profiles import kernels, schemes
from profiles.errors import DataError, SpecError
from profiles.gpus import GpuSpec
from profiles.gpus import gpu as find_gpu
from profiles.kernels import KernelConfig
from profiles.loads import TokenLoad
from profiles.records import Status
from profiles.schemes import QuantScheme


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchKey:
    """A launch in which all experts share one scheme. linear: as in a cost table, `gate_up`, `shared_down`, ..."""

    linear: str
    scenario: str
    scheme: QuantScheme
    config: KernelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is known about one model's launches on one GPU.

    Attributes:
        gpu: whose latencies these are.
        loads: the routed experts' load in each scenario.
        latency_us: launches whose latency is known; others are predicted.
        version: what made the numbers.
        latency_model: fitted on this GPU's launches, prices those that were not measured; None: the analytic model.
    """

    gpu: GpuSpec
    loads: Mapping[str, TokenLoad]
    latency_us: Mapping[LaunchKey, float] = field(default_factory=lambda: MappingProxyType({}))
    version: str = "analytic"
    latency_model: FittedModel | None = None

    def __post_init__(self) -> None:
        if self.latency_model is not None and self.latency_model.gpu != self.gpu.name:
            raise DataError(f"the latency model is of {self.latency_model.gpu}, the latencies are of {self.gpu.name}")

    @property
    def model_version(self) -> str:
        """Of what prices launches that were not measured."""
        return model_version() if self.latency_model is None else self.latency_model.version

    @classmethod
    def from_profile(cls, profile: pd.DataFrame, model: str, scenarios: Mapping[str, str] | None = None) -> Evidence:
        """Every configuration of a profile's finished uniform launches (`ProfileStore.records()`), not only the best.

        scenarios: a load's source by the scenario's name; None: every load of the model, named by its source.
        DataError: nothing is left, several GPUs, or a load of that name with two different splits.
        """
        finished = profile["status"] == Status.OK.value
        rows = profile[finished & (profile["model"] == model) & (profile["schemes"].map(len) == 1)]
        if rows.empty:
            have = ", ".join(sorted(set(profile.loc[finished, "model"].astype(str))))
            raise DataError(f"the profile has no finished launches of {model} in one scheme; it has {have or 'none'}")
        sources = scenarios or {str(name): str(name) for name in sorted(rows["load_source"].unique())}
        return cls(
            gpu=find_gpu(_only(rows["gpu"], "GPU")),
            loads={name: _load(rows, name, source) for name, source in sources.items()},
            latency_us={
                LaunchKey(
                    linear=linear, scenario=name, scheme=schemes.parse(scheme[0]), config=kernels.parse(config)
                ): us
                for name, source in sources.items()
                for linear, scheme, config, us in _columns(
                    rows[rows["load_source"] == source], "linear", "schemes", "config", "latency_us"
                )
            },
            version="profile",
        )

    @classmethod
    def from_cost_table(
        cls, table: CostTable, model: str, num_experts: int, loads: Mapping[str, TokenLoad] | None = None
    ) -> Evidence:
        """The best launch of each scheme. A cost table keeps no skew: without `loads`, they are taken as even.

        DataError: no rows of the model, or of a scenario without a load.
        """
        frame = table.frame()
        rows = frame[frame["model"] == model]
        if rows.empty:
            have = ", ".join(sorted(set(frame["model"].astype(str))))
            raise DataError(f"the cost table has no rows of {model}; it has {have}")
        tokens = rows[~rows["linear"].str.startswith("shared_")].groupby("scenario")["tokens_per_expert"].first()
        if loads is not None and (unknown := sorted(set(rows["scenario"]) ^ set(loads))):
            raise DataError(f"the cost table and the loads differ in {', '.join(unknown)}")
        return cls(
            gpu=table.gpu,
            loads=loads or {str(name): _even(num_experts, float(mean)) for name, mean in tokens.items()},
            latency_us={
                LaunchKey(linear=linear, scenario=name, scheme=schemes.parse(scheme), config=kernels.parse(config)): us
                for linear, name, scheme, config, us in _columns(
                    rows, "linear", "scenario", "scheme", "config", "latency_us"
                )
            },
            version=table.model_version,
        )


def _even(num_experts: int, mean: float) -> TokenLoad:
    each, more = divmod(round(mean * num_experts), num_experts)
    tokens = tuple(each + (expert < more) for expert in range(num_experts))
    return TokenLoad(tokens_per_expert=tokens, source=f"even, {mean:g} tokens an expert")


def _columns(rows: pd.DataFrame, *names: str) -> Iterator[tuple[Any, ...]]:
    return zip(*(rows[name].tolist() for name in names), strict=True)


def _only(values: pd.Series[str], what: str) -> str:
    names = sorted(set(values.astype(str)))
    if len(names) > 1:
        raise DataError(f"the profile's rows are of more than one {what}: {', '.join(names)}; select one")
    return names[0]


def _load(rows: pd.DataFrame, name: str, source: str) -> TokenLoad:
    splits = {
        tuple(int(count) for count in tokens) for tokens in rows.loc[rows["load_source"] == source].tokens_per_expert
    }
    if not splits:
        have = "; ".join(sorted(set(rows["load_source"].astype(str))))
        raise SpecError(f"scenario {name}: the profile has no load {source!r}; it has {have}")
    if len(splits) > 1:
        raise DataError(f"scenario {name}: the profile has {len(splits)} different loads called {source!r}")
    return TokenLoad(tokens_per_expert=splits.pop(), source=source)
