"""What a tuning run is asked for, and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from allocator.allocation import Allocation, Granularity
from allocator.budget import Budget
from allocator.scenarios import Batch
from allocator.verify import Verification
from profiles.errors import SpecError
from profiles.gpus import GpuSpec
from profiles.schemes import QuantScheme

STUDY_TRIALS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a tuning run is asked for.

    Attributes:
        model: a checkpoint folder.
        data, held_out: texts or ids to calibrate and to measure on.
        gpu: whose latencies count.
        budget: the limits.
        loads: batches by name.
        schemes: what is calibrated and may be chosen.
        out: the folder of all results.
        profile: measured launches; None: latencies are predicted.
        latencies: launches of this run's finalists, measured elsewhere by `allocator.latency`; None: measured here
            where the GPU is.
        granularity: what gets one scheme.
        study_trials: of the outer study; 0: none.
        loss_weight: r of the KL^r * T^(1-r) that finalists are ranked by, from 0 to 1.
        num_sequences, length, batch_size, seed, max_rows, rotate, device: of calibration and verification.
    """

    model: Path
    data: Path
    held_out: Path
    gpu: GpuSpec
    budget: Budget
    loads: Mapping[str, Batch]
    schemes: tuple[QuantScheme, ...]
    out: Path
    profile: Path | None = None
    latencies: Path | None = None
    granularity: Granularity = Granularity.LINEAR
    study_trials: int = STUDY_TRIALS
    loss_weight: float = 1.0
    num_sequences: int = 128
    length: int = 2048
    batch_size: int = 1
    seed: int = 0
    max_rows: int = 2048
    rotate: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.loss_weight <= 1:
            raise SpecError(f"the loss weight must be from 0 to 1, not {self.loss_weight}")
        if self.study_trials < 0:
            raise SpecError(f"study trials: 0 for none, or a number, not {self.study_trials}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What came out. chosen: the first of the ranked finalists; stages: which were made or found, in order."""

    allocation: Allocation
    chosen: str
    verification: Verification
    cost_source: str
    notes: tuple[str, ...]
    stages: Mapping[str, str]
    files: Mapping[str, Path] = field(default_factory=dict)
