"""A timer for pytest-benchmark that shows device time.

pytest-benchmark reads its timer before and after the function it times, on the host. A launch returns before the GPU
has run it, and waiting for it would time the host and the bus too. This clock stands still but for what is added to
it: the function that is timed adds the device time of one sample, so that the difference which pytest-benchmark sees
is that sample.
"""


class DeviceClock:
    """A timer, in seconds, that only `add_us` moves."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def __call__(self) -> float:
        """Return the device seconds added so far."""
        return self._now_s

    def add_us(self, microseconds: float) -> None:
        """Let this much device time pass. ValueError for a time that is not positive."""
        if not microseconds > 0:
            raise ValueError(f"a sample took {microseconds} us of device time")
        self._now_s += 1e-6 * microseconds
