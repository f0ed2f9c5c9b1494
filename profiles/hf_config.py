"""Reads the MoE part of a Hugging Face `config.json`, whose keys differ from family to family."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from profiles.errors import SpecError

# Spellings of one fact, in the order in which they are looked for, each with a family that uses it.
NUM_EXPERTS = (
    "num_experts",  # Qwen, OLMoE
    "num_local_experts",  # Mixtral, gpt-oss, Llama 4
    "n_routed_experts",  # DeepSeek, GLM
    "moe_num_experts",  # ERNIE
)
TOP_K = (
    "num_experts_per_tok",  # most
    "num_experts_per_token",  # Kimi Linear
    "experts_per_token",  # gpt-oss, as first released
    "moe_topk",  # Hunyuan
    "moe_k",  # ERNIE
)
HIDDEN_SIZE = ("hidden_size", "d_model")  # most; DBRX
NUM_LAYERS = ("num_hidden_layers", "n_layers")  # most; DBRX
INTERMEDIATE_SIZE = (
    "moe_intermediate_size",  # families whose dense layers have another width
    "intermediate_size",  # Mixtral, OLMoE, gpt-oss
)
SPELLINGS = {
    "num_experts": NUM_EXPERTS,
    "top_k": TOP_K,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": INTERMEDIATE_SIZE,
    "num_hidden_layers": NUM_LAYERS,
}
"""Of what every configuration must have."""
NUM_SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
SHARED_INTERMEDIATE_SIZE = (
    "shared_expert_intermediate_size",  # Qwen: its one shared expert
    "shared_intermediate_size",  # Granite
)
NUM_DENSE_LAYERS = (  # the first ones
    "first_k_dense_replace",  # DeepSeek, GLM
    "moe_layer_start_index",  # ERNIE
    "num_dense_layers",  # LFM2, AFMoE
)
DBRX_EXPERTS = {
    "num_experts": "moe_num_experts",
    "num_experts_per_tok": "moe_top_k",
    "intermediate_size": "ffn_hidden_size",
}
NESTED = ("text_config", "llm_config", "language_config")


def read_moe_fields(file: Path) -> dict[str, int]:
    """The size fields of `profiles.models.MoeShape` that a configuration describes.

    Raises:
        SpecError: unreadable, not a JSON object, a dense model, or a family whose keys are not understood.
    """
    config = _load(file)
    sizes = {field: config.first(*keys) for field, keys in SPELLINGS.items()}
    missing = [" or ".join(SPELLINGS[field]) for field, size in sizes.items() if size is None]
    if missing:
        raise SpecError(f"{file}: no mixture-of-experts model that is understood; missing: {'; '.join(missing)}")
    fields = {field: size for field, size in sizes.items() if size is not None}
    if fields["num_experts"] < 2:
        number = fields["num_experts"]
        raise SpecError(f"{file}: a dense model, it has {number} experts; give a mixture-of-experts model")
    num_layers = fields.pop("num_hidden_layers")
    num_moe_layers = sum(_is_moe_layer(config, layer) for layer in range(num_layers))
    if num_moe_layers == 0:
        raise SpecError(f"{file}: none of its {num_layers} layers has routed experts")
    return fields | _shared(config, fields["intermediate_size"]) | {"num_moe_layers": num_moe_layers}


@dataclass(frozen=True, slots=True)
class _Config:
    file: Path
    values: dict[str, object]

    def first(self, *keys: str) -> int | None:
        """The first of some spellings that is present; some families give one number per layer, which must then
        agree.
        """
        for key in keys:
            value = self.values.get(key)
            if isinstance(value, list) and value and all(item == value[0] for item in value):
                value = value[0]
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise SpecError(f"{self.file}: {key} is {json.dumps(value)}; a whole number is needed")
            return value
        return None

    def integers(self, key: str) -> list[int] | None:
        """A list of whole numbers; None if there is no list under this key."""
        value = self.values.get(key)
        if not isinstance(value, list):
            return None
        if not all(isinstance(item, int) for item in value):
            raise SpecError(f"{self.file}: {key} is {json.dumps(value)}; a list of whole numbers is needed")
        return value


def _load(file: Path) -> _Config:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror
        raise SpecError(f"{file}: cannot be read ({reason}); give a config.json or the folder that holds it") from error
    except ValueError as error:
        raise SpecError(f"{file}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise SpecError(f"{file}: not a model's configuration; a JSON object is needed")
    for key in NESTED:  # of a multimodal model, the language model's part
        nested = values.get(key)
        if isinstance(nested, dict) and not any(key in values for key in NUM_EXPERTS):
            return _Config(file, nested)
    experts = values.get("ffn_config")
    if isinstance(experts, dict):  # DBRX
        values |= {key: experts.get(name) for key, name in DBRX_EXPERTS.items()}
    return _Config(file, values)


def _shared(config: _Config, intermediate_size: int) -> dict[str, int]:
    """The shared experts: a width of their own, or a number of experts as wide as the routed ones."""
    width = config.first(*SHARED_INTERMEDIATE_SIZE) or 0
    number = config.first(*NUM_SHARED_EXPERTS) or 0
    if config.values.get("model_type") == "llama4_text":
        number = 1  # always there, as wide as a routed expert, and not in the configuration
    if width:
        number = max(number, 1)
    else:
        width = number * intermediate_size
    return {"num_shared_experts": number, "shared_intermediate_size": width}


def _is_moe_layer(config: _Config, layer: int) -> bool:
    """Whether a layer has routed experts; each family states it with one or two of these keys, and has none of the
    others.
    """
    kinds = config.values.get("mlp_layer_types")  # GLM, Kimi and others, as transformers 5 writes them
    if isinstance(kinds, list):
        return layer < len(kinds) and kinds[layer] != "dense"
    if layer < (config.first(*NUM_DENSE_LAYERS) or 0):
        return False
    if layer in (config.integers("mlp_only_layers") or ()):  # Qwen
        return False
    moe_layers = config.integers("moe_layers")  # Llama 4
    if moe_layers is not None:
        return layer in moe_layers
    per_layer = config.integers("moe_layer_freq")  # a list of 0 and 1
    if per_layer is not None:
        return layer < len(per_layer) and per_layer[layer] != 0
    every = config.first("moe_layer_freq") or 1  # DeepSeek: layers 0, n, 2n, ...
    for key in ("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval"):  # Qwen, Llama 4, ERNIE
        if (layer + 1) % (config.first(key) or 1):  # layers n - 1, 2n - 1, ...
            return False
    period, offset = config.first("expert_layer_period") or 1, config.first("expert_layer_offset") or 0  # Jamba
    return layer % every == 0 and layer % period == offset
