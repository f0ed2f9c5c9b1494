"""`quantization_config` of compressed-tensors: a group for each scheme, its targets the experts of its layers."""

from __future__ import annotations

import importlib.util
from typing import Any

from allocator.allocation import Allocation
from allocator.export.names import Names
from profiles.errors import DataError, UserError
from profiles.models import Linear
from profiles.schemes import NumericType, QuantScheme, QuantSpec

EXTRA = "compressed_tensors"


def config(allocation: Allocation, names: Names) -> dict[str, Any]:
    """The configuration, checked by the compressed-tensors package itself.

    Raises:
        UserError: the package is not installed. DataError: it refuses the configuration.
    """
    layers: dict[QuantScheme, set[int]] = {}
    experts: dict[int, set[int]] = {}
    for block, scheme in allocation.assignment.items():
        layers.setdefault(scheme, set()).add(block.layer)
        experts.setdefault(block.layer, set()).add(block.expert)
    every = tuple(Linear)

    def targets(scheme: QuantScheme) -> list[str]:
        return [f"re:{names.pattern(layer, sorted(experts[layer]), every)}" for layer in sorted(layers[scheme])]

    quantised = sorted((scheme for scheme in layers if scheme.weights is not None), key=lambda scheme: scheme.name)
    bf16 = [target for scheme in layers if scheme.weights is None for target in targets(scheme)]
    groups = {f"group_{i}": _group(scheme, targets(scheme)) for i, scheme in enumerate(quantised)}
    formats = {group["format"] for group in groups.values()}
    content = {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*(f"re:{pattern}" for pattern in names.beside), *bf16],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    check(content)
    return content


def check(content: dict[str, Any]) -> None:
    """What the package says of a configuration. UserError: not installed. DataError: refused."""
    require()
    from compressed_tensors.quantization import QuantizationConfig

    try:
        QuantizationConfig.model_validate(content)
    except ValueError as error:  # pydantic's is one
        raise DataError(f"compressed-tensors refuses the configuration: {str(error).splitlines()[0]}") from error


def require() -> None:
    """UserError: the package is not installed."""
    if importlib.util.find_spec(EXTRA) is None:
        raise UserError(f"{EXTRA} is needed to check the export, not installed here: pip install 'bitile[export]'")


def _group(scheme: QuantScheme, targets: list[str]) -> dict[str, Any]:
    assert scheme.weights is not None
    inputs = scheme.input_activations
    return {
        "targets": targets,
        "weights": _arguments(scheme.weights),
        "input_activations": None if inputs is None else _arguments(inputs),
        "output_activations": None,
        "format": _format(scheme.weights, inputs),
    }


def _arguments(spec: QuantSpec) -> dict[str, Any]:
    return {
        "num_bits": spec.num_bits,
        "type": spec.type.value,
        "symmetric": spec.symmetric,
        "strategy": spec.strategy.value,
        "group_size": spec.group_size,
        "dynamic": spec.dynamic,
    }


def _format(weights: QuantSpec, inputs: QuantSpec | None) -> str:
    """How weights are stored."""
    if weights.type is NumericType.FLOAT:
        return "float-quantized"
    return "int-quantized" if inputs is not None and weights.num_bits == 8 else "pack-quantized"


def is_packed(scheme: QuantScheme) -> bool:
    """Whether weights are packed: integers below 8 bits, and where activations are not quantised."""
    return scheme.weights is not None and _format(scheme.weights, scheme.input_activations) == "pack-quantized"
