"""The kernels that a worker can run: those of a bundle, or of a folder of bundles to which the sweep goes on adding."""

from __future__ import annotations

from pathlib import Path

from kernel_gen.bundle import MANIFEST_NAME, Bundle, BundledKernel, load_bundle
from kernel_gen.sweeping.candidates import Candidate, runs
from profiles.errors import SpecError


class Shelf:
    """Bundles in `path`: it is one itself, or holds some; those that came later are opened when a kernel is missing."""

    def __init__(self, path: Path) -> None:
        """DataError for a bundle that is not whole."""
        self._path = path
        self._bundles: dict[Path, Bundle] = {}
        self._open_new()

    def find(self, candidate: Candidate) -> tuple[Bundle, BundledKernel]:
        """The candidate's kernel and the bundle that it is in. SpecError when there is none."""
        found = self._find(candidate)
        if found is None:
            self._open_new()
            found = self._find(candidate)
        if found is None:
            raise SpecError(f"{self._path} has no kernel {candidate.config.name} for {candidate.workload.label}")
        return found

    def _find(self, candidate: Candidate) -> tuple[Bundle, BundledKernel] | None:
        for bundle in self._bundles.values():
            for kernel in bundle.kernels:
                spec = kernel.spec
                if spec.config == candidate.config and runs(spec.schemes, spec.max_experts, candidate.workload):
                    return bundle, kernel
        return None

    def _open_new(self) -> None:
        is_bundle = (self._path / MANIFEST_NAME).exists()
        folders = [self._path] if is_bundle else [path.parent for path in self._path.glob(f"*/{MANIFEST_NAME}")]
        for folder in sorted(folders):
            if folder not in self._bundles:
                self._bundles[folder] = load_bundle(folder)
