"""Names of the feature matrix's columns, in order, and what each may do when an expert gets more tokens."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from profiles.gpus import Math


class Kind(Enum):
    """What a column may do when one expert gets one more token."""

    GROWS = "grows"
    FIXED = "fixed"
    PHASE = "phase"
    RATIO = "ratio"
    RAW = "raw"


PARTS = ("tensor_us", "issue_us", "smem_us", "l2_us", "chain_us", "warp_us", "fetch_us", "epilogue_us")
"""What the makespan would be if that were the only resource."""
CORE = ("latency_us", "launch_us", "fill_us", "dram_us", *PARTS)
"""What the calibrated core is made of."""
LAST_PARTS = tuple(f"last_{name}" for name in PARTS)
"""The share of the last, partial round in PARTS; 0 where schemes are mixed."""
STREAMING = ("full_rounds", "stream_rounds", "stream_round_us", "stream_rest_us", "stream_rest_is_last")
"""`costmodel.rounds.Streaming`, for the calibrated core; where schemes are mixed, one round without streaming."""
_GROWING = (
    *CORE,
    "makespan_us",
    "roofline_us",
    "waves",
    "rounds",
    "tiles_per_sm",
    "largest_expert_tiles",
    "num_active",
)
_OF_CONFIG = (
    *("tile_m", "tile_n", "warps_m", "warps_n", "num_stages", "ctas_per_sm", "is_wgmma", "is_along_features"),
    *("cluster", "split_k", "least_width"),
)
_OF_SCHEMES = (
    *("num_slots", "weight_bits", "least_weight_bits", "most_weight_bits", "grouped_share", "zero_point_share"),
    *(f"{math.value}_share" for math in Math),
)
_OF_TILE = (
    *("k_tiles", "feature_tiles", "feature_padding", "instructions_per_mma", "smem_bytes_per_mma", "bytes_per_mma"),
    *("mmas_per_k_step_of_a_warp", "stage_bytes", "expert_bytes_per_l2", "num_experts"),
)
_RATIOS = ("tail", "padding", "bytes_per_roofline", "makespan_per_dram", "imbalance")
_RAW = ("num_tokens", "n", "k")
KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(_GROWING, Kind.GROWS),
    **dict.fromkeys((*_OF_CONFIG, *_OF_SCHEMES, *_OF_TILE), Kind.FIXED),
    **dict.fromkeys((*LAST_PARTS, *STREAMING), Kind.PHASE),
    **dict.fromkeys(_RATIOS, Kind.RATIO),
    **dict.fromkeys(_RAW, Kind.RAW),
}
FEATURES: tuple[str, ...] = tuple(KINDS)
"""Columns of the matrix, in order."""
INDEX: Mapping[str, int] = {name: index for index, name in enumerate(FEATURES)}
