"""A Hugging Face checkpoint folder: config.json and safetensors, read one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from profiles.errors import DataError, SpecError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Checkpoint:
    """Tensors of a folder by the names that it gives them. Nothing is held in memory but names.

    Attributes:
        folder: where it is.
        config: config.json's content.
    """

    def __init__(self, folder: str | Path) -> None:
        """SpecError: no such folder, no config. DataError: no safetensors, shards missing or broken."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise SpecError(f"{folder}: no such folder; --model takes a Hugging Face checkpoint folder")
        self.config: dict[str, Any] = _json(self.folder / "config.json")
        if self.config.get("quantization_config"):
            raise SpecError(f"{folder}: the checkpoint is quantised already; give the bf16, fp16 or fp32 one")
        self._files = self._locate()

    @property
    def model_type(self) -> str:
        """config.json's model_type; empty if it has none."""
        return str(self.config.get("model_type", ""))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self, prefix: str = "") -> Iterator[str]:
        """Names of all tensors that begin so."""
        return (name for name in self._files if name.startswith(prefix))

    def load(self, names: list[str], *, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Some tensors. DataError: one is missing, not readable, of codes, or holds a NaN or an infinity."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            if name not in self._files:
                raise DataError(f"{self.folder}: no tensor {name} in the checkpoint")
            by_file.setdefault(self._files[name], []).append(name)
        tensors = {}
        for file, wanted in by_file.items():
            with _opened(file) as shard:
                for name in wanted:
                    tensors[name] = _finite(shard.get_tensor(name), name, file).to(device=device, dtype=dtype)
        return tensors

    def _locate(self) -> dict[str, Path]:
        index, single = self.folder / INDEX, self.folder / SINGLE
        if not index.is_file():
            if not single.is_file():
                raise DataError(f"{self.folder}: neither {SINGLE} nor {INDEX}; a safetensors checkpoint is needed")
            return dict.fromkeys(sorted(_names_in(single)), single)
        weight_map = _json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise DataError(f"{index}: no weight_map from tensors to files")
        shards = sorted(set(weight_map.values()))
        absent = [shard for shard in shards if not (self.folder / shard).is_file()]
        if absent:
            raise DataError(
                f"{self.folder}: {len(absent)} of {len(shards)} shards missing ({', '.join(absent[:3])}"
                f"{', ...' if len(absent) > 3 else ''}); fetch the whole checkpoint"
            )
        for shard in shards:
            held = _names_in(self.folder / shard)
            lost = sorted(name for name, file in weight_map.items() if file == shard and name not in held)
            if lost:
                raise DataError(f"{self.folder / shard}: {lost[0]} should be in it, as {INDEX} says, and is not")
        return {name: self.folder / file for name, file in weight_map.items()}


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"{file}: cannot be read ({error.strerror}); a checkpoint folder holds one") from error
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: a JSON object is needed")
    return content


def _opened(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file}: not a readable safetensors file, truncated or foreign ({error})") from error


def _names_in(file: Path) -> set[str]:
    with _opened(file) as shard:
        return set(shard.keys())


def _finite(tensor: Tensor, name: str, file: Path) -> Tensor:
    if tensor.dtype not in _FLOATS:
        raise DataError(
            f"{file}: {name} holds {str(tensor.dtype).removeprefix('torch.')}; bf16, fp16 or fp32 is needed, not a"
            " quantised checkpoint"
        )
    if not bool(tensor.isfinite().all()):
        raise DataError(f"{file}: {name} holds a NaN or an infinity; the checkpoint is damaged")
    return tensor
