"""The device of a `--measure` run, with kernels compiled before, in parallel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from bench.gpu import triton_failures, versions
from bench.kernel_sets import progress
from bench.peers.measuring import Device
from kernel_gen.kernels import KernelSpec
from kernel_gen.library import KernelLibrary
from kernel_gen.timing import GpuClock
from profiles.errors import UserError
from profiles.gpus import GpuSpec


def open_device(gpu: GpuSpec, specs: Sequence[KernelSpec], folder: Path) -> Device:
    """Torch's device, with these kernels linked into a bundle in `folder`."""
    library = KernelLibrary.build(specs, gpu, folder, track=progress)
    return Device(
        gpu=library.gpu,
        torch_device="cuda",
        clock=GpuClock(),
        kernels=library,
        synchronize=torch.cuda.synchronize,
        release=torch.cuda.empty_cache,
        l2_bytes=torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size,
        versions=versions(),
        failures=(RuntimeError, UserError, *triton_failures()),
    )
