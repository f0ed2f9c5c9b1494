"""Sizes of the model and of its training."""

from __future__ import annotations

from dataclasses import dataclass

NUM_EXPERTS = 16
TOP_K = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One model and how long it is trained.

    Attributes:
        num_layers: decoder layers, each with NUM_EXPERTS routed experts and a shared one.
        hidden_size, intermediate_size, shared_intermediate_size: multiples of 128.
        num_heads: attention heads.
        vocab_size: tokens, the 256 bytes included.
        sequence_length: tokens a sequence.
        batch_size: sequences a step.
        num_steps, max_passes, max_minutes: training ends at whichever comes first; a pass is as many tokens as the
            text has.
        learning_rate: its peak.
        num_eval_tokens: about as many tokens of a split are measured.
        max_corpus_bytes: most text of a split; None: all there is.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    shared_intermediate_size: int
    num_heads: int
    vocab_size: int
    sequence_length: int
    batch_size: int
    num_steps: int
    max_passes: float
    max_minutes: float
    learning_rate: float
    num_eval_tokens: int
    max_corpus_bytes: int | None = None

    def steps_on(self, num_tokens: int) -> int:
        """Most steps on a text of so many tokens; past some passes over it, a model of this size learns it by heart."""
        passes = self.max_passes * num_tokens / (self.batch_size * self.sequence_length)
        return max(1, min(self.num_steps, round(passes)))


PRESETS = {
    "ci": Preset(
        num_layers=6,
        hidden_size=128,
        intermediate_size=128,
        shared_intermediate_size=128,
        num_heads=2,
        vocab_size=512,
        sequence_length=64,
        batch_size=8,
        num_steps=800,
        max_passes=10,
        max_minutes=1.4,
        learning_rate=5e-3,
        num_eval_tokens=1 << 14,
        max_corpus_bytes=4_000_000,
    ),
    "small": Preset(
        num_layers=6,
        hidden_size=256,
        intermediate_size=128,
        shared_intermediate_size=128,
        num_heads=4,
        vocab_size=1024,
        sequence_length=256,
        batch_size=64,
        num_steps=3000,
        max_passes=10,
        max_minutes=10,
        learning_rate=3e-3,
        num_eval_tokens=1 << 17,
    ),
    "full": Preset(
        num_layers=8,
        hidden_size=256,
        intermediate_size=256,
        shared_intermediate_size=128,
        num_heads=4,
        vocab_size=2048,
        sequence_length=512,
        batch_size=64,
        num_steps=4000,
        max_passes=12,
        max_minutes=8,
        learning_rate=3e-3,
        num_eval_tokens=1 << 18,
    ),
    "wide": Preset(
        num_layers=6,
        hidden_size=512,
        intermediate_size=512,
        shared_intermediate_size=128,
        num_heads=8,
        vocab_size=2048,
        sequence_length=512,
        batch_size=64,
        num_steps=4000,
        max_passes=12,
        max_minutes=8,
        learning_rate=2e-3,
        num_eval_tokens=1 << 18,
    ),
}
"""`ci`: two minutes on two CPU cores. `small`: minutes on any GPU. `full`: minutes on a large one. `wide`: longer rows,
so that schemes with one scale a channel are cheaper than those with groups."""
