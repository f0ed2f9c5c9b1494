"""The latency model of a GPU whose launches come with the package: fitted once on a machine, then read from the cache.

What is kept is named by the profiles' bytes and by the modules that make a model of them, so that it is never of other
measurements or of another version.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from pathlib import Path

from costmodel import model_file
from costmodel.fit import fit, read_profiles
from costmodel.model_file import FittedModel
from costmodel.sessions import usable
from profiles.errors import DataError
from profiles.gpus import GpuSpec
from profiles.places import committed_profiles, default_cache_dir

log = logging.getLogger(__name__)


@functools.lru_cache(maxsize=8)
def fitted(gpu: GpuSpec) -> FittedModel:
    """The model of the launches that come with the package. The first time on a machine it is fitted, which takes ten
    seconds or so.

    Raises:
        DataError: no launches of this GPU come with the package. What the cache holds is fitted again if it is damaged,
            and nothing is kept where it cannot be written: a warning says so.
    """
    paths = committed_profiles(gpu.name)
    if not paths:
        raise DataError(f"no launches of {gpu.name} come with bitile to fit a latency model on")
    kept = default_cache_dir() / "latency" / f"{gpu.name}-{_digest(tuple(paths))}.npz"
    if kept.exists():
        try:
            return model_file.read(kept)
        except DataError as error:
            log.warning("%s; fitted again", error)
    log.info("fitting a latency model on the launches of %s that come with bitile; it is kept in %s", gpu.name, kept)
    model = fit(usable(read_profiles(paths)))
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        model_file.write(kept, model)
    except (OSError, DataError) as error:
        log.warning(
            "the latency model is not kept, and will be fitted again: %s (BITILE_CACHE names the folder)", error
        )
    return model


def _digest(paths: tuple[Path, ...]) -> str:
    """Of the profiles, and of this package's modules."""
    digest = hashlib.sha256()
    for path in (*paths, *sorted(Path(__file__).parent.glob("*.py"))):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
