"""Kernels that are built while workers run: found when they are wanted, each compiled once."""

from pathlib import Path

import pytest

from kernel_gen.bundle import load_bundle, write_bundle
from kernel_gen.cache import KernelCache
from kernel_gen.compiler import Artifact
from kernel_gen.kernels import KernelSpec
from kernel_gen.sweeping.candidates import Candidate, Workload
from kernel_gen.sweeping.measuring import GpuBench
from kernel_gen.sweeping.shelf import Shelf
from profiles.errors import SpecError, UserError
from profiles.loads import TokenLoad
from tests.kernel_gen.build.specs import OTHER, RTX4090, SMALL, SPILLING


def candidate(spec: KernelSpec) -> Candidate:
    work = Workload(model="m", linear="down", num_experts=2, n=64, k=128, schemes=spec.schemes, label=str(spec.label))
    return Candidate(workload=work, load=TokenLoad(tokens_per_expert=(1, 2), source="test"), config=spec.config)


def test_a_shelf_finds_what_came_later(small: Artifact, other: Artifact, tmp_path: Path) -> None:
    write_bundle(tmp_path / "0000", RTX4090, [small], [])
    (tmp_path / "0001").mkdir()  # being written: it has no manifest yet
    shelf = Shelf(tmp_path)
    assert shelf.find(candidate(SMALL))[1].spec == SMALL
    with pytest.raises(SpecError, match="has no kernel mma_64x8"):
        shelf.find(candidate(OTHER))
    write_bundle(tmp_path / "0001", RTX4090, [other], [])
    bundle, kernel = shelf.find(candidate(OTHER))
    assert kernel.spec == OTHER
    assert bundle.path == tmp_path / "0001"
    assert shelf.find(candidate(SMALL))[0].path == tmp_path / "0000"
    alone = Shelf(tmp_path / "0000")
    assert alone.find(candidate(SMALL))[1].spec == SMALL


def test_a_bench_builds_each_kernel_once(
    shared_cache: KernelCache, small: Artifact, other: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITILE_CACHE", str(shared_cache.root))
    first, second, third = candidate(SMALL), candidate(OTHER), candidate(SPILLING)
    with GpuBench(RTX4090, [], None, 30.0) as bench:
        with pytest.raises(UserError, match="no kernel passed the gate"):
            bench.build([third], live=False)
        assert bench.find(first) is None
        bench.build([first], live=False)
        root = bench.bundle.path.parent
        found = bench.find(first)
        assert found is not None
        assert found.facts is not None
        assert found.fingerprint == first.spec(RTX4090).fingerprint()
        bench.build([first], live=False)
        assert len(list(root.iterdir())) == 1
        bench.build([first, second, third], live=False)
        assert len(list(root.iterdir())) == 2
        assert [kernel.spec for kernel in bench.bundle.kernels] == [OTHER]
        refused = bench.find(third)
        assert refused is not None
        assert "spills" in str(refused.failure and refused.failure.error)
    assert not root.exists()


def test_a_bundle_that_was_given_is_all_there_is(small: Artifact, tmp_path: Path) -> None:
    given = write_bundle(tmp_path / "bundle", RTX4090, [small], [])
    with GpuBench(RTX4090, [], load_bundle(given.path), 30.0) as bench:
        bench.build([candidate(OTHER)], live=False)
        assert bench.find(candidate(OTHER)) is None
        assert bench.find(candidate(SMALL)) is not None
        assert bench.bundle.path == given.path
