"""`quantize_config.json` with GPTQModel's `dynamic` rules: the commonest scheme, and what differs from it by module."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from allocator.allocation import Allocation
from allocator.export.names import Names
from profiles.models import Linear
from profiles.schemes import QuantScheme


def config(allocation: Allocation, names: Names) -> dict[str, Any]:
    """The configuration. Rules are tried in their order; `-:` leaves modules as they are. The allocation's schemes are
    weight-only, as `Target.split` sees to.
    """
    counts = Counter(scheme for scheme in allocation.assignment.values() if scheme.weights is not None)
    base = counts.most_common(1)[0][0] if counts else None
    rules: dict[str, dict[str, Any]] = {f"-:{pattern}": {} for pattern in names.beside}
    chosen: dict[tuple[int, Linear, QuantScheme], list[int]] = {}
    for block, scheme in allocation.assignment.items():
        chosen.setdefault((block.layer, block.linear, scheme), []).append(block.expert)
    for (layer, linear, scheme), experts in chosen.items():
        pattern = names.pattern(layer, experts, [linear])
        if scheme.weights is None:
            rules[f"-:{pattern}"] = {}
        elif scheme != base:
            rules[f"+:{pattern}"] = _settings(scheme)
    defaults = {"bits": 4, "group_size": 128, "sym": True} if base is None else _settings(base)
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        **defaults,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "dynamic": rules,
    }


def _settings(scheme: QuantScheme) -> dict[str, Any]:
    return {"bits": scheme.weight_bits, "group_size": scheme.group_size, "sym": scheme.is_symmetric}


def settings_of(content: dict[str, Any], module: str) -> dict[str, Any] | None:
    """What a configuration says of a module, as GPTQModel reads it: the first rule that matches. None: left alone."""
    base = {name: content[name] for name in ("bits", "group_size", "sym")}
    for rule, settings in content["dynamic"].items():
        if re.match(rule[2:], module):
            return None if rule.startswith("-:") else base | settings
    return base
