import dataclasses
import os
from pathlib import Path

import pytest

from kernel_gen import pool
from kernel_gen.cache import KernelCache
from kernel_gen.compiler import Artifact
from kernel_gen.kernels import KernelSpec
from kernel_gen.pool import Failure, Outcome, compile_all, num_workers
from profiles.errors import DataError
from profiles.records import Status
from tests.kernel_gen.build import workers
from tests.kernel_gen.build.specs import REFUSED, SMALL


def spec(num_stages: int) -> KernelSpec:
    return dataclasses.replace(SMALL, config=dataclasses.replace(SMALL.config, num_stages=num_stages))


def test_a_worker_that_dies_or_hangs_costs_one_kernel(tmp_path: Path) -> None:
    specs = [spec(n) for n in (2, workers.DIES, 3, workers.IS_KILLED, 4, workers.HANGS, 5, 6)]
    seen: list[Outcome] = []
    cache = KernelCache(root=tmp_path)
    outcomes = compile_all(specs, cache, jobs=2, limit_s=3, on_outcome=seen.append, work=workers.finish)
    assert [outcome.spec for outcome in outcomes] == specs
    assert sorted(map(id, seen)) == sorted(map(id, outcomes))
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    assert [failure.status for failure in failures] == [Status.CRASHED, Status.CRASHED, Status.TIMEOUT]
    assert ["code 7" in failures[0].error, "3 s" in failures[2].error] == [True, True]


def test_workers_are_reused(tmp_path: Path) -> None:
    cache = KernelCache(root=tmp_path)
    outcomes = compile_all([spec(n) for n in range(2, 12)], cache, jobs=2, work=workers.finish)
    processes = {outcome.object_path.name for outcome in outcomes if isinstance(outcome, Artifact)}
    assert 1 <= len(processes) <= 2
    assert str(os.getpid()) not in processes


def test_bug_in_a_kernel_propagates(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="a bug in a kernel"):
        compile_all([spec(workers.IS_A_BUG)], KernelCache(root=tmp_path), work=workers.finish)


def test_full_disk_stops_the_build_and_says_where(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"^{tmp_path}: the kernel cache cannot be written .No space left on device.; "):
        compile_all([spec(workers.FULL_DISK), spec(2)], KernelCache(root=tmp_path), work=workers.finish)


def test_finished_kernels_are_in_the_cache_and_refusals_are_data(shared_cache: KernelCache, small: Artifact) -> None:
    found, refused = compile_all([SMALL, REFUSED], shared_cache, jobs=1)
    assert isinstance(found, Artifact)
    assert found.object_path == small.object_path
    assert isinstance(refused, Failure)
    assert refused.status is Status.COMPILE_ERROR
    assert shared_cache.get(REFUSED) is None


def test_nothing_to_compile_starts_nothing(tmp_path: Path) -> None:
    assert compile_all([], KernelCache(root=tmp_path / "absent")) == []
    assert not (tmp_path / "absent").exists()


def test_workers_fit_cores_memory_and_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(pool, "_available_bytes", lambda: 10 * pool.BYTES_PER_COMPILE)
    assert num_workers(100) == 10
    assert num_workers(100, jobs=3) == 3
    assert num_workers(2, jobs=3) == 2
    monkeypatch.setattr(pool, "_available_bytes", lambda: 1000)
    assert num_workers(100) == 1
    monkeypatch.setattr(pool, "_available_bytes", lambda: 100 * pool.BYTES_PER_COMPILE)
    assert num_workers(100) == 16


def test_memory_limit_of_a_container_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    free = pool._available_bytes()
    monkeypatch.setattr(pool, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert pool._available_bytes() > free // 2
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("2500\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 1500\n")
    assert pool._available_bytes() == 2000
