"""Formats are torch's: without it these tests cannot even be imported."""

import importlib.util

import pytest

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["test_*.py"]


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """These tensors are small: on a busy machine, torch's threads spend most of the time waiting for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
