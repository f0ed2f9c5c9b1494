"""Pictures as files."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from profiles.atomic import replacing
from profiles.errors import DataError


def write(figure: Figure, path: Path) -> None:
    """A file whose suffix matplotlib knows, whole or not at all. DataError: another suffix, or it cannot be written."""
    kind = kind_of(path)
    try:
        with replacing(path) as temporary, matplotlib.rc_context({"svg.hashsalt": "bitile"}):
            figure.savefig(temporary, format=kind, dpi=120)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error


def kind_of(path: Path) -> str:
    """The picture's format by its name. DataError: none that matplotlib knows."""
    kinds = Figure().canvas.get_supported_filetypes()
    kind = path.suffix.removeprefix(".")
    if kind not in kinds:
        raise DataError(f"{path}: a picture ends in {', '.join(f'.{kind}' for kind in sorted(kinds))}")
    return kind
