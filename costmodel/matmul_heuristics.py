"""NVIDIA's nvMatmulHeuristics as a baseline: what its timing model says about each launch with our tile, times the one
factor that fits best.

It knows dense GEMMs of one type (bf16, fp8, 8-bit integers), so it applies to launches of one scheme whose weights and
activations are both of such a type and have no groups: w16a16 and per-channel w8a8. A grouped GEMM is put to it as a
batch of as many GEMMs as there are active experts, each of the mean number of tokens; weights are the first operand, as
in our kernels. It is asked in a child process, since its library ends a process that lets go of it with a segmentation
fault. Optional: `pip install 'bitile[heuristics]'`.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from costmodel.baselines import _Baseline as Baseline
from costmodel.columns import INDEX
from profiles.errors import UnsupportedError, UserError

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Matrix = npt.NDArray[np.float32]

GPUS = {"h200": "H200_SXM", "h100": "H100_SXM", "rtx4090": "RTX_4090", "l40s": "L40S", "a100": "A100_SXM_80GB"}
"""Its name of each GPU that both know."""
_PRECISIONS = {"bf16_share": ("TST", 16.0), "e4m3_share": ("QQTST", 8.0), "int8_share": ("BSB", 8.0)}
"""Of each math: its name of the types of A and B, sums and D, and the weights' bits. Its integers are unsigned, with
8-bit results where ours are bf16: nearer than its other choice, 32 bits.
"""
_CHILD = "costmodel.matmul_heuristics_child"
_LIMIT_S = 300.0


def why_not(gpu: str) -> str | None:
    """Why there is no estimate for a GPU here; None where there is."""
    if importlib.util.find_spec("nvMatmulHeuristics") is None:
        return "nvMatmulHeuristics is not installed: pip install 'bitile[heuristics]'"
    return None if gpu in GPUS else f"nvMatmulHeuristics does not know {gpu}: it is asked about {', '.join(GPUS)}"


class NvMatmulHeuristics(Baseline):
    """See the module. `gpu` is one of GPUS. Learned is `factor_`; 1 where it applies to no launch to learn from."""

    def __init__(self, *, gpu: str = "h200") -> None:
        self.gpu = gpu

    def applies(self, X: Any) -> Mask:
        """Where there is an estimate, [R]: one scheme, dense types, per channel."""
        X = np.asarray(X, dtype=np.float32)
        is_dense = np.zeros(len(X), dtype=np.bool_)
        for share, (_, bits) in _PRECISIONS.items():
            is_dense |= (X[:, INDEX[share]] == 1) & (X[:, INDEX["weight_bits"]] == bits)
        has_groups = (X[:, INDEX["grouped_share"]] > 0) | (X[:, INDEX["zero_point_share"]] > 0)
        is_launch = (X[:, INDEX["num_slots"]] == 1) & (X[:, INDEX["num_active"]] > 0)
        return np.asarray(is_dense & ~has_groups & is_launch, dtype=np.bool_)

    def _fit(self, X: Matrix, y: Array) -> None:
        if (reason := why_not(self.gpu)) is not None:
            raise UserError(reason)
        some = self.applies(X)
        self.factor_ = float(np.median(y[some] / self._estimates_us(X[some]))) if some.any() else 1.0

    def _predict(self, X: Matrix) -> Array:
        """UnsupportedError for a launch that it does not apply to."""
        applies = self.applies(X)
        if not applies.all():
            raise UnsupportedError(
                f"nvMatmulHeuristics' estimate of {int((~applies).sum())} of {len(X)} launches",
                ["it knows launches of one scheme, w16a16 or per-channel w8a8, and `applies` says which those are"],
            )
        return self.factor_ * self._estimates_us(X)

    def _estimates_us(self, X: Matrix) -> Array:
        distinct, index = np.unique(np.asarray(_problems(X), dtype=object).astype(str), axis=0, return_inverse=True)
        asked = [[precision, *map(int, numbers)] for precision, *numbers in distinct.tolist()]
        seconds = np.asarray(_ask(GPUS[self.gpu], asked), dtype=np.float64)
        return np.asarray(1e6 * seconds[index.ravel()])


def _problems(X: Matrix) -> list[tuple[str | int, ...]]:
    """(types, M, N, K, batch, CTA's m, n) of each launch."""

    def column(name: str) -> Array:
        return np.asarray(X[:, INDEX[name]], dtype=np.float64)

    active = np.maximum(column("num_active"), 1.0)
    tokens = np.ceil(column("num_tokens") / active)
    numbers = np.stack([column("n"), tokens, column("k"), active, column("tile_m"), column("tile_n")], axis=1)
    types = np.select([column(share) == 1 for share in _PRECISIONS], [name for name, _ in _PRECISIONS.values()], "")
    return [(str(name), *row) for name, row in zip(types, numbers.astype(np.int64).tolist(), strict=True)]


def _ask(gpu: str, problems: list[list[Any]]) -> list[float]:
    """Seconds of each problem, from a child process. UserError when it fails or does not answer."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", _CHILD],
            input=json.dumps({"gpu": gpu, "problems": problems}),
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"nvMatmulHeuristics did not answer within {_LIMIT_S:.0f} s") from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise UserError(f"nvMatmulHeuristics failed, exit code {done.returncode}: {said[-1] if said else 'no message'}")
    seconds = json.loads(done.stdout)
    if not all(each > 0 for each in seconds):
        raise UserError("nvMatmulHeuristics has no estimate for a launch of these types")
    return [float(each) for each in seconds]
