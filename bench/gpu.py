"""The GPU of a measured run, torch's current CUDA device, and the libraries that run on it. Needs torch."""

from __future__ import annotations

import torch

from kernel_gen.library import library_of
from profiles.errors import SpecError
from profiles.gpus import GpuSpec


def this_gpu(only: str | None = None) -> GpuSpec:
    """What torch's device is. SpecError: torch sees no GPU, or another than `only`, the one that has been described
    well enough for what is measured; UnsupportedError: a GPU that nobody described.
    """
    if not torch.cuda.is_available():
        raise SpecError("--measure: torch sees no GPU; leave it out to report what was measured before")
    gpu = library_of(torch.cuda.current_device()).gpu
    if only is not None and gpu.name != only:
        raise SpecError(f"--measure: the roofline was measured on {only}, this GPU is {gpu.name}")
    return gpu


def versions() -> dict[str, str]:
    """Of torch, its CUDA and Triton."""
    try:
        import triton
    except ModuleNotFoundError:
        name = "not installed"
    else:
        name = triton.__version__
    return {"torch": torch.__version__, "cuda": str(torch.version.cuda), "triton": name}


def triton_failures() -> tuple[type[Exception], ...]:
    """What Triton raises on purpose; nothing where it is not installed."""
    try:
        import triton
    except ModuleNotFoundError:
        return ()
    return (triton.TritonError,)
