"""Instances of the allocation problem, and two slow ways to solve one."""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, csr_array

Floats = NDArray[np.float64]

REAL_BITS = np.array([2.25, 3.25, 4.0, 4.125, 4.25, 8.0, 8.0, 16.0])
REAL_ACTIVATION_BITS = np.array([16.0, 16.0, 4.0, 16.0, 8.0, 16.0, 8.0, 16.0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    loss: Floats  # [B, S]
    bits: Floats  # [S] or [B, S]
    avg_bits: float
    latency_us: Floats | None = None  # [B, S, R]
    max_latency_us: Floats | None = None

    def arguments(self) -> dict[str, Any]:
        return {
            "loss": self.loss,
            "weight_bits": self.bits,
            "avg_bits": self.avg_bits,
            "latency_us": self.latency_us,
            "max_latency_us": self.max_latency_us,
        }

    def all_bits(self) -> Floats:
        return np.broadcast_to(self.bits, self.loss.shape)

    def holds(self, assignment: NDArray[np.int64], rel: float = 1e-9) -> bool:
        rows = np.arange(len(self.loss))
        used = self.all_bits()[rows, assignment].mean()
        if used > self.avg_bits * (1 + rel):
            return False
        if self.latency_us is None or self.max_latency_us is None:
            return True
        return bool((self.latency_us[rows, assignment].sum(axis=0) <= self.max_latency_us * (1 + rel) + 1e-12).all())


def realistic(*, layers: int, experts: int, seed: int, linears: int = 3) -> tuple[Floats, Floats, Floats, Floats]:
    """loss [B, 8] (4^-bits times log-normal sensitivities), bits [8], sizes [B], latency [B, 8, 2] (roofline)."""
    rng = np.random.default_rng(seed)
    blocks, schemes = layers * experts * linears, REAL_BITS.size
    sensitivity = rng.lognormal(0, 1.5, blocks) * np.repeat(rng.lognormal(0, 0.7, layers), experts * linears)
    quantised = REAL_ACTIVATION_BITS < 16
    error = 4.0**-REAL_BITS + np.where(quantised, 4.0**-REAL_ACTIVATION_BITS, 0)
    loss = sensitivity[:, None] * error * rng.lognormal(0, 0.15, (blocks, schemes))
    sizes = np.full(blocks, 7168.0 * 2048.0)
    flops_per_us = {16: 800e6, 8: 1600e6, 4: 2400e6}
    latency = []
    for tokens in (64, 4096):
        share = np.repeat(np.clip(rng.zipf(1.6, layers * experts), 0, 200), linears).astype(float)
        per_block = share / share.sum() * tokens * 8 * layers
        memory = sizes[:, None] * REAL_BITS / 8 / 4.0e6  # bytes per us at 4 TB/s
        compute = 2 * sizes[:, None] * per_block[:, None] / [flops_per_us[int(bits)] for bits in REAL_ACTIVATION_BITS]
        latency.append(np.maximum(memory, compute) * rng.lognormal(0, 0.05, (blocks, schemes)) + 0.05)
    return loss, REAL_BITS, sizes, np.stack(latency, axis=2)


def brute_force(instance: Instance) -> float:
    """The least loss over every assignment; inf when none holds the limits."""
    blocks, schemes = instance.loss.shape
    rows = np.arange(blocks)
    best = np.inf
    for choice in itertools.product(range(schemes), repeat=blocks):
        assignment = np.array(choice)
        if instance.holds(assignment, rel=1e-12):
            best = min(best, float(instance.loss[rows, assignment].sum()))
    return best


def by_milp(instance: Instance, seconds: float = 60.0) -> float:
    """The optimum by HiGHS on the plain formulation, with losses of some hundreds: HiGHS ends at an absolute gap of
    1e-6 too, which is nothing to them.
    """
    scale = 1000.0 / max(float(np.abs(instance.loss).max()), 1e-300)
    blocks, schemes = instance.loss.shape
    variables = blocks * schemes
    ones = np.ones(variables)
    once = csr_array(coo_array((ones, (np.repeat(np.arange(blocks), schemes), np.arange(variables)))))
    rows, limits = [instance.all_bits().ravel() / blocks], [instance.avg_bits]
    if instance.latency_us is not None and instance.max_latency_us is not None:
        rows += [instance.latency_us[:, :, i].ravel() for i in range(instance.latency_us.shape[2])]
        limits += list(instance.max_latency_us)
    result = milp(
        instance.loss.ravel() * scale,
        constraints=[LinearConstraint(once, 1, 1), LinearConstraint(np.array(rows), -np.inf, limits)],
        integrality=ones,
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0, "time_limit": seconds},
    )
    assert result.status == 0, result.message
    return float(result.fun) / scale


def hard(kind: str, *, blocks: int, schemes: int, scenarios: int, seed: int) -> Instance:
    """The knapsack literature's classes: uncorrelated, strongly correlated, subset sum, and quantisation-like."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(10, 1000, (blocks, schemes)).astype(float)
    latency = rng.random((blocks, schemes, scenarios)) * 100
    loss = rng.random((blocks, schemes)) * 1000
    if kind == "strong":
        loss = -(bits + 100.0)
    if kind == "subset":
        loss = -bits
    if kind == "real":
        bits = np.broadcast_to(REAL_BITS[:schemes], (blocks, schemes))
        spread = rng.lognormal(0, 1.5, (blocks, 1)) * rng.lognormal(0, 0.3, (blocks, schemes))
        loss, latency = spread * 4.0**-bits, latency / 10 + bits[:, :, None]
    middle = 0.5 * (bits.min(axis=1).mean() + bits.max(axis=1).mean())
    avg_bits = np.floor(middle * blocks) / blocks - 0.25 / blocks if kind == "subset" else middle
    half = latency.min(axis=1).sum(axis=0) + 0.5 * (latency.max(axis=1) - latency.min(axis=1)).sum(axis=0)
    return Instance(
        loss=loss,
        bits=bits,
        avg_bits=float(avg_bits),
        latency_us=latency if scenarios else None,
        max_latency_us=half if scenarios else None,
    )
