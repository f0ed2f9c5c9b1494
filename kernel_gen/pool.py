"""Compiling many kernels at once: processes that are reused, that share the machine's memory, and of which one may die
without harm to the others.

Importing this needs nothing; compiling needs pebble and psutil, of the extra `compile`, as the compiler is.
A finished kernel is in the cache before its result is reported, so that an interrupted build loses only the kernels in
flight.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path

from kernel_gen.cache import KernelCache
from kernel_gen.compiler import Artifact, CompileError, compile_kernel
from kernel_gen.kernels import KernelSpec
from profiles.errors import DataError
from profiles.records import Status

BYTES_PER_COMPILE = 1_200_000_000
"""What a worker may take with its disassembler: four schemes on a 128x128 tile took 0.55 GB (2026-11-24)."""
COMPILE_LIMIT_S = 120.0
"""A kernel that compiles longer than this has hung: the slowest known take a few seconds."""
CGROUP = Path("/sys/fs/cgroup")
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A kernel that could not be compiled: the compiler refused it, or its worker died or hung."""

    spec: KernelSpec
    status: Status
    error: str


Outcome = Artifact | Failure


def num_workers(num_kernels: int, jobs: int | None = None) -> int:
    """Processes to compile with: no more than the cores this process may use, the free memory, the kernels, and `jobs`
    when it is given.
    """
    by_memory = int(_available_bytes() // BYTES_PER_COMPILE)
    return max(1, min(len(os.sched_getaffinity(0)), by_memory, num_kernels, *([jobs] if jobs else [])))


def compile_all(
    specs: Sequence[KernelSpec],
    cache: KernelCache,
    *,
    jobs: int | None = None,
    limit_s: float = COMPILE_LIMIT_S,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    work: Callable[[KernelSpec, KernelCache], Outcome] | None = None,
) -> list[Outcome]:
    """Compile every spec into the cache. `on_outcome` is called in this process as each is done; the list is in the
    order of `specs`.

    A worker that dies, or needs longer than `limit_s` for one kernel, costs that kernel. KeyboardInterrupt stops the
    workers at once, as does a cache that cannot be written, which is a DataError. `work` is what a worker does with a
    spec, `compile_into_cache` unless a test says otherwise; it must be importable.
    """
    if not specs:
        return []
    from pebble import ProcessPool

    cache.remove_leftovers()
    outcomes: dict[int, Outcome] = {}
    pool = ProcessPool(
        max_workers=num_workers(len(specs), jobs),
        context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(os.getpid(),),
    )
    try:
        pending: dict[Future[Outcome], int] = {
            pool.schedule(work or compile_into_cache, args=(spec, cache), timeout=limit_s): index
            for index, spec in enumerate(specs)
        }
        while pending:
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                index = pending.pop(future)
                outcomes[index] = _outcome(future, specs[index], cache, limit_s)
                on_outcome(outcomes[index])
    finally:
        pool.stop()  # type: ignore[no-untyped-call]
        pool.join()
    return [outcomes[index] for index in range(len(specs))]


def compile_into_cache(spec: KernelSpec, cache: KernelCache) -> Outcome:
    """What a worker does with one kernel."""
    try:
        with cache.scratch_dir() as scratch:
            return cache.put(compile_kernel(spec, Path(scratch)))
    except CompileError as error:
        return Failure(spec=spec, status=Status.COMPILE_ERROR, error=str(error))


def _outcome(future: Future[Outcome], spec: KernelSpec, cache: KernelCache, limit_s: float) -> Outcome:
    from pebble import ProcessExpired

    try:
        return future.result()
    except ProcessExpired as error:
        return Failure(
            spec=spec, status=Status.CRASHED, error=f"the compiler's process ended with code {error.exitcode}"
        )
    except TimeoutError:
        return Failure(spec=spec, status=Status.TIMEOUT, error=f"not compiled within {limit_s:g} s")
    except FileNotFoundError:  # a program that is missing, not a disk
        raise
    except OSError as error:
        raise DataError(
            f"{cache.root}: the kernel cache cannot be written ({error.strerror or error}); finished kernels are kept; "
            "set BITILE_CACHE to a folder that can"
        ) from error


def _start_worker(parent: int) -> None:
    """In a new worker: end at once when asked to, even inside the compiler, and end when the build does, however it
    ends.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _available_bytes() -> int:
    """Memory that new processes may take: the machine's or, in a container with a limit (cgroup v2), what that leaves,
    file cache not counted.
    """
    import psutil

    available: int = psutil.virtual_memory().available
    limit = CGROUP / "memory.max"
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        used = int((CGROUP / "memory.current").read_text()) - int(stat["inactive_file"])
        available = min(available, int(text) - used)
    return available
