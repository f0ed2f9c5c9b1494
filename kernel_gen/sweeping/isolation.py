"""Candidates run in worker processes, so that one that hangs, crashes or corrupts its CUDA context costs a process, not
the sweep.

One persistent worker per GPU, started by spawn (a CUDA context does not survive fork), fed one candidate at a time over
a pipe. The parent is one thread that waits for messages, for deaths and for deadlines; it kills and restarts. A worker
that loses its parent ends by itself.
"""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Protocol

from kernel_gen.sweeping.candidates import Candidate, Measurement
from kernel_gen.timing import monotonic_s
from profiles.records import Status

START_LIMIT_S = 180.0
"""Importing torch, opening CUDA and timing the calm reference: seconds on a good disk, a minute or more on a cold
network one.
"""
PREPARE_FACTOR = 10.0
"""Making a workload's inputs may take this many times the limit of a candidate: a large model's weights are quantised
there.
"""


class Device(Protocol):
    """What a worker drives: a GPU, or in tests something that misbehaves on purpose."""

    def prepare(self, candidate: Candidate) -> None:
        """Make ready what every candidate of `candidate.workload` shares; cheap when it is ready already."""

    def measure(self, candidate: Candidate) -> Measurement:
        """Run one candidate. Failures of the candidate are returned; an exception is a programming error and ends the
        sweep.
        """


class DeviceFactory(Protocol):
    """Opens a device inside the worker; pickled to get there."""

    def __call__(self) -> Device:
        """The device, ready to prepare and measure."""


@dataclass(frozen=True, slots=True)
class _Ready:
    pass


@dataclass(frozen=True, slots=True)
class _Prepared:
    pass


@dataclass(frozen=True, slots=True)
class _Broken:
    """A programming error in the worker, as text."""

    text: str


class WorkerError(RuntimeError):
    """A worker met a programming error, or cannot start; the message holds its traceback."""


def serve(connection: Connection, factory: DeviceFactory) -> None:
    """A worker's life: open the device, then answer candidates until the pipe closes or a measurement says that the
    context is lost.
    """
    # Ctrl-C reaches the whole terminal group; the parent decides what ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        device = factory()
        connection.send(_Ready())
        while True:
            candidate = connection.recv()
            device.prepare(candidate)
            connection.send(_Prepared())
            measurement = device.measure(candidate)
            connection.send(measurement)
            if measurement.context_lost:
                os._exit(0)  # destructors of a corrupt context can hang
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except BaseException:  # noqa: BLE001 - handed to the parent, which raises it
        connection.send(_Broken(traceback.format_exc()))


def _die_with_parent() -> None:
    parent = mp.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


class _Worker:
    """One worker process and what it is doing."""

    def __init__(self, factory: DeviceFactory, limit_s: float) -> None:
        self._factory = factory
        self._limit_s = limit_s
        self.candidate: Candidate | None = None
        self.start()

    def start(self) -> None:
        context = mp.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self._factory), daemon=True)
        self._process.start()
        theirs.close()
        self.ready = False
        self.deadline_s = monotonic_s() + START_LIMIT_S

    def give(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self._begin(PREPARE_FACTOR * self._limit_s)
        with contextlib.suppress(BrokenPipeError):  # it died idle: `listen` will find the end of the pipe
            self.connection.send(candidate)

    def listen(self) -> Measurement | None:
        """Take one message, or notice death or a passed deadline. A measurement ends the candidate."""
        try:
            message = self.connection.recv() if self.connection.poll() else None
        except (EOFError, ConnectionResetError):
            return self._ended()
        match message:
            case _Broken(text=text):
                raise WorkerError(text)
            case _Ready():
                self.ready = True
            case _Prepared():
                self._begin(self._limit_s)
            case Measurement():
                if message.context_lost:
                    self.restart()
                self.candidate = None
                return message
        if monotonic_s() > self.deadline_s and (self.candidate is not None or not self.ready):
            return self._late()
        return None

    def restart(self) -> None:
        self.stop()
        self.start()

    def stop(self) -> None:
        """Kill the process; SIGKILL, since one that hangs in the driver answers nothing else."""
        self._process.kill()
        self._process.join()
        self.connection.close()

    def _begin(self, limit_s: float) -> None:
        self._phase_limit_s = limit_s
        self.deadline_s = monotonic_s() + limit_s

    def _ended(self) -> Measurement:
        self._process.join()
        code = self._process.exitcode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        if self.candidate is None:
            raise WorkerError(f"a worker process ended while starting or idle ({how})")
        self.candidate = None
        self.restart()
        return Measurement.failed(Status.CRASHED, f"the worker process ended: {how}")

    def _late(self) -> Measurement:
        if self.candidate is None:
            self.stop()
            raise WorkerError(f"a worker process did not start within {START_LIMIT_S:.0f} s")
        self.candidate = None
        self.restart()
        return Measurement.failed(Status.TIMEOUT, f"no answer within {self._phase_limit_s:g} s")


class WorkerPool:
    """One worker per device factory. Use as a context manager: leaving it kills the workers."""

    def __init__(self, factories: Sequence[DeviceFactory], *, limit_s: float) -> None:
        self._workers = [_Worker(factory, limit_s) for factory in factories]

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stop()

    def run(self, candidates: Iterable[Candidate]) -> Iterator[tuple[Candidate, Measurement]]:
        """Every candidate with its measurement, as they finish. A worker stays with one workload while it lasts, since
        preparing one is dear.

        Raises WorkerError on a programming error in a worker, or when one cannot start.
        """
        queue = WorkQueue(candidates, len(self._workers))
        while True:
            for index, worker in enumerate(self._workers):
                if worker.ready and worker.candidate is None:
                    candidate = queue.next_for(index)
                    if candidate is not None:
                        worker.give(candidate)
            if not queue and all(worker.candidate is None for worker in self._workers):
                return
            listening = [worker for worker in self._workers if worker.candidate is not None or not worker.ready]
            nearest = min(worker.deadline_s for worker in listening)
            wait([worker.connection for worker in listening], timeout=max(0.0, nearest - monotonic_s()) + 0.01)
            for worker in listening:
                given = worker.candidate
                measurement = worker.listen()
                if given is not None and measurement is not None:
                    yield given, measurement


class WorkQueue:
    """Candidates for several workers, by workload in the order given; a worker keeps to one while it lasts."""

    def __init__(self, candidates: Iterable[Candidate], num_workers: int) -> None:
        groups: dict[object, deque[Candidate]] = {}
        for candidate in candidates:
            groups.setdefault(candidate.workload, deque()).append(candidate)
        self._groups = deque(groups.values())
        self._current: list[deque[Candidate]] = [deque() for _ in range(num_workers)]

    def next_for(self, worker: int) -> Candidate | None:
        """The worker's next candidate; None when there is none left for it."""
        if not self._current[worker] and self._groups:
            self._current[worker] = self._groups.popleft()
        return self._current[worker].popleft() if self._current[worker] else None

    def give_up(self, worker: int) -> None:
        """Put back what a lost worker would have done."""
        if self._current[worker]:
            self._groups.append(self._current[worker])
            self._current[worker] = deque()

    def __bool__(self) -> bool:
        return bool(self._groups) or any(self._current)
