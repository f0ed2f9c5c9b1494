from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("torch")

import torch

from allocator.calibration.model import StreamedModel
from tests.allocator.calibration import tiny


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint of every architecture with an adapter."""
    root = tmp_path_factory.mktemp("models")
    return {name: tiny.save(config, root / name) for name, config in tiny.CONFIGS.items()}


@pytest.fixture
def qwen(checkpoints: dict[str, Path]) -> StreamedModel:
    """Two MoE layers after a dense one, with a gated shared expert."""
    return StreamedModel(checkpoints["qwen2_moe"])


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """[8, 32] token ids."""
    return torch.from_numpy(tiny.token_ids(256)).view(8, 32)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny tensors gain nothing from threads, and lose much on a busy machine."""
    torch.set_num_threads(1)
