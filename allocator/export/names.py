"""Linears as Hugging Face checkpoints name them, and everything beside the experts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from allocator.sensitivity import SHARED_EXPERT
from profiles.errors import DataError, SpecError
from profiles.models import Linear, LinearId


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """One architecture's names. block: of a decoder layer's MoE block; shared: of its shared experts' module."""

    block: str = "mlp"
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: tuple[str, ...] = ("down_proj",)
    shared: str = ""

    def experts(self, layer: int) -> str:
        """A layer's routed experts."""
        return f"model.layers.{layer}.{self.block}.experts"

    def _projections(self, linear: Linear) -> tuple[str, ...]:
        return self.gate_up if linear is Linear.GATE_UP else self.down

    def modules(self, block: LinearId) -> tuple[str, ...]:
        """The checkpoint's linears that are one here: gate and up, or down."""
        parent = f"model.layers.{block.layer}.{self.block}.{self.shared}"
        if block.expert != SHARED_EXPERT:
            parent = f"{self.experts(block.layer)}.{block.expert}"
        return tuple(f"{parent}.{name}" for name in self._projections(block.linear))

    def pattern(self, layer: int, experts: Sequence[int], linears: Sequence[Linear]) -> str:
        """A regular expression of exactly these experts' linears; -1 is the shared expert."""
        parents = []
        routed = [expert for expert in experts if expert != SHARED_EXPERT]
        if routed:
            parents.append(rf"experts\.({'|'.join(map(str, routed))})")
        if SHARED_EXPERT in experts:
            parents.append(re.escape(self.shared))
        projections = [name for linear in linears for name in self._projections(linear)]
        return rf"model\.layers\.{layer}\.{self.block}\.({'|'.join(parents)})\.({'|'.join(projections)})$"

    @property
    def beside(self) -> tuple[str, ...]:
        """Regular expressions of the linears that no allocation has: attention, routers, dense layers, the head."""
        dense = [r".*\.mlp\.(gate_proj|up_proj|gate_up_proj|down_proj)$"]
        return (r".*self_attn\..*", rf".*\.{self.block}\.gate$", r".*shared_expert_gate$", *dense, r"lm_head$")


_MIXTRAL = Names(block="block_sparse_moe", gate_up=("w1", "w3"), down=("w2",))
_BY_TYPE: Mapping[str, Names] = {
    "mixtral": _MIXTRAL,
    "phimoe": _MIXTRAL,
    "qwen2_moe": Names(shared="shared_expert"),
    "qwen3_moe": Names(),
    "olmoe": Names(),
    "deepseek_v2": Names(shared="shared_experts"),
    "deepseek_v3": Names(shared="shared_experts"),
    "glm4_moe": Names(shared="shared_experts"),
}
_TYPE_OF_MODEL = {
    "qwen1.5-moe": "qwen2_moe",
    "qwen2-57b": "qwen2_moe",
    "qwen3-": "qwen3_moe",
    "mixtral": "mixtral",
    "olmoe": "olmoe",
    "deepseek-v2": "deepseek_v2",
    "deepseek-v3": "deepseek_v3",
}


def names_of(model: str, folder: Path | None) -> Names:
    """By the model_type of a checkpoint's config.json, else by the known model's name. SpecError: an
    architecture whose experts are not single linears, or not known. DataError: no readable config.json there.
    """
    kind = next((kind for start, kind in _TYPE_OF_MODEL.items() if model.startswith(start)), model)
    if folder is not None:
        file = folder / "config.json" if folder.is_dir() else folder
        try:
            kind = str(json.loads(file.read_text(encoding="utf-8")).get("model_type", ""))
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(f"{file}: not a readable config.json ({error})") from error
    if kind not in _BY_TYPE:
        known = ", ".join(_BY_TYPE)
        raise SpecError(f"the names of {kind}'s experts are not known; known are {known}: give --model DIR")
    return _BY_TYPE[kind]
