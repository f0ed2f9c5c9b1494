"""The one module that reads clocks: the host's, for time limits and progress, and the GPU's, for latencies.

How a latency is taken (:func:`time_launches`):

* The launch is captured in a CUDA graph once per set of weights, the sets in turn, so that by the time a set comes
  round again the others have pushed it out of L2: weights always come from DRAM, as they do in a model with more than
  one layer. Activations are small and stay where the launch before left them, as in a model.
* A sample is one replay of that graph divided by the launches in it, between two CUDA events; a graph holds enough
  launches that a replay takes at least :data:`MIN_REPLAY_US`, so that the events' resolution (0.5 us) is below 0.1 %.
* Samples are taken in batches. Between batches a fixed bf16 GEMM runs; its median over what it took when the GPU was
  calm is recorded as ``reference_ratio``: above 1, the clocks fell (heat, power cap) while this candidate was timed.
* Sampling stops by rule, not by hope: see :class:`SampleRule`.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MIN_REPLAY_US = 400.0
MAX_LAUNCHES_PER_GRAPH = 128
CALM_RATIO, CALM_WAIT_S, CALM_STEP_S = 1.03, 0.06, 0.004
"""A candidate waits, at most so long, until the reference GEMM takes no longer than this times what it takes on the
calm GPU: the power cap lowers the clock for some milliseconds after a launch that needed much.
"""
FLUSH_BYTES = 256 << 20
"""Read between launches that are timed one by one: more than any GPU's L2 holds. Written instead, it leaves L2 full of
lines to write back while the launch reads; launches alone then took 10 us longer than in a row (109 us against 99 on an
H200, 2026-11-24), which the cost of a replay does not explain.
"""
_REFERENCE_SIZE = (
    4096  # a bf16 GEMM of this side: 0.2 ms on an H200, 0.9 ms on an RTX 4090; long enough to feel the power cap
)


def monotonic_s() -> float:
    """The host's monotonic clock, seconds: time limits and progress read this."""
    return time.monotonic()


def utc_now() -> datetime:
    """The time of day, UTC, to the second: the time stamp of a record."""
    return datetime.now(UTC).replace(microsecond=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRule:
    """When there are enough samples: at least `min_samples`, then until the standard error of the median is at most
    `target` of it, or `max_samples`.

    The standard error of a median is 1.2533 sigma / sqrt(n) for a normal distribution (Kenney and Keeping, Mathematics
    of Statistics, 1951), and sigma is read off the 20th and 80th percentiles, 1.683 sigma apart, so that a few
    disturbed samples do not prolong the run.
    """

    min_samples: int = 20
    max_samples: int = 200
    batch: int = 10
    target: float = 0.005

    def enough(self, samples_us: Sequence[float]) -> bool:
        """Whether `samples_us` (microseconds, any order) suffice."""
        if len(samples_us) < self.min_samples:
            return False
        if len(samples_us) >= self.max_samples:
            return True
        p20, median, p80 = percentiles_us(samples_us)
        return 1.2533 * (p80 - p20) / 1.683 / math.sqrt(len(samples_us)) <= self.target * median


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One launch's latency, microseconds, over `num_samples` samples, with the SM clock seen meanwhile and the
    reference's slowdown.
    """

    median_us: float
    p20_us: float
    p80_us: float
    num_samples: int
    sm_clock_mhz: float
    reference_ratio: float


def percentiles_us(samples_us: Sequence[float]) -> tuple[float, float, float]:
    """(20th percentile, median, 80th percentile) of at least one sample; nearest rank, so that each is a value that
    occurred or a mean of two.
    """
    ordered = sorted(samples_us)
    last = len(ordered) - 1
    return ordered[round(0.2 * last)], statistics.median(ordered), ordered[round(0.8 * last)]


def launches_per_graph(launch_us: float, rotations: int) -> int:
    """How many launches one graph holds: whole turns of the weight sets, at least one, enough for
    :data:`MIN_REPLAY_US`.
    """
    wanted = min(MAX_LAUNCHES_PER_GRAPH, math.ceil(MIN_REPLAY_US / max(launch_us, 0.1)))
    return rotations * max(1, math.ceil(wanted / rotations))


class GpuClock:
    """The GPU's clocks, of torch's current device: event times, the SM clock through NVML, and the calm reference."""

    def __init__(self) -> None:
        import pynvml
        import torch

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        self._nvml = pynvml
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        self._reference, self._reference_tensors = _capture_reference()
        self._calm_reference_us = percentiles_us([self._replay_us(self._reference) for _ in range(20)][5:])[1]

    def sm_clock_mhz(self) -> float:
        """The SM clock at this moment, MHz. Read it while work is queued: an idle GPU lowers its clock."""
        return float(self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM))

    def time_launches(self, launches: Sequence[Callable[[], None]], rule: SampleRule) -> Timing:
        """The latency of `launches`, one callable per set of weights, each launching the same kernel on torch's current
        stream.

        Raises what torch raises when a launch fails (torch.AcceleratorError).
        """
        import torch

        first = torch.cuda.CUDAGraph()
        with torch.cuda.graph(first):
            for launch in launches:
                launch()
        self._replay_us(first)  # loads the kernel and warms the instruction cache
        rough_us = self._replay_us(first) / len(launches)
        count = launches_per_graph(rough_us, len(launches))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for index in range(count):
                launches[index % len(launches)]()
        self._replay_us(graph)
        samples: list[float] = []
        references: list[float] = []
        clocks: list[float] = []
        self._wait_until_calm()
        while not rule.enough(samples):
            references.append(self._replay_us(self._reference))
            batch_us, clock = self._batch(graph, rule.batch)
            samples += [sample / count for sample in batch_us]
            clocks.append(clock)
        p20, median, p80 = percentiles_us(samples)
        return Timing(
            median_us=median,
            p20_us=p20,
            p80_us=p80,
            num_samples=len(samples),
            sm_clock_mhz=statistics.median(clocks),
            reference_ratio=statistics.median(references) / self._calm_reference_us,
        )

    def time_single(self, launch: Callable[[], None], samples: int = 30) -> float:
        """The median time of a replay of one launch alone, microseconds, with everything pushed out of L2 before: what
        a benchmark reports that times launches one by one. Unlike :meth:`time_launches` it holds what a replay costs.
        """
        import torch

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        flush = torch.zeros(FLUSH_BYTES // 4, device="cuda")
        pairs = []
        for _ in range(samples):
            flush.sum()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            graph.replay()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return float(statistics.median(1e3 * begin.elapsed_time(end) for begin, end in pairs))

    def _wait_until_calm(self) -> None:
        """Let the power budget recover from the launches before, for a bounded time."""
        deadline = monotonic_s() + CALM_WAIT_S
        while self._replay_us(self._reference) > CALM_RATIO * self._calm_reference_us and monotonic_s() < deadline:
            time.sleep(CALM_STEP_S)

    def _batch(self, graph: torch.cuda.CUDAGraph, replays: int) -> tuple[list[float], float]:
        """`replays` replays queued at once, their times in microseconds, and the SM clock while they ran."""
        import torch

        events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]  # type: ignore[no-untyped-call]
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        clock = self.sm_clock_mhz()
        events[-1].synchronize()
        return [1e3 * a.elapsed_time(b) for a, b in itertools.pairwise(events)], clock

    def _replay_us(self, graph: torch.cuda.CUDAGraph) -> float:
        return self._batch(graph, 1)[0][0]


def _capture_reference() -> tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, ...]]:
    """The reference kernel as a graph (a bf16 GEMM by torch, none of ours, so that it outlasts our releases) and the
    tensors it must keep alive.
    """
    import torch

    a = torch.randn(_REFERENCE_SIZE, _REFERENCE_SIZE, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(a)
    torch.mm(a, a, out=out)  # the library picks its kernel before capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.mm(a, a, out=out)
    return graph, (a, out)
