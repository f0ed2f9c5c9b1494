"""The model: transformers' Qwen2MoE, its experts as grouped GEMMs, and its routers where training can see them.

The router is skewed on purpose, as real models' are: the balance loss pulls each layer's load not towards equal shares
but towards Zipf shares, another order of experts in every layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter

from bench.tiny_moe.presets import NUM_EXPERTS, TOP_K, Preset

GROUPED_EXPERTS = "bitile_grouped"
ZIPF_EXPONENT = 1.0
"""The most loaded of 16 experts gets 30 % of a layer's rows, the least 2 %."""


def make_model(preset: Preset, end_of_text: int, seed: int) -> Qwen2MoeForCausalLM:
    """A model of random weights in float32."""
    config = Qwen2MoeConfig(
        vocab_size=preset.vocab_size,
        hidden_size=preset.hidden_size,
        intermediate_size=4 * preset.hidden_size,  # of dense layers, of which there are none
        num_hidden_layers=preset.num_layers,
        num_attention_heads=preset.num_heads,
        num_key_value_heads=preset.num_heads,
        max_position_embeddings=max(2048, preset.sequence_length),
        moe_intermediate_size=preset.intermediate_size,
        shared_expert_intermediate_size=preset.shared_intermediate_size,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        eos_token_id=end_of_text,
        use_cache=False,
        initializer_range=0.7
        * preset.hidden_size**-0.5,  # transformers' 0.02 is a wide model's: this one then learns far slower
    )
    torch.manual_seed(seed)
    model = Qwen2MoeForCausalLM(config)
    model.set_experts_implementation(GROUPED_EXPERTS)
    return model


def routers(model: nn.Module) -> list[nn.Module]:
    """The router of each layer, first to last."""
    return [module for module in model.modules() if isinstance(module, Qwen2MoeTopKRouter)]


class RouterTap:
    """Keeps what each router gave in the last forward pass: logits [tokens, experts] and choices [tokens, top_k]."""

    def __init__(self, model: nn.Module) -> None:
        self.logits: list[Tensor] = []
        self.choices: list[Tensor] = []
        routers_ = routers(model)
        routers_[0].register_forward_pre_hook(self._clear)
        for router in routers_:
            router.register_forward_hook(self._keep)

    def _clear(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.logits.clear()
        self.choices.clear()

    def _keep(self, module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        self.logits.append(output[0])
        self.choices.append(output[2])

    def loads(self) -> Tensor:
        """Rows that each expert of each layer got: int64 [layers, experts]."""
        return torch.stack([torch.bincount(chosen.flatten(), minlength=NUM_EXPERTS) for chosen in self.choices])

    def balance_loss(self, targets: Tensor) -> Tensor:
        """Mean over the layers of sum(f P / t): 1 where the shares f of the rows and P of the probability are the
        targets t [layers, experts]. With equal targets it is the Switch Transformer's loss (arXiv 2101.03961, equations
        4 to 6).
        """
        losses = []
        for logits, chosen, target in zip(self.logits, self.choices, targets, strict=True):
            rows = torch.zeros_like(target).index_add_(0, chosen.flatten(), target.new_ones(chosen.numel()))
            probability = torch.softmax(logits.float(), dim=-1).mean(dim=0)
            losses.append((rows / chosen.numel() * probability / target).sum())
        return torch.stack(losses).mean()


def zipf_targets(num_layers: int, seed: int) -> Tensor:
    """Shares float32 [layers, experts], each row of sum 1; another order in every layer."""
    shares = np.arange(1, NUM_EXPERTS + 1) ** -ZIPF_EXPONENT
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(shares / shares.sum()) for _ in range(num_layers)]
    return torch.tensor(np.array(rows), dtype=torch.float32)


@contextmanager
def uniform_routing(model: nn.Module, seed: int) -> Iterator[None]:
    """Within it, every token goes to TOP_K experts drawn evenly and mixed evenly, whatever the routers say."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)

    def draw(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        logits, weights, _ = output
        keys = torch.rand(logits.shape, generator=generator, device=device)
        return logits, torch.full_like(weights, 1 / TOP_K), keys.topk(TOP_K, dim=-1).indices

    handles = [router.register_forward_hook(draw) for router in routers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Permute(torch.autograd.Function):
    """Rows in another order. Its gradient is a gather too; autograd's own would sort and add."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        """rows[order]; `inverse` undoes `order`."""
        ctx.save_for_backward(inverse)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The gradient's rows, back in their places."""
        (inverse,) = ctx.saved_tensors
        return gradient[inverse], None, None


def grouped_experts(experts: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """All experts of a layer as two grouped GEMMs on rows sorted by expert; what transformers calls for a layer.

    x: [tokens, hidden]. chosen: int64 [tokens, top_k]. weights: [tokens, top_k]. Gives [tokens, hidden].
    """
    num_tokens, top_k = chosen.shape
    order = torch.argsort(chosen.flatten(), stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    ends = (chosen.reshape(-1, 1) == torch.arange(experts.num_experts, device=x.device)).sum(dim=0).cumsum(0)
    ends = ends.to(torch.int32)
    rows = _permute(x.repeat_interleave(top_k, dim=0), order, inverse)
    gate, up = functional.grouped_mm(rows, experts.gate_up_proj.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    y = functional.grouped_mm(experts.act_fn(gate) * up, experts.down_proj.transpose(1, 2), offs=ends)
    y = _permute(y, inverse, order).view(num_tokens, top_k, -1)
    return (y * weights.unsqueeze(-1)).sum(dim=1)


def _permute(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    permuted: Tensor = _Permute.apply(rows, order, inverse)  # type: ignore[no-untyped-call]
    return permuted


ALL_EXPERTS_FUNCTIONS.register(GROUPED_EXPERTS, grouped_experts)
