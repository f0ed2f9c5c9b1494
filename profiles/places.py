"""Where files are: what comes with the package, and what a user's machine made and can make again."""

from __future__ import annotations

import os
from pathlib import Path

import profiles


def default_cache_dir() -> Path:
    """`$BITILE_CACHE`, else `bitile` in `$XDG_CACHE_HOME`, else in `~/.cache`."""
    if own := os.environ.get("BITILE_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "bitile"


def committed_profiles(gpu_name: str) -> list[Path]:
    """The profiles of a GPU that come with the package."""
    return sorted(Path(profiles.__path__[0], "data", gpu_name).glob("*.parquet"))
