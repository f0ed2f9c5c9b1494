"""Progress on stderr: a live bar with the time left on a terminal, a plain line now and then elsewhere. Nothing here
writes to stdout.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kernel_gen.timing import monotonic_s

PLAIN_INTERVAL_S = 10.0


class Phase(Protocol):
    """One phase of a sweep, such as compiling; tell it of every step done."""

    def step(self, note: str = "") -> None:
        """One more of the phase's steps is done; `note` says which."""


@contextmanager
def phase(title: str, total: int, *, live: bool, stream: TextIO | None = None) -> Iterator[Phase]:
    """A phase of `total` steps. `live` asks for the bar; where the stream is no terminal, or `live` is false, plain
    lines come instead.
    """
    out = stream or sys.stderr
    if live and out.isatty():
        with _bar(out) as progress:
            yield _Bar(progress, title, total)
    else:
        yield _Lines(out, title, total)


def _bar(out: TextIO) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        console=Console(file=out),
        transient=True,
    )


class _Bar:
    def __init__(self, progress: Progress, title: str, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=total, note="")

    def step(self, note: str = "") -> None:
        self._progress.update(self._task, advance=1, note=note)


class _Lines:
    def __init__(self, out: TextIO, title: str, total: int) -> None:
        self._out, self._title, self._total = out, title, total
        self._done = 0
        self._start_s = self._last_s = monotonic_s()

    def step(self, note: str = "") -> None:
        self._done += 1
        now_s = monotonic_s()
        finished = self._done == self._total
        if finished and now_s - self._start_s < 1.0:
            return  # a phase that took no time needs no line
        if finished or now_s - self._last_s >= PLAIN_INTERVAL_S:
            self._last_s = now_s
            elapsed_s = now_s - self._start_s
            left_s = elapsed_s / self._done * (self._total - self._done)
            tail = f" ({note})" if note and not finished else ""
            print(
                f"{self._title}: {self._done}/{self._total}, {elapsed_s:.0f} s, {left_s:.0f} s left{tail}",
                file=self._out,
                flush=True,
            )
