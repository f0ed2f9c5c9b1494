"""ModelOpt's `hf_quant_config.json`: MIXED_PRECISION, an algorithm for each module."""

from __future__ import annotations

from typing import Any

from allocator.allocation import Allocation
from allocator.export.names import Names
from allocator.export.targets import MODELOPT_ALGORITHMS
from profiles.schemes import QuantScheme


def config(allocation: Allocation, names: Names) -> dict[str, Any]:
    """The configuration. Modules without an algorithm are excluded by name; the allocation's schemes are ModelOpt's, as
    `Target.split` sees to.
    """
    layers: dict[str, dict[str, Any]] = {}
    excluded = ["lm_head", "*self_attn*", f"*.{names.block}.gate", "*shared_expert_gate"]
    for block, scheme in allocation.assignment.items():
        if scheme.weights is None:
            excluded += names.modules(block)
        else:
            layers |= dict.fromkeys(names.modules(block), _algorithm(scheme))
    return {
        "producer": {"name": "bitile", "version": "1"},
        "quantization": {
            "quant_algo": "MIXED_PRECISION",
            "kv_cache_quant_algo": None,
            "quantized_layers": layers,
            "exclude_modules": excluded,
        },
    }


def _algorithm(scheme: QuantScheme) -> dict[str, Any]:
    settings: dict[str, Any] = {"quant_algo": MODELOPT_ALGORITHMS[scheme.name]}
    if scheme.group_size > 0:
        settings |= {
            "group_size": scheme.group_size,
            "has_zero_point": not scheme.is_symmetric,
            "pre_quant_scale": False,
        }
    return settings
