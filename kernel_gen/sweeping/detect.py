"""Which GPUs this machine has, asked of the driver through NVML: no torch, no CUDA context, a few milliseconds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import pynvml

from profiles.gpus import GpuSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class InstalledGpu:
    """One GPU of this machine: its name and UUID as the driver gives them, its compute capability, its SMs, the
    driver's version.
    """

    name: str
    uuid: str
    compute_capability: tuple[int, int]
    driver: str


def installed_gpus() -> tuple[InstalledGpu, ...]:
    """The GPUs that CUDA would show to this process, in its order; empty where there is no NVIDIA driver."""
    try:
        pynvml.nvmlInit()
    except (
        pynvml.NVMLError
    ):  # no library, no driver, no device, no permission: in each case nothing here can run a kernel
        return ()
    try:
        return _visible(
            tuple(_gpu(index) for index in range(pynvml.nvmlDeviceGetCount())), os.environ.get("CUDA_VISIBLE_DEVICES")
        )
    finally:
        pynvml.nvmlShutdown()


def matching_gpus(spec: GpuSpec, installed: Sequence[InstalledGpu]) -> tuple[InstalledGpu, ...]:
    """Those of `installed` that are `spec` (`GpuSpec.is_called`)."""
    return tuple(gpu for gpu in installed if spec.is_called(gpu.name, gpu.compute_capability))


def describe(installed: Sequence[InstalledGpu]) -> str:
    """What was found, for a sentence: "no NVIDIA GPU", or the names."""
    return ", ".join(gpu.name for gpu in installed) or "no NVIDIA GPU"


def _gpu(index: int) -> InstalledGpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return InstalledGpu(
        name=pynvml.nvmlDeviceGetName(handle),
        uuid=pynvml.nvmlDeviceGetUUID(handle),
        compute_capability=(major, minor),
        driver=pynvml.nvmlSystemGetDriverVersion(),
    )


def _visible(gpus: tuple[InstalledGpu, ...], listed: str | None) -> tuple[InstalledGpu, ...]:
    """Apply CUDA_VISIBLE_DEVICES as CUDA does: indices or UUID prefixes, in that order, ending at the first that names
    nothing.
    """
    if listed is None:
        return gpus
    chosen: list[InstalledGpu] = []
    for item in (part.strip() for part in listed.split(",")):
        found = [gpu for index, gpu in enumerate(gpus) if item and (item == str(index) or gpu.uuid.startswith(item))]
        if len(found) != 1:
            break
        chosen += found
    return tuple(chosen)
