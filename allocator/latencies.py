"""What launches of allocations took on a GPU, as a file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from allocator.allocation import Allocation
from allocator.json_file import JsonKind
from profiles.errors import DataError

FILE = JsonKind(
    kind="bitile launch latencies", version=1, name="launch latencies", file_name="file of launch latencies"
)


def digest_of(allocation: Allocation) -> str:
    """The same for the same schemes: latencies belong to an assignment, whatever it is called."""
    rows = sorted((i.layer, i.expert, i.linear.value, s.name) for i, s in allocation.assignment.items())
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchTime:
    """One launch, with the fastest configuration of those tried.

    Attributes:
        allocation: whose it is, by name.
        layer, linear, scenario: which launch.
        experts: how many experts have each scheme, by its name.
        config: the kernel configuration's name.
        latency_us, p20_us, p80_us: median and percentiles.
        tried: configurations that gave right values and a time.
    """

    allocation: str
    layer: int
    linear: str
    scenario: str
    experts: Mapping[str, int]
    config: str
    latency_us: float
    p20_us: float
    p80_us: float
    tried: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """Allocations of one model on one GPU.

    Attributes:
        model, gpu: names.
        num_layers: that the allocations have.
        layers: those whose launches were measured; totals are scaled from them to all.
        total_us: by allocation and scenario, all launches of all layers. An allocation with a launch that no
            configuration ran has none.
        digests: by allocation, of its assignment.
        launches: every launch that was measured.
        failures: what did not run, a sentence each.
        versions: of kernels and libraries.
    """

    model: str
    gpu: str
    num_layers: int
    layers: tuple[int, ...]
    total_us: Mapping[str, Mapping[str, float]]
    digests: Mapping[str, str]
    launches: tuple[LaunchTime, ...]
    failures: tuple[str, ...]
    versions: Mapping[str, str]

    def of(self, allocation: Allocation) -> Mapping[str, float] | None:
        """By scenario; None if these schemes were not measured, or not wholly."""
        wanted = digest_of(allocation)
        names = [name for name, digest in self.digests.items() if digest == wanted and name in self.total_us]
        return self.total_us[names[0]] if names else None

    @property
    def extent(self) -> str:
        """`all 24 layers`, or `3 of 24 layers, scaled to all`."""
        if len(self.layers) == self.num_layers:
            return f"all {self.num_layers} layers"
        return f"{len(self.layers)} of {self.num_layers} layers, scaled to all"

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        return FILE.mark(asdict(self))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Put it in the place of a JSON file, whole or not at all. DataError when it cannot be written."""
        FILE.write(path, asdict(self))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Latencies:
        """From JSON. DataError: missing, truncated, foreign or of another version."""
        content = FILE.read(path)
        try:
            made = {
                "layers": tuple(content["layers"]),
                "launches": tuple(LaunchTime(**row) for row in content["launches"]),
                "failures": tuple(content["failures"]),
            }
            return cls(**(content | made))
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: launch latencies lack or have a field too many ({error})") from error
