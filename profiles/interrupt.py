"""Ctrl-C in a command of this project: exit code 130 and one word at most, never a traceback.

A command's first second goes by in imports, where no `try` of its own is reached and some libraries turn a
KeyboardInterrupt into another error. Nothing is begun by then, so that the process may simply end: each package's
`__init__`, which `python -m package.module` runs before anything else, calls `end_at_once`. The command itself begins
with `interruptible`, from which on a KeyboardInterrupt is raised as usual.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""


def end_at_once(package: str) -> None:
    """Until `interruptible`, let SIGINT end the process as it ends programs that know nothing of it.

    Does nothing but where a module of `package` was started by `python -m`: who imports the package decides for
    himself; nor where SIGINT is ignored, as shells have it for what they start in the background.
    """
    started = sys.argv[:1] == ["-m"] and package in {word.removeprefix("-m").split(".")[0] for word in sys.orig_argv}
    if started and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def interruptible(main: Callable[[], int]) -> int:
    """The command's exit code; INTERRUPTED with one word on stderr where it does not say more itself."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
