"""The instance that `bench.study` compares on: Qwen1.5-MoE's shapes, H200 launches as measured or as the latency model
has them, synthetic losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from allocator.budget import Budget
from allocator.sensitivity import Sensitivity
from allocator.study.evaluate import Evaluator
from allocator.study.evidence import Evidence
from allocator.study.objective import Goal, Objective
from allocator.study.problem import of as problem_of
from bench.present import UNIFORM, latency_model
from kernel_gen.formats import dequantize, dequantize_activations, quantize, quantize_activations
from profiles.models import Linear, MoeShape, model
from profiles.schemes import QuantScheme
from profiles.store import ProfileStore

MODEL = model("qwen1.5-moe-a2.7b")
LOAD = "log-normal, sigma 0.7, {} tokens, top 4, seed 0"
SCENARIOS = {"decode": LOAD.format(16), "mixed": LOAD.format(512), "prefill": LOAD.format(8192)}
METRIC = "relative squared error of the formats on Gaussian weights and activations, times log-normal sensitivities"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is asked of an instance. max_schemes: most that a launch holds. slack: each load's launches may take so many
    times those of the fastest uniform scheme under that load; None: no limit.
    """

    name: str
    goal: Goal
    max_schemes: int = 4
    slack: float | None = None


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(name="product, r = 0.75", goal=Goal(loss_weight=0.75)),
        Setting(name="product, r = 0.5", goal=Goal(loss_weight=0.5)),
        Setting(name="product, r = 0.5, 3 schemes a launch", goal=Goal(loss_weight=0.5), max_schemes=3),
        Setting(name="product, r = 0.5, 2 schemes a launch", goal=Goal(loss_weight=0.5), max_schemes=2),
        Setting(name="least loss, loads within 1.5x", goal=Goal(objective=Objective.LOSS), slack=1.5),
        Setting(
            name="least loss, loads within 1.5x, 2 schemes a launch",
            goal=Goal(objective=Objective.LOSS),
            max_schemes=2,
            slack=1.5,
        ),
    )
}


def study_evaluator(layers: int, avg_bits: float, seed: int, setting: Setting) -> Evaluator:
    """Every scheme that was measured, `layers` layers of routed experts."""
    rows = ProfileStore(UNIFORM).records()
    evidence = replace(Evidence.from_profile(rows, MODEL.name, SCENARIOS), latency_model=latency_model())
    offered = sorted({key.scheme for key in evidence.latency_us}, key=lambda scheme: scheme.name)
    losses = sensitivity(offered, layers, seed)

    def evaluator(limits_us: Mapping[str, float]) -> Evaluator:
        budget = Budget(avg_weight_bits=avg_bits, max_latency_us=limits_us)
        return Evaluator.of(problem_of(losses, MODEL, budget, evidence), max_schemes=setting.max_schemes)

    free = evaluator({})
    if setting.slack is None:
        return free
    return evaluator({name: setting.slack * us for name, us in free.fastest_uniform_us.items()})


def sensitivity(offered: list[QuantScheme], layers: int, seed: int, shape: MoeShape = MODEL) -> Sensitivity:
    """Real errors of each format, on made-up layers: an expert's linear weighs log-normal(0, 1.5), a layer (0, 0.7)."""
    rng = np.random.default_rng(seed)
    error = np.array([format_error(scheme) for scheme in offered])
    rows = []
    for layer in range(layers):
        of_layer = rng.lognormal(0, 0.7)
        for expert in range(shape.num_experts):
            for linear in Linear:
                losses = of_layer * rng.lognormal(0, 1.5) * error * rng.lognormal(0, 0.15, len(offered))
                rows += [(layer, expert, linear.value, s.name, loss) for s, loss in zip(offered, losses, strict=True)]
    frame = pd.DataFrame(rows, columns=["layer", "expert", "linear", "scheme", "loss"])
    return Sensitivity(
        frame.assign(model=shape.name, metric=METRIC, data="synthetic", num_samples=1, seed=seed, schema_version=1)
    )


def format_error(scheme: QuantScheme) -> float:
    """Relative squared error of weights plus that of activations, on 256 x 2048 Gaussians."""
    generator = torch.Generator().manual_seed(0)
    weights, tokens = torch.randn(1, 256, 2048, generator=generator), torch.randn(256, 2048, generator=generator)
    error = 0.0
    if scheme.weight_bits < 16:
        error += _relative(dequantize(quantize(weights, scheme)), weights)
    if not scheme.is_weight_only:
        error += _relative(dequantize_activations(quantize_activations(tokens, scheme)), tokens)
    return error


def _relative(approximate: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((approximate.float() - exact) ** 2).sum() / (exact**2).sum())
