"""Tiny checkpoints. Calibration is torch's and transformers': without them these tests cannot even be imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from allocator.calibration.model import StreamedModel

collect_ignore_glob = [] if all(map(importlib.util.find_spec, ("torch", "transformers"))) else ["test_*.py"]


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """These tensors are small: on a busy machine, torch's threads spend most of the time waiting for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint of every architecture with an adapter."""
    from tests.allocator.calibration import tiny

    root = tmp_path_factory.mktemp("models")
    return {name: tiny.save(config, root / name) for name, config in tiny.CONFIGS.items()}


@pytest.fixture
def qwen(checkpoints: dict[str, Path]) -> StreamedModel:
    """Two MoE layers after a dense one, with a gated shared expert."""
    from allocator.calibration.model import StreamedModel

    return StreamedModel(checkpoints["qwen2_moe"])


@pytest.fixture(scope="session")
def tokens() -> Tensor:
    """[8, 32] token ids."""
    import torch

    from tests.allocator.calibration import tiny

    return torch.from_numpy(tiny.token_ids(256)).view(8, 32)
