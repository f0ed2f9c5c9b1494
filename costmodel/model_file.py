"""A fitted LatencyModel as a file: arrays and a JSON header in one .npz, no code. Reading it runs nothing and unpickles
nothing; a file that is foreign, truncated, of another format or of other features is refused in one sentence.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from costmodel.analytic import model_version
from costmodel.calibration import FACTORS, CalibratedCore
from costmodel.columns import FEATURES
from costmodel.conformal import POOLED, Conformal
from costmodel.forest import MAX_DEPTH, Forest
from costmodel.model import LatencyModel
from profiles.atomic import replacing
from profiles.errors import DataError, SpecError
from profiles.gpus import Math, gpu
from profiles.kernels import parse

FORMAT = "bitile latency model"
FORMAT_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedModel:
    """A model and where it is from.

    Attributes:
        model: fitted.
        gpu: whose launches it was fitted on.
        configs: names of the configurations it was fitted on, by scheme.
        num_rows: launches.
        core_version: of the analytic core whose numbers it was fitted on.
    """

    model: LatencyModel
    gpu: str
    configs: Mapping[str, tuple[str, ...]]
    num_rows: int
    core_version: str = field(default_factory=model_version)

    @property
    def version(self) -> str:
        """Names the model by what it learned."""
        digest = hashlib.sha256(self.core_version.encode())
        for part in _arrays(self.model).values():
            digest.update(np.ascontiguousarray(part).tobytes())
        return f"latency-{digest.hexdigest()[:12]}"


def write(path: str | os.PathLike[str], fitted: FittedModel) -> None:
    """Put a model that was fitted on the features of `costmodel.features` in the place of a file.

    Raises:
        DataError: it cannot be written, or was fitted on other columns.
    """
    target, model = Path(path), fitted.model
    if model.core_ is None:
        raise DataError(f"{target}: only a model fitted on costmodel.features can be saved")
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "gpu": fitted.gpu,
        "configs": fitted.configs,
        "num_rows": fitted.num_rows,
        "core_version": fitted.core_version,
        "features": list(FEATURES),
        "parameters": model.get_params(),
        "base": model.forest_.base,
    }
    try:
        with replacing(target) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **_arrays(model) | {"header": np.asarray(json.dumps(header))})
    except OSError as error:
        raise DataError(f"{target}: cannot be written ({error.strerror or error})") from error


def _arrays(model: LatencyModel) -> dict[str, npt.NDArray[Any]]:
    """All that a model learned, but the forests' bases."""
    core, conformal = model.core_, model.conformal_
    arrays: dict[str, npt.NDArray[Any]] = {} if core is None else {"factors": core.factors}
    forest = model.forest_
    arrays |= {"tree_features": forest.features, "tree_thresholds": forest.thresholds, "tree_leaves": forest.leaves}
    return arrays | {"regimes": conformal.regimes, "counts": conformal.counts, "scores": conformal.scores}


def read(path: str | os.PathLike[str]) -> FittedModel:
    """A model from its file.

    Raises:
        DataError: unreadable, foreign, of another format version, of other features or of another analytic core (fit
            it again), or with numbers that cannot be.
    """
    where = str(path)
    header, arrays = _contents(Path(path))
    if header.get("format") != FORMAT:
        raise DataError(f"{where}: not a latency model")
    if header.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{where}: a latency model of format {header.get('format_version')}; this version of bitile reads"
            f" {FORMAT_VERSION}"
        )
    if header.get("features") != list(FEATURES):
        raise DataError(f"{where}: fitted on other features than this version's; fit it again")
    if header.get("core_version") != model_version():
        raise DataError(
            f"{where}: fitted on the analytic core {header.get('core_version')}, this is {model_version()};"
            " fit it again"
        )
    try:
        model = _model(header, arrays)
        return FittedModel(
            model=model,
            gpu=gpu(header["gpu"]).name,
            configs={str(name): tuple(parse(each).name for each in names) for name, names in header["configs"].items()},
            num_rows=int(header["num_rows"]),
            core_version=str(header["core_version"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, SpecError) as error:
        raise DataError(f"{where}: a damaged latency model ({error})") from error


def _contents(path: Path) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    try:
        with path.open("rb") as handle:
            if not zipfile.is_zipfile(handle):
                raise DataError(f"{path}: not a latency model, truncated or foreign")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(str(arrays.pop("header")))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (
        OSError,
        ValueError,
        EOFError,
        KeyError,
        AttributeError,
        TypeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: not a readable latency model, truncated or foreign ({reason})") from error
    if not isinstance(header, dict):
        raise DataError(f"{path}: not a latency model")
    return header, arrays


def _model(header: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> LatencyModel:
    """ValueError, KeyError or TypeError for anything that a fitted model cannot be."""
    model = LatencyModel(**header["parameters"])
    factors = _array(arrays, "factors", np.float64, (2, len(Math), len(FACTORS)))
    if factors.min() < 0:
        raise ValueError("negative factors")
    model.core_ = CalibratedCore(factors=factors)
    model.forest_ = _forest(float(header["base"]), arrays)
    regimes = _array(arrays, "regimes", np.int64, (None,))
    if not len(regimes) or regimes[0] != POOLED or bool(np.any(np.diff(regimes) <= 0)):
        raise ValueError("regimes out of order")
    counts = _array(arrays, "counts", np.int64, (len(regimes),))
    scores = _array(arrays, "scores", np.float64, (len(regimes), None))
    if counts.min() < 1 or scores.shape[1] < 2 or scores.min() < 0 or bool(np.any(np.diff(scores, axis=1) < 0)):
        raise ValueError("scores out of order")
    model.conformal_ = Conformal(regimes=regimes, counts=counts, scores=scores)
    model.n_features_in_ = len(FEATURES)
    model.feature_names_in_ = np.asarray(FEATURES, dtype=object)
    return model


def _forest(base: float, arrays: Mapping[str, npt.NDArray[Any]]) -> Forest:
    features = _array(arrays, "tree_features", np.int32, (None, None))
    trees, depth = features.shape
    if not 1 <= depth <= MAX_DEPTH or features.min(initial=0) < 0 or features.max(initial=0) >= len(FEATURES):
        raise ValueError("questions on features that do not exist")
    thresholds = _array(arrays, "tree_thresholds", np.float32, (trees, depth), may_be_infinite=True)
    leaves = _array(arrays, "tree_leaves", np.float64, (trees, 1 << depth))
    if not np.isfinite(base):
        raise ValueError(f"base {base}")
    return Forest(base=base, features=features, thresholds=thresholds, leaves=leaves)


def _array(
    arrays: Mapping[str, npt.NDArray[Any]],
    name: str,
    dtype: type[np.generic],
    shape: tuple[int | None, ...],
    *,
    may_be_infinite: bool = False,
) -> npt.NDArray[Any]:
    found = arrays[name]
    fits = found.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, found.shape, strict=True))
    if found.dtype != dtype or not fits:
        raise ValueError(f"{name} is {found.dtype} {found.shape}")
    if np.isnan(found).any() or not (may_be_infinite or np.isfinite(found).all()):
        raise ValueError(f"{name} has numbers that are not finite")
    return found
