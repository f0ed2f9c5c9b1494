"""A bench without a GPU: the sweep's command over devices that replay made-up latencies and misbehave where told to.

`python -m tests.kernel_gen.sweep.replay FOLDER [BEHAVIOUR] -- ARGUMENTS` runs the real command. BEHAVIOUR is JSON,
{"3": "hang"}: what the third candidate that starts does. Every candidate that starts adds a line to FOLDER/started,
every one that finishes to FOLDER/finished. With REPLAY_RAY in the environment the devices are a Ray cluster's.
"""

import ctypes
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kernel_gen.sweep import main
from kernel_gen.sweeping.builds import Built
from kernel_gen.sweeping.candidates import Candidate, Measurement
from kernel_gen.sweeping.cluster import ClusterPool
from kernel_gen.sweeping.isolation import WorkerPool
from profiles.errors import DataError
from profiles.gpus import gpu
from profiles.records import Status

HOURS_S = 3600.0
SLOW_S = 0.2


@dataclass(frozen=True)
class ReplayFactory:
    folder: Path
    behaviour: dict[str, str] = field(default_factory=dict)

    def __call__(self) -> "ReplayDevice":
        return ReplayDevice(self.folder, self.behaviour)


class ReplayDevice:
    def __init__(self, folder: Path, behaviour: dict[str, str]) -> None:
        self._folder, self._behaviour = folder, behaviour

    def prepare(self, candidate: Candidate) -> None:
        if "out of bounds" in self._behaviour.values():
            import kernel_gen.measure  # noqa: F401  # torch is slow to import; preparing may take ten times as long
        note(self._folder / "started", candidate)
        self._order = take_number(self._folder)

    def measure(self, candidate: Candidate) -> Measurement:
        outcome = self._act(self._behaviour.get(str(self._order), self._behaviour.get("*", "")), latency_us(candidate))
        note(self._folder / "finished", candidate)
        return outcome

    def _act(self, what: str, latency: float) -> Measurement:
        match what:
            case "hang":
                time.sleep(HOURS_S)
            case "exit":
                os._exit(7)
            case "lose machine":
                os.kill(os.getppid(), signal.SIGKILL)
            case "segfault":
                ctypes.string_at(0)
            case "lose context":
                return Measurement.failed(
                    Status.LAUNCH_ERROR, "CUDA error: an illegal memory access", context_lost=True
                )
            case "out of bounds":
                return Measurement.failed(Status.WRONG, write_out_of_bounds())
            case "bug":
                raise ValueError("a programming error")
            case "slow":
                time.sleep(SLOW_S)
        return Measurement(
            status=Status.OK,
            latency_us=latency,
            p20_us=0.98 * latency,
            p80_us=1.03 * latency,
            num_samples=20,
            sm_clock_mhz=1800.0,
            versions={"reference_ratio": "1.000", "worker": str(os.getpid())},
        )


def write_out_of_bounds() -> str:
    """What the real check says about a kernel that writes one element behind Y."""
    import torch

    from kernel_gen.formats import Expected
    from kernel_gen.measure import GUARD_ELEMENTS, GuardedOutput, verify

    output = GuardedOutput.make(4, 8, "cpu")
    expected = Expected(y=torch.ones(4, 8), tolerance=torch.zeros(4, 8))

    def launch() -> None:
        output.y.fill_(1.0)
        output.whole[GUARD_ELEMENTS + output.y.numel()] = 0

    return verify(launch, output, expected, lambda: None) or "the check saw nothing"


class ReplayBench:
    def __init__(self, folder: Path, behaviour: dict[str, str], *, gpus: int = 1, limit_s: float = 5.0) -> None:
        self._factories = [ReplayFactory(folder, behaviour)] * gpus
        self._limit_s = limit_s

    def build(self, candidates: Sequence[Candidate], *, live: bool) -> None:
        pass

    def find(self, candidate: Candidate) -> Built:
        return Built(fingerprint=candidate.spec(gpu("rtx4090")).fingerprint())

    def pool(self) -> WorkerPool | ClusterPool:
        if "REPLAY_RAY" not in os.environ:
            return WorkerPool(self._factories, limit_s=self._limit_s)
        return ClusterPool(
            os.environ["REPLAY_RAY"],
            ReplayMaker(self._factories[0]),
            {"manifest.json": b"{}"},
            limit_s=self._limit_s,
            num_actors=len(self._factories),
            resources={"num_cpus": 1},
            on_refusal=lambda reason: print(reason, file=sys.stderr),
        )


@dataclass(frozen=True)
class ReplayMaker:
    factory: ReplayFactory

    def __call__(self, bundle: Path) -> ReplayFactory:
        if (bundle / "manifest.json").read_bytes() != b"{}":
            raise DataError("the bundle did not travel")
        return self.factory


def latency_us(candidate: Candidate) -> float:
    """Made up, and another for every candidate: by bytes of weights and size of the tile."""
    bits = sum(scheme.weight_bits for scheme in candidate.workload.slots)
    return bits * (1.0 + candidate.load.total / 1000) + candidate.config.tile.n / 64 + candidate.config.tile.m / 1000


def take_number(folder: Path) -> int:
    """1 for the first who asks, 2 for the second, in whichever process."""
    for number in itertools.count(1):
        try:
            (folder / f"number{number}").touch(exist_ok=False)
        except FileExistsError:
            continue
        return number
    raise AssertionError


def note(path: Path, candidate: Candidate) -> None:
    with path.open("a") as file:
        file.write(
            f"{candidate.workload.linear} {candidate.workload.label} {candidate.load.total} {candidate.config.name}\n"
        )


def run(argv: Sequence[str]) -> int:
    split = argv.index("--")
    behaviour = json.loads(argv[1]) if split > 1 else {}
    bench = ReplayBench(Path(argv[0]), behaviour, gpus=int(os.environ.get("REPLAY_GPUS", "1")))
    return main(argv[split + 1 :], bench=bench)


if __name__ == "__main__":
    from tests.kernel_gen.sweep import replay  # its classes travel by this name, not as __main__'s

    sys.exit(replay.run(sys.argv[1:]))
