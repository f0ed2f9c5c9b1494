"""The clock that feeds device times to pytest-benchmark."""

import time
from typing import Any

import pytest

from bench.device_clock import DeviceClock


def test_the_clock_stands_still_while_the_host_works() -> None:
    clock = DeviceClock()
    before = clock()
    time.sleep(0.01)
    assert clock() == before


CLOCK = DeviceClock()


@pytest.mark.benchmark(timer=CLOCK)
def test_pytest_benchmark_reports_what_was_fed_to_the_clock(benchmark: Any) -> None:
    samples_us = [12.0, 15.0, 12.5, 40.0, 12.5]
    fed = iter(samples_us)

    def launch() -> None:
        time.sleep(0.001)  # the host's time, 1000 us, must not show
        CLOCK.add_us(next(fed))

    benchmark.pedantic(launch, rounds=len(samples_us))
    assert benchmark.stats.stats.median == pytest.approx(12.5e-6)
    assert benchmark.stats.stats.max == pytest.approx(40e-6)


@pytest.mark.parametrize("microseconds", [0.0, -1.0, float("nan")])
def test_no_sample_takes_no_time(microseconds: float) -> None:
    with pytest.raises(ValueError, match="us of device time"):
        DeviceClock().add_us(microseconds)
