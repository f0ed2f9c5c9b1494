"""Options of the benches that are read alike."""

from __future__ import annotations

import argparse

from profiles.errors import SpecError


def whole_numbers(option: str, text: str) -> list[int]:
    """Of a list as in 16,512. SpecError names the option."""
    words = text.split(",")
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise SpecError(f"{option} {text}: expected whole numbers of at least 1, as in 16,512")
    return [int(word) for word in words]


def at_least_one(text: str) -> int:
    """One of them, as argparse takes it."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)
