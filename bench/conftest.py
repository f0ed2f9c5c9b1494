"""What every suite gets: the kind of machine and the versions in the report, and a clock that shows device time."""

import importlib.metadata
from collections.abc import Iterator
from typing import Any

import pytest

from bench.machine import gpu_name, machine_kind

VERSIONS_OF = ("bitile", "numpy", "pandas", "torch", "nvidia-cutlass-dsl", "apache-tvm-ffi")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["kind"] = machine_kind()
    machine_info["versions"] = dict(versions())


def versions() -> Iterator[tuple[str, str]]:
    for name in VERSIONS_OF:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if gpu_name() is None:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU: torch sees none"))


@pytest.fixture
def keep_torch_on_one_thread() -> Iterator[None]:
    """One thread: its times do not depend on what else runs on the other cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
