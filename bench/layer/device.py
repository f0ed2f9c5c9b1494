"""The GPU of a `--measure` run: torch's current CUDA device."""

from __future__ import annotations

from pathlib import Path

import torch

from bench.kernel_sets import progress
from bench.layer.building import Plan, build_gemms, build_steps, load_steps, steps_needed
from bench.layer.measuring import FAILURES, Device
from bench.layer.tuning import TunedLibrary
from kernel_gen.library import library_of
from kernel_gen.timing import GpuClock
from profiles.errors import SpecError
from profiles.gpus import GpuSpec


def this_gpu() -> GpuSpec:
    """SpecError: torch sees no GPU; UnsupportedError: one that nobody described."""
    if not torch.cuda.is_available():
        raise SpecError("--measure: torch sees no GPU; leave it out to report what was measured before")
    return library_of(torch.cuda.current_device()).gpu


def open_device(plan: Plan, folder: Path) -> Device:
    """The plan's GPU, with its kernels linked in `folder`: what the cache lacks is compiled."""
    versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    failures = FAILURES
    try:
        import triton
    except ModuleNotFoundError:
        versions["triton"] = "not installed"
    else:
        versions["triton"] = triton.__version__
        failures += (triton.TritonError,)
    kernels = TunedLibrary.build(build_gemms(plan), plan.gpu, folder, track=progress)
    kernels.add_steps(load_steps(build_steps(steps_needed(plan)), folder))
    return Device(
        gpu=plan.gpu,
        clock=GpuClock(),
        kernels=kernels,
        l2_bytes=torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size,
        versions=versions,
        failures=failures,
    )
