from pathlib import Path

import pytest

pytest.importorskip("cutlass", reason="compiling needs the extra 'compile'")

from kernel_gen.cache import KernelCache
from kernel_gen.compiler import Artifact
from kernel_gen.pool import compile_into_cache
from tests.kernel_gen.build.specs import OTHER, SMALL


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> KernelCache:
    """One cache for the whole run: a kernel that several tests need is compiled once. Tests only add to it."""
    return KernelCache(root=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def small(shared_cache: KernelCache) -> Artifact:
    """A small kernel that passes the gate."""
    return compiled(shared_cache, SMALL)


def compiled(cache: KernelCache, spec: object) -> Artifact:
    artifact = cache.get(spec) or compile_into_cache(spec, cache)
    assert isinstance(artifact, Artifact), artifact
    return artifact


@pytest.fixture
def copied_cache(shared_cache: KernelCache, small: Artifact, tmp_path: Path) -> KernelCache:
    """A cache of the test's own that has the small kernel."""
    cache = KernelCache(root=tmp_path / "cache")
    with cache.scratch_dir():
        cache.put(small)
    return cache


@pytest.fixture(scope="session")
def other(shared_cache: KernelCache) -> Artifact:
    """A second small kernel."""
    return compiled(shared_cache, OTHER)
