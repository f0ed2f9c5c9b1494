"""The kind of machine that a benchmark ran on: times of one kind compare with each other and with no other kind's."""

import os
import platform
import re
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def slug(name: str) -> str:
    """Return a name fit for a file: "NVIDIA H200" is "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cpu_name() -> str:
    """Return the processor's name with family, model and stepping: some processors hide their brand."""
    if not CPUINFO.exists():
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^([^\t\n]+?)\s*:\s*(.*)$", CPUINFO.read_text().split("\n\n")[0], re.MULTILINE))
    numbers = [fields[key] for key in ("cpu family", "model", "stepping") if key in fields]
    return " ".join([fields.get("model name", platform.machine()), *numbers])


def gpu_name() -> str | None:
    """Return the name of the GPU that torch would use, None without one."""
    try:
        import torch
    except ModuleNotFoundError:
        return None
    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def machine_kind() -> str:
    """Return processor, usable cores and GPU, if any, as one name."""
    cores = f"{len(os.sched_getaffinity(0))} cores"
    return slug(" ".join(part for part in (cpu_name(), cores, gpu_name()) if part))
