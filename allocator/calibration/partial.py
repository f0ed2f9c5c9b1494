"""Layers that are done, kept on disk until the whole calibration is, so that a killed one goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from allocator.calibration.layer_losses import LayerNotes, Losses, LossOptions
from allocator.calibration.model import StreamedModel
from profiles import schemes
from profiles.atomic import remove_leftovers, replacing
from profiles.errors import DataError
from profiles.models import Linear, LinearId

_VERSION = 1


class Partial:
    """A folder beside the result, one file a layer; its name tells of all that decides the result, so that another
    calibration never takes these layers for its own.
    """

    def __init__(self, out: Path, fingerprint: str) -> None:
        self.folder = out.with_name(f".{out.name}.{fingerprint}.partial")

    def layers(self) -> list[int]:
        """Those that are done."""
        return sorted(int(file.stem.removeprefix("layer-")) for file in self.folder.glob("layer-*.json"))

    def read(self, layer: int) -> tuple[Losses, LayerNotes] | None:
        """A layer's losses and notes; None if it is not done. DataError for a file that something else wrote."""
        file = self._file(layer)
        if not file.is_file():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            losses: Losses = {
                (LinearId(layer=layer, expert=expert, linear=Linear(linear)), schemes.parse(scheme)): dict(values)
                for expert, linear, scheme, values in content["losses"]
            }
            notes = content["notes"]
            few = {int(expert): count for expert, count in notes["few_tokens"].items()}
            raised = [(expert, linear, scheme) for expert, linear, scheme in notes["damping_raised"]]
            return losses, LayerNotes(never_routed=notes["never_routed"], few_tokens=few, damping_raised=raised)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise DataError(
                f"{file}: not a calibration's layer ({error}); remove {self.folder} to begin anew"
            ) from error

    def write(self, layer: int, losses: Losses, notes: LayerNotes) -> None:
        """Durable when it returns. DataError when it cannot be written."""
        rows = [[i.expert, i.linear.value, scheme.name, values] for (i, scheme), values in losses.items()]
        try:
            self.folder.mkdir(exist_ok=True)
            remove_leftovers(self._file(layer))
            with replacing(self._file(layer)) as temporary:
                temporary.write_text(json.dumps({"losses": rows, "notes": asdict(notes)}), encoding="utf-8")
        except OSError as error:
            raise DataError(f"{self._file(layer)}: cannot be written ({error.strerror or error})") from error

    def remove(self) -> None:
        """When the result is written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer}.json"


def fingerprint(model: StreamedModel, tokens: Tensor, measures: list[str], options: LossOptions, seed: int) -> str:
    """Of everything that decides a calibration's losses."""
    digest = hashlib.sha256()
    folder = model.checkpoint.folder
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    digest.update(tokens.cpu().numpy().tobytes())
    names = [scheme.name for scheme in options.schemes]
    settings = [_VERSION, names, measures, repr(options.quantizer), options.max_rows, seed, str(model.dtype)]
    digest.update(json.dumps(settings).encode())
    return digest.hexdigest()[:12]
