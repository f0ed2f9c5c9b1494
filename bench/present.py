"""The tables that allocation benches read, so that their figures stay comparable: launches of one H200, 2026-11-24 at
11:30, and the latency model fitted on them.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from costmodel.fit import fit, read_profiles
from costmodel.model_file import FittedModel
from costmodel.sessions import usable

FOLDER = Path(__file__).parent.parent / "profiles" / "data" / "h200" / "earlier"
UNIFORM, MIXED = FOLDER / "hopper_v2.parquet", FOLDER / "mixed_v2.parquet"


@cache
def latency_model(profiles: tuple[Path, ...] = (UNIFORM, MIXED)) -> FittedModel:
    """Fitted on all rows of these profiles; once a process."""
    return fit(usable(read_profiles(profiles)))
