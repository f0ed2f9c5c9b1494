"""The GPU of a `--measure` run: torch's current CUDA device, with kernels compiled before, in parallel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from bench.kernel_sets import progress
from bench.peers.measuring import Device
from bench.peers.roofline import H200
from kernel_gen.kernels import KernelSpec
from kernel_gen.library import KernelLibrary, library_of
from kernel_gen.timing import GpuClock
from profiles.errors import SpecError, UserError
from profiles.gpus import GpuSpec


def check_gpu() -> GpuSpec:
    """SpecError: torch sees no GPU, or another than the one whose roofline is known."""
    if not torch.cuda.is_available():
        raise SpecError("--measure: torch sees no GPU; leave it out to compare recorded launches")
    gpu = library_of(torch.cuda.current_device()).gpu
    if gpu.name != H200.gpu:
        raise SpecError(f"--measure: the roofline was measured on {H200.gpu}, this GPU is {gpu.name}")
    return gpu


def open_device(gpu: GpuSpec, specs: Sequence[KernelSpec], folder: Path) -> Device:
    """Torch's device, with these kernels linked into a bundle in `folder`."""
    library = KernelLibrary.build(specs, gpu, folder, track=progress)
    index = torch.cuda.current_device()
    versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    failures: tuple[type[Exception], ...] = (RuntimeError, UserError)
    try:
        import triton
    except ModuleNotFoundError:
        versions["triton"] = "not installed"
    else:
        versions["triton"] = triton.__version__
        failures += (triton.TritonError,)
    return Device(
        gpu=library.gpu,
        torch_device="cuda",
        clock=GpuClock(),
        kernels=library,
        synchronize=torch.cuda.synchronize,
        release=torch.cuda.empty_cache,
        l2_bytes=torch.cuda.get_device_properties(index).L2_cache_size,
        versions=versions,
        failures=failures,
    )
