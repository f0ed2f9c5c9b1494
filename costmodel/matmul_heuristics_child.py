"""The process in which nvMatmulHeuristics is asked (`costmodel.matmul_heuristics`): problems on stdin, seconds
on stdout, both JSON, then an abrupt end.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any

_LAYOUT = "TN_COL_MAJOR"
"""Weights and tokens with K contiguous, outputs with the weights' rows contiguous: Y [tokens, N]."""


def main() -> None:
    """Answers one request."""
    import nvMatmulHeuristics as heuristics  # noqa: N813 - no class, a module; optional

    request = json.load(sys.stdin)
    layout = heuristics.NvMatmulHeuristicsMatmulLayout[_LAYOUT]
    library = heuristics.NvMatmulHeuristicsInterfaceEx(
        backend=heuristics.NvMatmulHeuristicsTarget.CUTLASS3,
        gpu=heuristics.NvMatmulHeuristicsNvidiaGpu[request["gpu"]],
    )
    print(json.dumps([_seconds(library, layout, *problem) for problem in request["problems"]]))
    sys.stdout.flush()
    os._exit(0)  # letting go of the library would end in a segmentation fault


def _seconds(
    library: Any, layout: Any, precision: str, m: int, n: int, k: int, batch: int, tile_m: int, tile_n: int
) -> float:
    """Its own choice for the problem with our CTA tile; its choice as it is where it has no estimate of that, and 0
    where it has none at all.
    """
    problem = library.makeNvMatmulHeuristicsProblem(m, n, k, layout, batch)
    best = library.get(problem, 1, precision)
    if not best:
        return 0.0
    config = best[0]["nvmmhKernelConfiguration"]
    config.cta[0], config.cta[1], config.splitK = tile_m, tile_n, 1
    config.warp[0], config.warp[1] = min(64, tile_m), tile_n
    config.cluster[0] = config.cluster[1] = 1
    # The wrapper's own method for this calls one that it does not have.
    with_tile = library.nvMatmulHeuristicsEstimateRuntime(
        library.handle,
        precision.encode("ascii"),
        ctypes.c_int(library.target),
        ctypes.byref(problem),
        ctypes.byref(config),
        library.hardware_descriptor,
    )
    return float(with_tile) or float(best[0]["runtime"])


if __name__ == "__main__":
    main()
