"""What every test gets: the markers `gpu` and `slow`, and Hypothesis profiles.

A test marked `gpu` is skipped, saying so, where torch sees no CUDA GPU; one marked `slow` where neither `--slow` nor
`-m slow` was given.
`--gpu-report PATH` writes what the GPU tests reported: see `tests/gpu_report.py`.
"""

import importlib.util
import os
import re
import signal
from pathlib import Path

import hypothesis
import pytest

from tests.gpu_report import GpuReport, describe_device

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")
    parser.addoption("--gpu-report", type=Path, metavar="PATH", help="write what the GPU tests reported here")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell's background job ignores Ctrl-C, and so would every process a test starts and interrupts.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    path = config.getoption("gpu_report")
    if path is None:
        return
    if (reason := why_no_gpu()) is not None:
        raise pytest.UsageError(f"--gpu-report needs a GPU: {reason}")
    config.pluginmanager.register(GpuReport(path, describe_device()))


def why_no_gpu() -> str | None:
    """The reason that tests of a GPU cannot run here, or None where they can."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    expression = str(config.getoption("markexpr"))
    wants_slow = config.getoption("slow") or re.search(r"(?<!not )\bslow\b", expression) is not None
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    reason = why_no_gpu() if gpu_items else None
    for item in gpu_items:
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {reason}"))
    for item in items:
        if item.get_closest_marker("slow") and not wants_slow:
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
