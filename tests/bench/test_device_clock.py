"""The clock that feeds device times to pytest-benchmark."""

import time

import pytest

from bench.device_clock import DeviceClock, Replay


def test_the_clock_stands_still_while_the_host_works() -> None:
    clock = DeviceClock()
    before = clock()
    time.sleep(0.01)
    assert clock() == before


def test_a_replay_passes_one_sample_a_round() -> None:
    clock = DeviceClock()
    replay = Replay(clock, [12.0, 15.0])
    times_s = []
    for _ in range(2):
        before = clock()
        replay()
        times_s.append(clock() - before)
    assert times_s == pytest.approx([12e-6, 15e-6])


@pytest.mark.parametrize("microseconds", [0.0, -1.0, float("nan")])
def test_no_sample_takes_no_time(microseconds: float) -> None:
    with pytest.raises(ValueError, match="us of device time"):
        DeviceClock().add_us(microseconds)
