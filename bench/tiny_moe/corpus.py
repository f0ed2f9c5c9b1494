"""The Python standard library's sources as text: which files, split how, and a byte-level BPE tokenizer made of them.

A file's split follows from its name alone, so that it is the same for every Python that has the file.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from profiles.errors import DataError, SpecError

END_OF_TEXT = "<|endoftext|>"
SPLIT_BUCKETS = 20
TOKENIZER_BYTES = 8_000_000
"""Merges are learnt on this much of the training split."""

Ids = np.ndarray[tuple[int], np.dtype[np.uint16]]


class Split(Enum):
    """What a file is for."""

    TRAIN = "train"
    VALIDATION = "validation"  # chooses among the states of one training
    HELD_OUT = "held_out"  # is only ever measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Texts by split, one a file, in the order of their names."""

    texts: dict[Split, tuple[str, ...]]

    def num_bytes(self, split: Split) -> int:
        """UTF-8 bytes of a split."""
        return sum(len(text.encode()) for text in self.texts[split])


def split_of(name: str) -> Split:
    """The split of a file by its path within the library: 18 buckets of 20 train, one validates, one is held out."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % SPLIT_BUCKETS
    return {0: Split.HELD_OUT, 1: Split.VALIDATION}.get(bucket, Split.TRAIN)


def read_corpus(folder: Path | None = None, *, max_bytes: int | None = None) -> Corpus:
    """The `.py` files under `folder` (default: this Python's standard library) that are UTF-8, without third parties'.

    `max_bytes` ends each split at the file that reaches it.

    Raises:
        DataError: a split has no text, as of a folder without sources.
    """
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    texts: dict[Split, list[str]] = {split: [] for split in Split}
    sizes = dict.fromkeys(Split, 0)
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        split = split_of(name.as_posix())
        if {"site-packages", "dist-packages"} & set(name.parts) or sizes[split] >= (max_bytes or float("inf")):
            continue
        content = path.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:  # the library's tests have sources in other encodings, on purpose
            continue
        if text.strip():
            texts[split].append(text)
            sizes[split] += len(content)
    empty = [split.value for split in Split if not texts[split]]
    if empty:
        raise DataError(f"{root}: no Python sources for {', '.join(empty)}; give a folder with some hundred .py files")
    return Corpus(texts={split: tuple(found) for split, found in texts.items()})


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer: no text is lost. SpecError for fewer tokens than there are bytes."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise SpecError(f"a vocabulary of {vocab_size} has no room for the {len(alphabet)} bytes and the end of a text")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(_first_bytes(texts, TOKENIZER_BYTES), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> Ids:
    """Token ids of all texts in a row, each ended by END_OF_TEXT."""
    end = end_of_text(tokenizer)
    rows = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return np.array([token for row in rows for token in (*row.ids, end)], dtype=np.uint16)


def end_of_text(tokenizer: Tokenizer) -> int:
    """The id of END_OF_TEXT."""
    return int(tokenizer.get_vocab()[END_OF_TEXT])


def _first_bytes(texts: Iterable[str], num_bytes: int) -> Iterable[str]:
    """Texts spread over the split by a hash of their beginning, until there are so many bytes."""
    total = 0
    for text in sorted(texts, key=lambda text: hashlib.sha256(text[:4096].encode()).digest()):
        if total >= num_bytes:
            return
        total += len(text.encode())
        yield text
