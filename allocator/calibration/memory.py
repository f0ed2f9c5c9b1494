"""A GPU's memory that does not suffice, said in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from profiles.errors import UserError

A = TypeVar("A")
R = TypeVar("R")


def within_memory(work: Callable[[A], R], argument: A) -> R:
    """What the work gives. UserError when the GPU has no memory for it."""
    try:
        return work(argument)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU's memory does not suffice ({str(error).splitlines()[0]}) give fewer sequences at once with"
            " --batch-size, fewer or shorter ones with --num-sequences and --sequence-length, or --device cpu"
        ) from error
