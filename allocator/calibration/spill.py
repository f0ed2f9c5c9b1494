"""Lists of tensors on disk, until they are taken back: what memory would not hold of every layer at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from profiles.errors import DataError


class Spill:
    """Lists of tensors of one dtype by number, a file each in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: dict[int, tuple[torch.dtype, list[torch.Size]]] = {}

    def put(self, number: int, tensors: Sequence[Tensor]) -> None:
        """Write a list. DataError when the folder has no room."""
        try:
            with self._file(number).open("wb") as out:
                for tensor in tensors:
                    out.write(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        except OSError as error:
            raise DataError(
                f"{self._folder}: layers' inputs cannot be kept there ({error.strerror or error}); name a folder with"
                " more room in the environment's TMPDIR"
            ) from error
        self._kept[number] = (tensors[0].dtype, [tensor.shape for tensor in tensors])

    def take(self, number: int) -> list[Tensor]:
        """The list, on the CPU; its file is gone."""
        dtype, shapes = self._kept.pop(number)
        sizes = [shape.numel() for shape in shapes]
        # Mapped, not read: the pages outlive the file's name.
        whole = torch.from_file(str(self._file(number)), shared=False, size=sum(sizes), dtype=dtype)
        self._file(number).unlink()
        return [part.view(shape) for part, shape in zip(torch.split(whole, sizes), shapes, strict=True)]

    def _file(self, number: int) -> Path:
        return self._folder / f"{number}.bin"
