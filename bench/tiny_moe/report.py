"""How good the model is on text that it was not trained on, beside baselines that know less."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.tiny_moe.corpus import Ids
from bench.tiny_moe.model import RouterTap, uniform_routing


def windows(ids: Ids, length: int, num_tokens: int) -> Tensor:
    """Sequences int64 [number, length + 1] spread evenly over a text, about `num_tokens` in all, at least one."""
    number = max(1, min(num_tokens, len(ids) - 1) // length)
    starts = np.linspace(0, max(0, len(ids) - length - 1), number).astype(np.int64)
    return torch.from_numpy(np.stack([ids[start : start + length + 1] for start in starts]).astype(np.int64))


def token_losses(model: nn.Module, sequences: Tensor, batch_size: int) -> Tensor:
    """Cross entropy in nats, float32 [number, length], of every token but each sequence's first, on the CPU."""
    device = next(model.parameters()).device
    losses = []
    with torch.no_grad():
        for batch in torch.split(sequences, batch_size):
            batch = batch.to(device)
            logits = model(batch[:, :-1]).logits.float()
            losses.append(functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").cpu())
    return torch.cat(losses)


def perplexities(model: nn.Module, train: Ids, held_out: Tensor, vocab_size: int, batch_size: int) -> dict[str, float]:
    """Perplexity per token on held-out sequences: the model's, with experts chosen at random, of token counts."""
    found = {"model": float(token_losses(model, held_out, batch_size).mean())}
    with uniform_routing(model, seed=0):
        found["uniform_routing"] = float(token_losses(model, held_out, batch_size).mean())
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    unigram = -np.log(counts / counts.sum())
    found["unigram"] = float(unigram[held_out[:, 1:].numpy()].mean())
    return {name: math.exp(loss) for name, loss in found.items()}


def expert_loads(model: nn.Module, tap: RouterTap, sequences: Tensor, batch_size: int) -> list[list[int]]:
    """Rows that each expert of each layer gets from these sequences: [layers][experts]."""
    device = next(model.parameters()).device
    total: Tensor | None = None
    with torch.no_grad():
        for batch in torch.split(sequences, batch_size):
            model(batch[:, :-1].to(device))
            total = tap.loads() if total is None else total + tap.loads()
    assert total is not None
    loads: list[list[int]] = total.tolist()
    return loads


def summary(report: dict[str, Any]) -> str:
    """What a training ends with, in four lines."""
    ppl, loads = report["held_out_perplexity"], report["held_out_tokens_per_expert"]
    skew = [max(row) * len(row) / sum(row) for row in loads]
    cold = min(min(row) / sum(row) for row in loads)
    return "\n".join(
        [
            f"held-out perplexity per token {ppl['model']:.2f}, {report['held_out_bits_per_byte']:.2f} bits per byte",
            f"  its experts chosen at random {ppl['uniform_routing']:.1f}, token counts alone {ppl['unigram']:.1f}",
            f"router skew: the most loaded expert has {min(skew):.1f} to {max(skew):.1f} times its layer's mean load,"
            f" the least loaded {cold:.2%} of its layer's",
            f"{report['num_steps']} steps, {report['seconds']:.0f} s, {report['bytes_per_second'] / 1e6:.3f} MB of text"
            f" a second on {report['device']}",
        ]
    )
