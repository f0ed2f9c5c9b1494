"""The loads that a measured run draws: as the peers were measured, and even."""

from __future__ import annotations

from enum import Enum

import numpy as np

from profiles import loads
from profiles.errors import SpecError
from profiles.loads import TokenLoad

SIGMA = 0.7


class Draw(Enum):
    """How tokens are spread over experts."""

    PEERS = "peers"
    UNIFORM = "uniform"


def draw_load(draw: Draw, num_experts: int, num_tokens: int, top_k: int, seed: int = 0) -> TokenLoad:
    """`num_tokens * top_k` rows. PEERS: expert probabilities softmax(0.7 * standard normal), then multinomial counts;
    an expert can get more than `num_tokens` rows, unlike in profiles.loads.log_normal. SpecError: sizes that cannot be.
    """
    if draw is Draw.UNIFORM:
        return loads.uniform(num_experts, num_tokens, top_k, seed)
    if num_experts < 1 or num_tokens < 0 or not 1 <= top_k <= num_experts or seed < 0:
        raise SpecError(f"{num_experts} experts, {num_tokens} tokens, top {top_k}, seed {seed}: no such load")
    rng = np.random.default_rng(seed)
    weights = np.exp(SIGMA * rng.standard_normal(num_experts))
    counts = rng.multinomial(num_tokens * top_k, weights / weights.sum())
    return TokenLoad(
        tokens_per_expert=tuple(map(int, counts)),
        source=f"multinomial, softmax of {SIGMA:g} normal, {num_tokens} tokens, top {top_k}, seed {seed}",
    )
