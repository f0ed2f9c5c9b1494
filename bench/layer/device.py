"""The device of a `--measure` run, with its kernels."""

from __future__ import annotations

from pathlib import Path

import torch

from bench.gpu import triton_failures, versions
from bench.kernel_sets import progress
from bench.layer.building import Plan, build_gemms, build_steps, load_steps, steps_needed
from bench.layer.measuring import FAILURES, Device
from bench.layer.tuning import TunedLibrary
from kernel_gen.timing import GpuClock


def open_device(plan: Plan, folder: Path) -> Device:
    """The plan's GPU, with its kernels linked in `folder`: what the cache lacks is compiled."""
    kernels = TunedLibrary.build(build_gemms(plan), plan.gpu, folder, track=progress)
    kernels.add_steps(load_steps(build_steps(steps_needed(plan)), folder))
    return Device(
        gpu=plan.gpu,
        clock=GpuClock(),
        kernels=kernels,
        l2_bytes=torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size,
        versions=versions(),
        failures=(*FAILURES, *triton_failures()),
    )
