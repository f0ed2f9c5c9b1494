"""Allocation: the decision as a file. JSON with a schema version, checked when loaded."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

from allocator.budget import Budget
from profiles import kernels, schemes
from profiles.atomic import replacing
from profiles.errors import DataError, SpecError
from profiles.kernels import KernelConfig
from profiles.models import Linear, LinearId
from profiles.schemes import QuantScheme

KIND = "bitile allocation"
SCHEMA_VERSION = 1
"""Of the file; allocation.schema.json beside this module says the same to other tools."""


SHARED = -1
"""`expert` of the shared expert."""


class Granularity(Enum):
    """What gets one scheme."""

    LINEAR = "linear"  # each linear of each expert
    PROJECTION = "projection"  # a linear of all experts of a layer
    EXPERT = "expert"  # both linears of an expert
    LAYER = "layer"


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchKernel:
    """The kernel of one scheme in one launch. linear: as in a cost table, `gate_up`, `down`, `shared_gate_up`,
    `shared_down`.
    """

    scenario: str
    linear: str
    scheme: QuantScheme
    config: KernelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform:
    """All linears in one scheme, to compare with. `within_budget`: it holds every limit."""

    scheme: QuantScheme
    avg_weight_bits: float
    loss: float
    latency_us: Mapping[str, float]
    within_budget: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """One scheme for every linear, and what it is predicted to cost.

    Attributes:
        model: the model's name.
        gpu: whose latencies and kernels these are; None without a cost table.
        cost_model_version: what made the latencies; None without a cost table.
        sensitivity: where the losses are from (model, metric, data, num_samples, seed).
        budget: the limits that hold.
        granularity: what got one scheme.
        assignment: a scheme for each linear; expert -1 is the shared expert.
        kernel_configs: for every scheme in use, the kernel of each launch and scenario.
        avg_weight_bits: stored bits per weight, scales and zero points counted.
        weight_bytes: the same in bytes.
        predicted_latency_us: by scenario, the sum over all layers' launches.
        predicted_loss: the sum of the losses.
        bound: no allocation within the budget has less loss.
        gap: (predicted_loss - bound) / max(|predicted_loss|, |bound|).
        shadow_prices: by limit, the loss that one more unit of it saves at most.
        uniform: the uniform schemes, to compare with.
    """

    model: str
    gpu: str | None
    cost_model_version: str | None
    sensitivity: Mapping[str, str | int]
    budget: Budget
    granularity: Granularity
    assignment: Mapping[LinearId, QuantScheme]
    kernel_configs: tuple[LaunchKernel, ...]
    avg_weight_bits: float
    weight_bytes: int
    predicted_latency_us: Mapping[str, float]
    predicted_loss: float
    bound: float
    gap: float
    shadow_prices: Mapping[str, float]
    uniform: tuple[Uniform, ...]

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        budget = self.budget
        return {
            "kind": KIND,
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "gpu": self.gpu,
            "cost_model_version": self.cost_model_version,
            "sensitivity": dict(self.sensitivity),
            "budget": {
                "avg_weight_bits": budget.avg_weight_bits,
                "weight_bytes": budget.weight_bytes,
                "max_latency_us": dict(budget.max_latency_us),
                "per_layer": budget.per_layer,
            },
            "granularity": self.granularity.value,
            "avg_weight_bits": self.avg_weight_bits,
            "weight_bytes": self.weight_bytes,
            "predicted_latency_us": dict(self.predicted_latency_us),
            "predicted_loss": self.predicted_loss,
            "bound": self.bound,
            "gap": self.gap,
            "shadow_prices": dict(self.shadow_prices),
            "uniform": [
                {
                    "scheme": uniform.scheme.name,
                    "avg_weight_bits": uniform.avg_weight_bits,
                    "loss": uniform.loss,
                    "latency_us": dict(uniform.latency_us),
                    "within_budget": uniform.within_budget,
                }
                for uniform in self.uniform
            ],
            "kernel_configs": [
                [kernel.scenario, kernel.linear, kernel.scheme.name, kernel.config.name]
                for kernel in self.kernel_configs
            ],
            "assignment": [[i.layer, i.expert, i.linear.value, scheme.name] for i, scheme in self.assignment.items()],
        }

    @classmethod
    def from_json(cls, content: object, *, where: str = "allocation") -> Allocation:
        """The allocation of a file's content. DataError for what is not one, naming the field."""
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise DataError(f"{where}: not an allocation; its kind is not {KIND!r}")
        version = content.get("schema_version")
        if version != SCHEMA_VERSION:
            raise DataError(
                f"{where}: an allocation of schema version {version}; this version of bitile reads {SCHEMA_VERSION}"
            )
        if unknown := sorted(set(content) - FIELDS):
            raise DataError(f"{where}: an allocation of schema version {version} has no field {unknown[0]!r}")
        try:
            allocation = _parse(content)
        except KeyError as error:
            raise DataError(f"{where}: it has no {error.args[0]}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{where}: a field is not of an allocation's type ({error})") from error
        except SpecError as error:
            raise DataError(f"{where}: {error}") from error
        _check(allocation, len(content["assignment"]), where)
        return allocation

    def write(self, path: str | os.PathLike[str]) -> None:
        """Put the allocation in the place of a JSON file, whole or not at all. DataError when it cannot be written."""
        target = Path(path)
        try:
            with replacing(target) as temporary:
                temporary.write_text(json.dumps(self.to_json(), allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise DataError(
                f"{target}: cannot be written ({error.strerror or error}); what was there is unchanged"
            ) from error

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Allocation:
        """An allocation from JSON. DataError: missing, truncated, foreign, of another version, or inconsistent."""
        source = Path(path)
        try:
            content = json.loads(source.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{source}: no such file") from None
        except OSError as error:
            raise DataError(f"{source}: cannot be read ({error.strerror or error})") from error
        except ValueError as error:
            raise DataError(f"{source}: not a readable JSON file, truncated or foreign ({error})") from error
        return cls.from_json(content, where=str(source))


FIELDS = {field.name for field in fields(Allocation)} | {"kind", "schema_version"}


def _parse(content: dict[str, Any]) -> Allocation:
    budget = content["budget"]
    return Allocation(
        model=_text(content["model"]),
        gpu=None if content["gpu"] is None else _text(content["gpu"]),
        cost_model_version=None if content["cost_model_version"] is None else _text(content["cost_model_version"]),
        sensitivity=dict(content["sensitivity"]),
        budget=Budget(
            avg_weight_bits=budget["avg_weight_bits"],
            weight_bytes=budget["weight_bytes"],
            max_latency_us=budget["max_latency_us"],
            per_layer=bool(budget["per_layer"]),
        ),
        granularity=Granularity(content["granularity"]),
        assignment={
            LinearId(layer=_whole(layer), expert=_whole(expert), linear=Linear(linear)): schemes.parse(scheme)
            for layer, expert, linear, scheme in content["assignment"]
        },
        kernel_configs=tuple(
            LaunchKernel(
                scenario=_text(scenario),
                linear=_text(linear),
                scheme=schemes.parse(scheme),
                config=kernels.parse(config),
            )
            for scenario, linear, scheme, config in content["kernel_configs"]
        ),
        avg_weight_bits=_number(content["avg_weight_bits"]),
        weight_bytes=_whole(content["weight_bytes"]),
        predicted_latency_us=_numbers(content["predicted_latency_us"]),
        predicted_loss=_number(content["predicted_loss"]),
        bound=_number(content["bound"]),
        gap=_number(content["gap"]),
        shadow_prices=_numbers(content["shadow_prices"]),
        uniform=tuple(
            Uniform(
                scheme=schemes.parse(row["scheme"]),
                avg_weight_bits=_number(row["avg_weight_bits"]),
                loss=_number(row["loss"]),
                latency_us=_numbers(row["latency_us"]),
                within_budget=bool(row["within_budget"]),
            )
            for row in content["uniform"]
        ),
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is not a whole number")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"{value!r} is not a finite number")
    return float(value)


def _numbers(values: Mapping[str, object]) -> dict[str, float]:
    return {_text(name): _number(value) for name, value in values.items()}


def _check(allocation: Allocation, rows: int, where: str) -> None:
    if not allocation.assignment:
        raise DataError(f"{where}: its assignment is empty")
    if len(allocation.assignment) != rows:
        raise DataError(f"{where}: its assignment has a linear twice")
    for block in allocation.assignment:
        if block.layer < 0 or block.expert < SHARED:
            raise DataError(f"{where}: its assignment has layer {block.layer} expert {block.expert}, which cannot be")
    rounding = 1e-9 * max(abs(allocation.predicted_loss), abs(allocation.bound))
    if allocation.bound > allocation.predicted_loss + rounding or allocation.gap < 0:
        raise DataError(
            f"{where}: bound {allocation.bound} and gap {allocation.gap} do not fit loss {allocation.predicted_loss}"
        )
    limit = allocation.budget.avg_weight_bits
    if limit is not None and allocation.avg_weight_bits > limit * (1 + 1e-9):
        raise DataError(f"{where}: avg_weight_bits {allocation.avg_weight_bits} exceeds its budget {limit}")
    most_bytes = allocation.budget.weight_bytes
    if most_bytes is not None and allocation.weight_bytes > most_bytes:
        raise DataError(f"{where}: weight_bytes {allocation.weight_bytes} exceeds its budget {most_bytes}")
    for name, most in allocation.budget.max_latency_us.items():
        used = allocation.predicted_latency_us.get(name)
        if used is None or used > most * (1 + 1e-9):
            raise DataError(f"{where}: predicted_latency_us[{name}] {used} exceeds its budget {most}")
