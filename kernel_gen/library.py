"""Kernels ready to launch on torch's current GPU: from a bundle, or compiled when first asked for."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch

from kernel_gen.bundle import Bundle, BundledKernel, write_bundle
from kernel_gen.experts import Experts
from kernel_gen.kernels import KernelSpec, StepSpec
from kernel_gen.runtime import Kernel
from kernel_gen.select import choose, rounded_rows, table_size
from profiles.errors import SpecError, UnsupportedError
from profiles.gpus import GPUS, GpuSpec
from profiles.kernels import KernelConfig
from profiles.schemes import QuantScheme

if TYPE_CHECKING:
    from kernel_gen.build import Track


class KernelLibrary:
    """Loaded kernels of one GPU. A kernel that is not loaded yet is compiled and gated (a second or two), so warm up
    before a capture.

    Args:
        gpu: what torch's device is.
        bundle: kernels made by `python -m kernel_gen.build`, each of which passed the gate; without one, the compiler
            must be installed.
    """

    def __init__(self, gpu: GpuSpec, bundle: Bundle | None = None) -> None:
        if not isinstance(gpu, GpuSpec):
            raise SpecError(f"gpu: expected what profiles.gpus.gpu gives, got {gpu!r}")
        if isinstance(bundle, str | Path):
            raise SpecError(f"bundle: expected what kernel_gen.load_bundle gives, got {bundle!r}")
        if bundle is not None and bundle.gpu.arch != gpu.arch:
            raise SpecError(f"bundle: expected kernels for {gpu.arch}, got {bundle.gpu.arch} ({bundle.path})")
        self.gpu, self.bundle = gpu, bundle
        self._loaded: dict[KernelSpec, Kernel] = {}
        self._refused: dict[KernelSpec, tuple[str, ...]] = {}
        self._steps: dict[StepSpec, Callable[..., None]] = {}
        self._best_of: weakref.WeakKeyDictionary[Experts, dict[tuple[int, bool, bool, bool], Kernel]] = (
            weakref.WeakKeyDictionary()
        )
        self._fitting_of: dict[
            tuple[frozenset[QuantScheme], int, bool, bool, bool], dict[KernelConfig, KernelSpec]
        ] = {}

    @classmethod
    def build(cls, specs: Sequence[KernelSpec], gpu: GpuSpec, folder: Path, *, track: Track | None = None) -> Self:
        """A library of these kernels: what the cache lacks is compiled, in parallel; all are linked into a bundle in
        `folder`. `track` shows progress (`kernel_gen.build`).
        """
        from kernel_gen.build import compile_and_gate, silent  # it needs what only the `compile` extra installs
        from kernel_gen.cache import KernelCache, default_cache_dir

        gated = compile_and_gate(specs, gpu, KernelCache(root=default_cache_dir()), track=track or silent)
        return cls(gpu, write_bundle(folder, gpu, gated.kept, gated.refused))

    def best(
        self,
        experts: Experts,
        num_rows: int,
        *,
        swiglu: bool = False,
        overlap: bool = False,
        prefetch: bool = False,
    ) -> Kernel:
        """The kernel that the latency model ranks first for these experts and so many rows of X, of the bundle's if
        there is one. SpecError where the bundle has none for them.

        Found once for batch sizes that `choose` does not tell apart: to compare the schemes of a hundred experts takes
        longer than a launch.
        """
        known = self._best_of.setdefault(experts, {})
        key = (rounded_rows(num_rows), swiglu, overlap, prefetch)
        if key not in known:
            known[key] = self._find(experts, num_rows, swiglu=swiglu, overlap=overlap, prefetch=prefetch)
        return known[key]

    def _find(self, experts: Experts, num_rows: int, *, swiglu: bool, overlap: bool, prefetch: bool) -> Kernel:
        per_expert, n, k, size = experts.scheme_of_expert, experts.n, experts.k, table_size(experts.num_experts)
        if self.bundle is None:
            refused: set[KernelConfig] = set()
            while True:  # until `choose` has none left and says why
                config = choose(per_expert, n, k, num_rows, self.gpu, without=frozenset(refused))
                try:
                    return self.kernel(config, experts.schemes, size, swiglu=swiglu, overlap=overlap, prefetch=prefetch)
                except UnsupportedError:  # legal by estimate, refused by the gate
                    refused.add(config)
        fitting = self._fitting(frozenset(experts.schemes), size, swiglu, overlap, prefetch)
        return self._kernel(fitting[choose(per_expert, n, k, num_rows, self.gpu, among=tuple(fitting))])

    def kernel(
        self,
        config: KernelConfig,
        schemes: tuple[QuantScheme, ...],
        max_experts: int = 256,
        *,
        swiglu: bool = False,
        overlap: bool = False,
        prefetch: bool = False,
    ) -> Kernel:
        """A certain kernel. UnsupportedError if the bundle lacks it, or the gate refuses what was compiled, with its
        reasons; SpecError for what no kernel can be.
        """
        try:
            spec = KernelSpec(
                config=config,
                schemes=schemes,
                arch=self.gpu.arch,
                max_experts=max_experts,
                swiglu=swiglu,
                overlap=overlap,
                prefetch=prefetch,
            )
        except ValueError as error:
            raise SpecError(f"kernel: {error}") from None
        return self._kernel(_by_name(spec))

    def _kernel(self, spec: KernelSpec) -> Kernel:
        if spec not in self._loaded:
            _require_no_capture(spec.label)
            self._loaded[spec] = self._bundled(spec) if self.bundle is not None else self._compiled(spec)
        return self._loaded[spec]

    def _fitting(
        self, schemes: frozenset[QuantScheme], size: int, swiglu: bool, overlap: bool, prefetch: bool
    ) -> dict[KernelConfig, KernelSpec]:
        """The bundle's kernels that run these schemes in one launch, by configuration; of two the one with fewer slots
        and a smaller table.
        """
        assert self.bundle is not None
        key = (schemes, size, swiglu, overlap, prefetch)
        if key not in self._fitting_of:
            specs = [built.spec for built in self.bundle.kernels]
            fits = [
                spec
                for spec in specs
                if schemes <= set(spec.schemes)
                and size <= spec.max_experts
                and (spec.swiglu, spec.overlap, spec.prefetch) == (swiglu, overlap, prefetch)
            ]
            if not fits:
                kernels = sorted({"+".join(scheme.name for scheme in spec.schemes) for spec in specs})
                wanted = "+".join(sorted(scheme.name for scheme in schemes))
                wanted += "/swiglu" * swiglu + "/overlap" * overlap + "/prefetch" * prefetch
                raise SpecError(
                    f"experts: expected schemes that a kernel of the bundle {self.bundle.path} has "
                    f"({', '.join(kernels)}), got {wanted} with a table of {size} experts"
                )
            fits.sort(key=lambda spec: (len(spec.schemes), spec.max_experts), reverse=True)
            self._fitting_of[key] = {spec.config: spec for spec in fits}
        return self._fitting_of[key]

    @property
    def has_steps(self) -> bool:
        """Whether a layer's kernels around its GEMMs are here or can be compiled: not from a bundle alone."""
        return self.bundle is None or bool(self._steps)

    def step(self, spec: StepSpec) -> Callable[..., None]:
        """One of a layer's steps around its GEMMs. UnsupportedError from a bundle, which has none."""
        if spec not in self._steps:
            _require_no_capture(spec.label)
            if self.bundle is not None:
                raise UnsupportedError(spec.label, [f"the bundle {self.bundle.path} has GEMMs only"])
            self._steps[spec] = _load_step(spec)
        return self._steps[spec]

    def _bundled(self, spec: KernelSpec) -> Kernel:
        assert self.bundle is not None
        built = self._bundled_by_name.get(_by_name(spec))
        if built is None:
            refused = [reason for item in self.bundle.refused if item.spec == spec for reason in item.reasons]
            raise UnsupportedError(spec.label, refused or [f"the bundle {self.bundle.path} lacks it"])
        return Kernel(built.spec, self.bundle.function(built), built.facts.ctas_per_sm)

    def _compiled(self, spec: KernelSpec) -> Kernel:
        if spec in self._refused:
            raise UnsupportedError(spec.label, self._refused[spec])
        from kernel_gen.compiler import load_gated

        try:
            function, facts = load_gated(spec, self.gpu)
        except UnsupportedError as error:
            self._refused[spec] = error.reasons
            raise
        return Kernel(spec, function, facts.ctas_per_sm)

    @functools.cached_property
    def _bundled_by_name(self) -> dict[KernelSpec, BundledKernel]:
        assert self.bundle is not None
        return {_by_name(built.spec): built for built in reversed(self.bundle.kernels)}  # of two alike, the first


def _by_name(spec: KernelSpec) -> KernelSpec:
    """The kernel with its slots in the order of their names, whatever order they were asked for in."""
    return dataclasses.replace(spec, schemes=tuple(sorted(spec.schemes, key=lambda scheme: scheme.name)))


def _load_step(spec: StepSpec) -> Callable[..., None]:
    from kernel_gen.compiler import load_in_process

    return load_in_process(spec)


def _require_no_capture(label: str) -> None:
    if torch.cuda.is_current_stream_capturing():
        raise SpecError(f"{label} is not loaded, and a graph capture cannot load it: run the launch once before")


@functools.cache
def library_of(device_index: int) -> KernelLibrary:
    """The library of one of torch's CUDA devices, which compiles in process. UnsupportedError for a GPU that is not
    described: a library of one like it (`KernelLibrary(gpu)`) launches there, by the other's latency model.
    """
    properties = torch.cuda.get_device_properties(device_index)
    capability = (properties.major, properties.minor)
    for gpu in GPUS.values():
        if gpu.is_called(properties.name, capability):
            return KernelLibrary(gpu)
    alike = ", ".join(gpu.name for gpu in GPUS.values() if gpu.compute_capability == capability) or "none"
    raise UnsupportedError(
        f"kernels for {properties.name}",
        [f"it is not described; of its compute capability {capability}: {alike}; pass a KernelLibrary of the nearest"],
    )
