"""The work of a sweep over several machines, through Ray. Only the command that was started writes the profile.

Every machine of the cluster has this package installed, with the extras that the work needs (`compile` to predict with
real build facts, `torch` to measure). Bundles travel with the work, so no shared file system is needed.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from kernel_gen.build import silent
from kernel_gen.bundle import MANIFEST_NAME
from kernel_gen.sweeping.builds import can_compile, compiled
from kernel_gen.sweeping.candidates import Candidate, Measurement
from kernel_gen.sweeping.detect import describe, installed_gpus, matching_gpus
from kernel_gen.sweeping.isolation import DeviceFactory, WorkerError, WorkerPool, WorkQueue
from kernel_gen.sweeping.measuring import CudaFactory, GpuBench
from kernel_gen.sweeping.plan import Cell, SweepRequest
from kernel_gen.sweeping.predict import by_kernel, predict, wanted_builds
from profiles import gpus
from profiles.errors import SpecError, UserError
from profiles.records import ProfileRecord, Status

PROBE_S = 5.0
"""A head node that does not accept a connection in this time is not there."""


class FactoryMaker(Protocol):
    """Finds the device of one actor, on the actor's machine; pickled to get there."""

    def __call__(self, bundle: Path) -> DeviceFactory:
        """The factory of a device for the kernels in `bundle`. UserError when this machine has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaMaker:
    """The one GPU that Ray shows to an actor."""

    gpu_name: str

    def __call__(self, bundle: Path) -> DeviceFactory:
        """UserError when it is another GPU."""
        installed = installed_gpus()
        found = matching_gpus(gpus.gpu(self.gpu_name), installed)
        if not found:
            raise SpecError(f"{os.uname().nodename} has {describe(installed)}, not {self.gpu_name}")
        return CudaFactory(uuid=found[0].uuid, driver=found[0].driver, bundles=bundle)


def connect(address: str) -> Any:
    """Join the cluster at `address` and give the ray module. UserError without Ray, or when no cluster answers."""
    if importlib.util.find_spec("ray") is None:
        raise UserError("--ray needs Ray, which is not installed: pip install 'bitile[ray]'")
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # Ray's new rule for workers without GPUs, chosen so that it does not warn
    import ray

    if not ray.is_initialized():
        _probe(address)
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"no Ray cluster answers at {address} ({reason}): start one with ray start --head"
            ) from None
    return ray


def _probe(address: str) -> None:
    """UserError unless something listens at `address`: Ray itself would go on trying for minutes."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise SpecError(f"--ray {address!r}: it is auto, HOST:PORT or ray://HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=PROBE_S).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"no Ray cluster answers at {address} ({reason}): start one with ray start --head") from None


def num_gpus(address: str) -> int:
    """GPUs of the whole cluster."""
    return int(connect(address).cluster_resources().get("GPU", 0))


def predict_on(address: str, request: SweepRequest, cells: Sequence[Cell]) -> Iterator[ProfileRecord]:
    """Rows of `kernel_gen.sweeping.predict.predict`, made by as many tasks as the cluster has CPUs, as they finish."""
    ray = connect(address)
    num_tasks = max(1, int(ray.cluster_resources().get("CPU", 1)))
    groups = by_kernel(cells)
    shares = [
        [cell for group in groups[start::num_tasks] for cell in group] for start in range(min(num_tasks, len(groups)))
    ]
    task = ray.remote(num_cpus=1, max_retries=2)(_predict_share)
    pending = [task.remote(request, share) for share in shares]
    while pending:
        done, pending = ray.wait(pending)
        yield from ray.get(done[0])


def _predict_share(request: SweepRequest, cells: Sequence[Cell]) -> list[ProfileRecord]:
    """On a machine of the cluster, with one CPU."""
    wanted = wanted_builds(request, cells) if can_compile() else []
    return list(predict(request, cells, compiled(wanted, request.gpu, silent, jobs=1)))


class Actor:
    """One worker process and its parent on a machine of the cluster, isolated as on one machine."""

    def __init__(self, maker: FactoryMaker, files: Mapping[str, bytes], limit_s: float) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bitile-sweep-")
        for name, content in files.items():
            Path(self._folder.name, name).write_bytes(content)
        self._maker, self._limit_s = maker, limit_s
        self._pool: WorkerPool | None = None

    def open(self) -> str | None:
        """None when the device is here, else why not."""
        try:
            self._pool = WorkerPool([self._maker(Path(self._folder.name))], limit_s=self._limit_s)
        except UserError as error:
            return str(error)
        return None

    def measure(self, candidate: Candidate) -> Measurement:
        """One candidate. WorkerError on a programming error."""
        assert self._pool is not None  # open comes first
        return next(self._pool.run([candidate]))[1]


class ClusterPool:
    """A pool of actors, each with `resources` of the cluster. A context manager: leaving it ends them."""

    def __init__(
        self,
        address: str,
        maker: FactoryMaker,
        files: Mapping[str, bytes],
        *,
        limit_s: float,
        num_actors: int,
        resources: Mapping[str, float],
        on_refusal: Callable[[str], None],
    ) -> None:
        self._ray = connect(address)
        make = self._ray.remote(**resources)(Actor)
        content = self._ray.put(dict(files))
        self._actors = [make.remote(maker, content, limit_s) for _ in range(num_actors)]
        self._on_refusal = on_refusal

    def __enter__(self) -> Self:
        reasons = self._ray.get([actor.open.remote() for actor in self._actors])
        for reason in reasons:
            if reason is not None:
                self._on_refusal(reason)
        self._actors = [actor for actor, reason in zip(self._actors, reasons, strict=True) if reason is None]
        if not self._actors:
            raise SpecError(
                f"no machine of the Ray cluster can measure this: {'; '.join(sorted(set(filter(None, reasons))))}"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for actor in self._actors:
            self._ray.kill(actor)

    def run(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Measurement]]:
        """As WorkerPool.run. An actor whose machine is lost costs its candidate; WorkerError when none is left."""
        queue = WorkQueue(candidates, len(self._actors))
        alive = dict(enumerate(self._actors))
        in_flight: dict[Any, tuple[int, Candidate]] = {}
        while True:
            busy = {index for index, _ in in_flight.values()}
            for index in alive.keys() - busy:
                candidate = queue.next_for(index)
                if candidate is not None:
                    in_flight[alive[index].measure.remote(candidate)] = index, candidate
            if not in_flight:
                break
            (done,), _ = self._ray.wait(list(in_flight))
            index, candidate = in_flight.pop(done)
            try:
                outcome = self._ray.get(done)
            except self._ray.exceptions.RayTaskError as error:
                raise WorkerError(str(error)) from None
            except self._ray.exceptions.RayActorError as error:
                del alive[index]
                queue.give_up(index)
                outcome = Measurement.failed(Status.CRASHED, f"its machine was lost: {str(error).splitlines()[0]}")
            yield candidate, outcome
        if queue:
            raise WorkerError("every machine of the Ray cluster was lost")


class ClusterBench(GpuBench):
    """The GPUs of a Ray cluster; kernels are built here unless a bundle was given."""

    def __init__(self, address: str, request: SweepRequest, on_refusal: Callable[[str], None]) -> None:
        super().__init__(request.gpu, (), request.bundle, request.limit_s)
        self._address, self._request, self._on_refusal = address, request, on_refusal

    def pool(self) -> ClusterPool:  # type: ignore[override]  # both are pools; a bench promises no more
        """One actor per GPU of the cluster."""
        libraries = {kernel.library for kernel in self.bundle.kernels}
        files = {path.name: path.read_bytes() for path in (self.bundle.path / MANIFEST_NAME, *libraries)}
        return ClusterPool(
            self._address,
            CudaMaker(gpu_name=self._request.gpu.name),
            files,
            limit_s=self._request.limit_s,
            num_actors=num_gpus(self._address),
            resources={"num_gpus": 1},
            on_refusal=self._on_refusal,
        )
