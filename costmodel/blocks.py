"""Long arrays in blocks that stay in the CPU's cache, on all cores: numpy frees Python's lock while it computes."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

ROWS_AT_ONCE = 1 << 14


def for_blocks(count: int, work: Callable[[slice], None]) -> None:
    """Calls `work` once for each block of `count` rows, the blocks in no order."""
    blocks = [slice(start, min(start + ROWS_AT_ONCE, count)) for start in range(0, count, ROWS_AT_ONCE)]
    workers = min(len(blocks), os.cpu_count() or 1)
    if workers <= 1:
        for block in blocks:
            work(block)
        return
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(work, blocks):
            pass
