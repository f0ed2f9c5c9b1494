"""Checkpoints of tiny models with random weights, as `save_pretrained` writes them (the hub's names), and data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

VOCAB = 128
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "intermediate_size": 96}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
}

CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "qwen2_moe": transformers.Qwen2MoeConfig(
        **SIZES, **MOE, num_experts=8, shared_expert_intermediate_size=48, mlp_only_layers=[0]
    ),
    "qwen3_moe": transformers.Qwen3MoeConfig(**SIZES, **MOE, num_experts=8, head_dim=16),
    "mixtral": transformers.MixtralConfig(**SIZES, intermediate_size=32, num_local_experts=8, num_experts_per_tok=2),
    "phimoe": transformers.PhimoeConfig(**SIZES, intermediate_size=32, num_local_experts=8, num_experts_per_tok=2),
    "glm4_moe": transformers.Glm4MoeConfig(
        **SIZES | MOE, n_routed_experts=8, n_shared_experts=1, first_k_dense_replace=1, head_dim=16
    ),
    "olmoe": transformers.OlmoeConfig(**SIZES, intermediate_size=32, num_experts=8, num_experts_per_tok=2),
    "deepseek_v2": transformers.DeepseekV2Config(
        **SIZES | MOE | LATENT, n_shared_experts=2, q_lora_rank=None, n_group=1, topk_group=1, topk_method="greedy"
    ),
    "deepseek_v3": transformers.DeepseekV3Config(
        **SIZES | MOE | LATENT, n_shared_experts=1, q_lora_rank=24, n_group=2, topk_group=1
    ),
}


def save(config: transformers.PretrainedConfig, folder: Path, *, seed: int = 0, shard: str = "50GB") -> Path:
    """A checkpoint whose router and experts are larger than at initialisation, so that routing is uneven."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name or "shared_expert" in name or ".gate." in name or "lm_head" in name:
                parameter.mul_(6.0)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def token_ids(number: int, seed: int = 0) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Token ids of which some are far more frequent than others."""
    rng = np.random.default_rng(seed)
    return np.minimum(rng.zipf(1.3, number) - 1, VOCAB - 1).astype(np.int64)
