"""A small grouped GEMM in Triton, bf16: the structure that serving engines' Triton kernels have, written here.

One program a tile. Programs are laid out for the most tiles that so many rows can have; each finds its expert from the
offsets, and those beyond the real tiles leave. Tiles of one expert and one weight block run next to each other, so that
a block is read from DRAM once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.peers.triton_tiles import Tile


@triton.jit(do_not_specialize=["num_experts"])  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    x,
    w,
    y,
    offsets,
    n,
    k,
    num_experts,
    experts_pow2: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
):
    tile = tl.program_id(0)
    index = tl.arange(0, experts_pow2)
    ends = tl.load(offsets + index + 1, mask=index < num_experts, other=0)
    starts = tl.load(offsets + index, mask=index < num_experts, other=0)
    tiles_up_to = tl.cumsum((ends - starts + block_m - 1) // block_m, 0)
    expert = tl.sum((tiles_up_to <= tile).to(tl.int32), 0)
    if expert >= num_experts:
        return
    before = tl.sum(tl.where(index < expert, (ends - starts + block_m - 1) // block_m, 0), 0)
    start = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    rows = start + (tile - before) * block_m + tl.arange(0, block_m)
    columns = tl.program_id(1) * block_n + tl.arange(0, block_n)
    ks = tl.arange(0, block_k)
    x_at = x + rows[:, None].to(tl.int64) * k + ks[None, :]
    w_at = w + expert.to(tl.int64) * n * k + columns[None, :].to(tl.int64) * k + ks[:, None]
    total = tl.zeros((block_m, block_n), dtype=tl.float32)
    for first in range(0, k, block_k):
        left = tl.load(x_at, mask=(rows[:, None] < end) & (ks[None, :] < k - first), other=0.0)
        right = tl.load(w_at, mask=(columns[None, :] < n) & (ks[:, None] < k - first), other=0.0)
        total = tl.dot(left, right, total)
        x_at += block_k
        w_at += block_k
    y_at = y + rows[:, None].to(tl.int64) * n + columns[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=(rows[:, None] < end) & (columns[None, :] < n))


def grouped_gemm(x: Tensor, weights: Tensor, offsets: Tensor, out: Tensor, tile: Tile) -> None:
    """out [T, N] = rows offsets[e]..offsets[e+1] of x [T, K] times weights[e]^T, weights [E, N, K].

    All of one float type and contiguous; offsets int32 [E + 1]. Reads nothing on the host.
    """
    (rows, k), (experts, n, _) = x.shape, weights.shape
    block_m, block_n, block_k, warps, stages = tile
    most_tiles = -(-rows // block_m) + min(experts, rows)
    grid = (most_tiles, -(-n // block_n))
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _kernel[grid](
            x,
            weights,
            out,
            offsets,
            n,
            k,
            experts,
            experts_pow2=triton.next_power_of_2(experts),
            block_m=block_m,
            block_n=block_n,
            block_k=block_k,
            num_warps=warps,
            num_stages=stages,
        )
