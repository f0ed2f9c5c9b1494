"""Speed of building: compiling one kernel once the compiler is loaded, finding some in the cache, linking a bundle.

CPU time, but for the linker, which is another process.
"""

import itertools
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cutlass")

from kernel_gen.bundle import write_bundle
from kernel_gen.cache import KernelCache
from kernel_gen.compiler import Artifact, compile_kernel
from kernel_gen.kernels import KernelSpec
from kernel_gen.space import Effort, candidates
from profiles.gpus import gpu
from profiles.schemes import parse

GPU = gpu("rtx4090")
SINGLES = ("w16a16", "w4a16_g128_sym", "w3a16_g128_asym", "w8a8_g-1_sym", "w4a4_g128_sym")
MIXED = ("w4a16_g128_sym", "w8a8_g-1_sym")


def kernel_spec(names: tuple[str, ...]) -> KernelSpec:
    """The first legal configuration for these schemes, of the fixed order that a quick build takes."""
    schemes = tuple(parse(name) for name in names)
    return KernelSpec(config=candidates(schemes, GPU, Effort.QUICK)[0], schemes=schemes, arch=GPU.arch)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> list[Artifact]:
    folder = tmp_path_factory.mktemp("objects")
    return [compile_kernel(kernel_spec((name,)), folder) for name in SINGLES]


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("names", [*((name,) for name in SINGLES), MIXED], ids="+".join)
def test_compile_kernel(benchmark: Any, tmp_path: Path, names: tuple[str, ...]) -> None:
    spec = kernel_spec(names)
    artifact = benchmark.pedantic(compile_kernel, args=(spec, tmp_path), rounds=5, warmup_rounds=1)
    benchmark.extra_info["kernel"] = f"{spec.label} {spec.fingerprint()}"
    benchmark.extra_info["registers_per_thread"] = artifact.facts(GPU).registers_per_thread


@pytest.mark.benchmark(timer=time.process_time)
def test_find_in_cache(benchmark: Any, tmp_path: Path, artifacts: list[Artifact]) -> None:
    cache = KernelCache(root=tmp_path)
    with cache.scratch_dir():
        stored = [cache.put(artifact).spec for artifact in artifacts]
    found = benchmark.pedantic(lambda: [cache.get(spec) for spec in stored], rounds=31, warmup_rounds=1)
    assert None not in found


def test_link_bundle(benchmark: Any, tmp_path: Path, artifacts: list[Artifact]) -> None:
    benchmark.extra_info["kernels"] = len(artifacts)

    folders = (tmp_path / str(number) for number in itertools.count())

    def fresh_folder() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (next(folders), GPU, artifacts, []), {}

    benchmark.pedantic(write_bundle, setup=fresh_folder, rounds=5, warmup_rounds=1)
