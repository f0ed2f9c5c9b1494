"""`--again`: a few recorded launches measured anew, chosen so that they tell whether anything changed, and what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from kernel_gen.sweeping.candidates import Workload
from kernel_gen.sweeping.plan import Cell, LoadCase
from profiles import kernels, schemes
from profiles.errors import DataError
from profiles.gpus import GpuSpec
from profiles.loads import TokenLoad
from profiles.records import load_of_row


def cells_again(paths: Sequence[Path], number: int, gpu: GpuSpec) -> list[Cell]:
    """`number` recorded launches with their configurations, as a plan. DataError for profiles that are refused, are not
    there, or are of another GPU.
    """
    # What chooses needs scipy, a second to import that other sweeps are spared.
    from costmodel.fit import read_profiles
    from costmodel.recheck import choose
    from costmodel.sessions import usable

    rows = usable(read_profiles(paths))
    if (other := str(rows["gpu"].iloc[0])) != gpu.name:
        raise DataError(f"the recorded launches are of {other}, not {gpu.name}")
    found: dict[tuple[Workload, TokenLoad], list[tuple[str, float]]] = {}
    for row in cast(list[dict[str, Any]], choose(rows, number).to_dict("records")):
        key = _workload(row), load_of_row(row)
        found.setdefault(key, []).append((row["config"], float(row["latency_us"])))
    return [
        Cell(
            workload=workload,
            case=LoadCase(
                kind=load.source, tokens=load.total if load.num_tokens is None else load.num_tokens, load=load
            ),
            configs=tuple(kernels.parse(name) for name, _ in configs),
            prices_us=tuple(latency_us for _, latency_us in configs),
        )
        for (workload, load), configs in sorted(found.items(), key=lambda item: str(item[0][0]))
    ]


def _workload(row: dict[Any, Any]) -> Workload:
    used = tuple(schemes.parse(name) for name in row["schemes"])
    return Workload(
        model=row["model"],
        linear=row["linear"],
        num_experts=int(row["num_experts"]),
        n=int(row["n"]),
        k=int(row["k"]),
        schemes=used,
        label="+".join(dict.fromkeys(scheme.name for scheme in used)),
    )
