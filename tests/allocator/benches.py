"""A bench without a GPU and without processes: made-up latencies, and wrong values where a test wants them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

from kernel_gen.sweeping.builds import Built
from kernel_gen.sweeping.candidates import Candidate, Measurement
from profiles.records import Status


def made_up_us(candidate: Candidate) -> float:
    """By bits of weights, tokens and tile: another for every configuration."""
    schemes = candidate.workload.schemes
    bits = sum(scheme.weight_bits for scheme in schemes) * (candidate.workload.num_experts // len(schemes))
    tile = candidate.config.tile
    return bits * (1.0 + candidate.load.total / 1000) + tile.n / 64 + tile.m / 1000 + candidate.config.num_stages / 1e4


class MadeUpBench:
    def __init__(self, wrong: Callable[[Candidate], bool] = lambda _: False) -> None:
        self.wrong, self.measured = wrong, list[Candidate]()

    def build(self, candidates: Sequence[Candidate], *, live: bool) -> None:
        pass

    def find(self, candidate: Candidate) -> Built:
        return Built(fingerprint="none")

    def pool(self) -> "nullcontext[MadeUpBench]":
        return nullcontext(self)

    def run(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Measurement]]:
        for one in candidates:
            self.measured.append(one)
            us = made_up_us(one)
            good = Measurement(status=Status.OK, latency_us=us, p20_us=us, p80_us=us, num_samples=20)
            yield one, Measurement.failed(Status.WRONG, "3 values differ") if self.wrong(one) else good
