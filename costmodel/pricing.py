"""What a fitted model is for: the cost table that an allocator adds up, one expert's marginal cost, and the choice of a
kernel for a load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from costmodel.features import Kernels, as_frame
from costmodel.kernel_use import KernelUse
from costmodel.model import LatencyModel
from costmodel.model_file import FittedModel
from costmodel.table import CostTable, fastest
from profiles import kernels
from profiles.errors import SpecError
from profiles.gpus import GpuSpec
from profiles.gpus import gpu as find_gpu
from profiles.kernels import KernelConfig
from profiles.loads import TokenLoad
from profiles.models import Linear, MoeShape
from profiles.records import Source
from profiles.schemes import QuantScheme

Array = npt.NDArray[np.float64]
_NORMAL_90 = 2 * 1.6448536269514722
"""Width of a normal distribution's 90% interval in standard deviations."""
_MARGINAL_EXPERTS = 64
"""Experts over which the cost of one is averaged: enough tiles to fill any GPU."""


def cost_table(
    model: FittedModel,
    moe_shape: MoeShape,
    loads: Mapping[str, TokenLoad] | Sequence[TokenLoad],
    schemes: Sequence[QuantScheme],
    *,
    configs: Mapping[QuantScheme, Sequence[KernelConfig]] | None = None,
) -> CostTable:
    """The predicted best configuration and its latency for each routed linear of a model, scheme and load.

    Args:
        model: fitted, from `costmodel.model_file` or `costmodel.fit.fit`: it knows its GPU and configurations.
        moe_shape: whose experts.
        loads: scenarios by name, or loads whose sources name them; of `moe_shape.num_experts` experts.
        schemes: one scheme for all experts each; mixes are priced as launches, not here.
        configs: candidates of each scheme; without it, those that the model was fitted on.

    Raises:
        SpecError: an argument of another type, a model that does not know its GPU, no scheme or load, two loads of one
            name, a load of another number of experts, or a scheme without a configuration.
    """
    if not isinstance(model, FittedModel):
        raise SpecError(f"model: expected a FittedModel, which names its GPU, got a {type(model).__name__}")
    if not isinstance(moe_shape, MoeShape):
        raise SpecError(f"moe_shape: expected a MoeShape, as profiles.models.model gives, got {moe_shape!r}")
    if not isinstance(schemes, Sequence) or not all(isinstance(scheme, QuantScheme) for scheme in schemes):
        raise SpecError(f"schemes: expected a list of what profiles.schemes.parse gives, got {schemes!r}")
    scenarios = _scenarios(loads, moe_shape)
    if not scenarios or not schemes:
        raise SpecError("a cost table needs at least one load and one scheme")
    gpu = find_gpu(model.gpu)
    frames = []
    for linear in Linear:
        n, k = moe_shape.gemm(linear)
        uses = [
            KernelUse(n=n, k=k, schemes=(scheme,), config=config, ctas_per_sm=config.min_ctas_per_sm)
            for scheme in schemes
            for config in _candidates(model, scheme, configs)
        ]
        frames.append(_priced(model, gpu, moe_shape.name, linear.value, uses, scenarios))
    return CostTable(fastest(pd.concat(frames, ignore_index=True)))


def _scenarios(loads: Mapping[str, TokenLoad] | Sequence[TokenLoad], moe_shape: MoeShape) -> dict[str, TokenLoad]:
    """The loads by name, checked."""
    if not isinstance(loads, Mapping | Sequence):
        raise SpecError(f"loads: expected a list of TokenLoad, or a mapping from names to them, got {loads!r}")
    named = list(
        loads.items() if isinstance(loads, Mapping) else ((getattr(each, "source", ""), each) for each in loads)
    )
    found: dict[str, TokenLoad] = {}
    for name, load in named:
        if not isinstance(load, TokenLoad) or not isinstance(name, str):
            raise SpecError(f"loads: expected names and TokenLoads, got {load!r} under {name!r}")
        if load.num_experts != moe_shape.num_experts:
            raise SpecError(
                f"load {name!r} is of {load.num_experts} experts, {moe_shape.name} has {moe_shape.num_experts}"
            )
        if found.setdefault(name, load) != load:
            raise SpecError(f"loads: two different ones are called {name!r}; give a mapping from names to them")
    return found


def _candidates(
    fitted: FittedModel, scheme: QuantScheme, configs: Mapping[QuantScheme, Sequence[KernelConfig]] | None
) -> Sequence[KernelConfig]:
    known = fitted.configs.get(scheme.name, ()) if configs is None else configs.get(scheme, ())
    if not known:
        raise SpecError(f"{scheme.name}: no configuration to price; the model was not fitted on it, so pass `configs`")
    return [kernels.parse(each) if isinstance(each, str) else each for each in known]


def _priced(
    fitted: FittedModel,
    gpu: GpuSpec,
    model: str,
    linear: str,
    uses: Sequence[KernelUse],
    scenarios: Mapping[str, TokenLoad],
) -> pd.DataFrame:
    """Every candidate under every load, as rows of a cost table."""
    names, loads = list(scenarios), list(scenarios.values())
    use_of, load_of = (grid.ravel() for grid in np.meshgrid(range(len(uses)), range(len(loads)), indexing="ij"))
    X = as_frame(Kernels(gpu, uses).matrix(loads, use_of, load_of))
    latency, lower, upper = fitted.model.predict(X, return_interval=True)
    return pd.DataFrame(
        {
            "gpu": gpu.name,
            "model_version": fitted.version,
            "model": model,
            "linear": linear,
            "scheme": [uses[use].schemes[0].name for use in use_of],
            "scenario": [names[load] for load in load_of],
            "tokens_per_expert": [float(np.mean(loads[load].tokens_per_expert)) for load in load_of],
            "latency_us": latency,
            "std_us": (upper - lower) / _NORMAL_90,
            "config": [uses[use].config.name for use in use_of],
            "source": Source.PREDICTED.value,
        }
    )


def marginal_expert_costs(model: LatencyModel, gpu: GpuSpec, use: KernelUse, tokens: Sequence[int]) -> Array:
    """Microseconds that one more expert with these tokens adds to a launch that fills the GPU, [len(tokens)]: what many
    such experts take together above an idle launch, per expert.

    Zero for no tokens and non-decreasing in them, as the launch's latency is. `use` has one scheme.
    """
    counts = [0, *(int(count) for count in tokens)]
    loads = [TokenLoad(tokens_per_expert=(count,) * _MARGINAL_EXPERTS, source="marginal") for count in counts]
    X = as_frame(Kernels(gpu, [use]).matrix(loads, np.zeros(len(loads), dtype=np.intp), np.arange(len(loads))))
    latency = model.predict(X)
    return np.asarray((latency[1:] - latency[0]) / _MARGINAL_EXPERTS, dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The predicted best of some kernels for a load, in microseconds."""

    use: KernelUse
    latency_us: float


class KernelChooser:
    """Chooses among kernels for one linear, load by load; made once, since what does not depend on tokens is kept."""

    def __init__(self, model: LatencyModel, gpu: GpuSpec, uses: Sequence[KernelUse]) -> None:
        """SpecError without a kernel."""
        if not uses:
            raise SpecError("no kernels to choose from")
        self._model, self._kernels = model, Kernels(gpu, uses)
        self._every = np.arange(len(uses))
        self._same_load = np.zeros(len(uses), dtype=np.intp)

    def latencies_us(self, load: TokenLoad) -> Array:
        """Of each kernel, in their order."""
        return self._model.latencies_us(self._kernels.matrix([load], self._every, self._same_load))

    def choose(self, load: TokenLoad) -> Choice:
        """The fastest; the first of equals."""
        latencies = self.latencies_us(load)
        best = int(latencies.argmin())
        return Choice(use=self._kernels.uses[best], latency_us=float(latencies[best]))
