"""The report of the GPU tests: which tests ran on which GPU, on which kernels, with what outcome.

A test names a kernel that it ran with pytest's own `record_property("kernel", f"{name} {fingerprint}")`.
`pytest -m gpu --gpu-report PATH` writes the report there, or to `PATH/<gpu>.json` where PATH does not end in `.json`.
It is committed, so that a reader without a GPU sees what was true of which kernels.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import pytest

VERSIONS_OF = ("torch", "apache-tvm-ffi", "nvidia-cutlass-dsl", "numpy")


class GpuReport:
    """Collects what the tests marked `gpu` reported and writes it as JSON when the session ends."""

    def __init__(self, path: Path, device: dict[str, Any]) -> None:
        self.path = path if path.suffix == ".json" else path / f"{slug(device['name'])}.json"
        self.device = device
        self.tests: dict[str, dict[str, Any]] = {}
        self.kernels: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep a test's worst phase: a failing teardown counts against a call that passed."""
        if "gpu" not in report.keywords:
            return
        row = self.tests.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        row["seconds"] = round(row["seconds"] + report.duration, 3)
        if report.outcome != "passed" and row["outcome"] != "failed":
            row["outcome"] = report.outcome
        self.kernels.update(str(value) for name, value in report.user_properties if name == "kernel")

    def pytest_sessionfinish(self) -> None:
        """Write the report beside its place, then move it there: a reader never sees half of it."""
        if not self.tests:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(self.as_dict(), indent=1) + "\n")
        partial.replace(self.path)

    def as_dict(self) -> dict[str, Any]:
        """Return the report: totals first, then kernels, then every test."""
        outcomes = [row["outcome"] for row in self.tests.values()]
        return {
            "device": self.device,
            "versions": {name: version(name) for name in VERSIONS_OF} | {"python": platform.python_version()},
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "totals": {outcome: outcomes.count(outcome) for outcome in ("passed", "failed", "skipped")},
            "kernels": sorted(self.kernels),
            "tests": dict(sorted(self.tests.items())),
        }


def describe_device() -> dict[str, Any]:
    """Return the name, compute capability and CUDA version of the GPU that torch uses."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "num_sms": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }


def version(distribution: str) -> str | None:
    """Return the installed version of a distribution, or None where there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def slug(name: str) -> str:
    """Return a GPU's name as a file name: "NVIDIA H200" is "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
