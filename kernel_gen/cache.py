"""Compiled kernels on disk, found by content: the same sources, spec and compiler give the same entry on every machine.

An entry is one folder, `kernel.o` and `entry.json`, that appears by one rename. An entry that is damaged is dropped
when it is asked for, and compiled again. The place is `profiles.places.default_cache_dir`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from kernel_gen.compiler import Artifact, dsl_version
from kernel_gen.gate import CodeFacts
from kernel_gen.kernels import KernelSpec
from profiles.places import default_cache_dir as default_cache_dir

ENTRY_VERSION = 2
"""Goes up when what an entry holds, or how its facts are read from the code, changes."""
SCRATCH_PREFIX = ".scratch-"
LEFTOVER_AGE_S = 3600.0
"""No kernel compiles for an hour."""
OBJECT_NAME = "kernel.o"
ENTRY_NAME = "entry.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCache:
    """The kernels under `root`. Several processes may use one cache at the same time."""

    root: Path

    def get(self, spec: KernelSpec) -> Artifact | None:
        """The kernel of `spec`, or None when it is not there or is damaged, in which case its entry is removed."""
        folder = self._folder(spec)
        if not folder.is_dir():
            return None
        artifact = _read_entry(folder, spec)
        if artifact is None:
            shutil.rmtree(folder, ignore_errors=True)
        return artifact

    def put(self, artifact: Artifact) -> Artifact:
        """Keep a compiled kernel; the artifact returned points at the cache's copy. Raises OSError when the disk is
        full.
        """
        folder = self._folder(artifact.spec)
        folder.parent.mkdir(parents=True, exist_ok=True)
        code_object = artifact.object_path.read_bytes()
        entry = {
            "label": artifact.spec.label,
            "object_sha256": hashlib.sha256(code_object).hexdigest(),
            "code": dataclasses.asdict(artifact.code),
            "compile_seconds": artifact.compile_seconds,
        }
        with self.scratch_dir() as scratch:
            new = Path(scratch, folder.name)
            new.mkdir()
            (new / OBJECT_NAME).write_bytes(code_object)
            (new / ENTRY_NAME).write_text(json.dumps(entry, sort_keys=True))
            try:
                new.rename(folder)
            except OSError:
                if not folder.is_dir():  # not another process that compiled the same kernel
                    raise
        return dataclasses.replace(artifact, object_path=folder / OBJECT_NAME)

    def scratch_dir(self) -> tempfile.TemporaryDirectory[str]:
        """A folder on the cache's disk for a kernel that is being compiled."""
        self.root.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=self.root)

    def remove_leftovers(self) -> None:
        """Remove the scratch folders of builds that were killed; those of builds that may still run are left."""
        for folder in self.root.glob(f"{SCRATCH_PREFIX}*"):
            with contextlib.suppress(FileNotFoundError):  # its owner was faster
                if time.time() - folder.stat().st_mtime > LEFTOVER_AGE_S:
                    shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, spec: KernelSpec) -> Path:
        content = f"{spec.fingerprint()}|{dsl_version()}|{spec.arch}|{ENTRY_VERSION}"
        key = hashlib.sha256(content.encode()).hexdigest()[:32]
        return self.root / key[:2] / key


def _read_entry(folder: Path, spec: KernelSpec) -> Artifact | None:
    """The artifact in an entry's folder, or None when the entry is damaged or of another kernel."""
    object_path = folder / OBJECT_NAME
    try:
        entry = json.loads((folder / ENTRY_NAME).read_text())
        digest = hashlib.sha256(object_path.read_bytes()).hexdigest()
        if entry["label"] != spec.label or entry["object_sha256"] != digest:
            return None
        lists = {name: tuple(value) for name, value in entry["code"].items() if isinstance(value, list)}
        code = CodeFacts(**{**entry["code"], **lists})
        return Artifact(spec=spec, object_path=object_path, code=code, compile_seconds=entry["compile_seconds"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):  # cut short, or of another program
        return None
