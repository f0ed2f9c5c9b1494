"""Calibration data: a text file, read with the checkpoint's tokenizer, or an .npy of token ids, which needs none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor

from profiles.errors import DataError, SpecError

MIN_LENGTH = 2
MOST_UNKNOWN = 0.5
"""A larger share of unknown tokens means a tokenizer of something else."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sequences:
    """Token ids [number, length], all of one length, without padding.

    Attributes:
        tokens: int64, on the CPU.
        source: the file's name and how it was cut.
        notes: what did not go as asked, a sentence each.
    """

    tokens: Tensor
    source: str
    notes: tuple[str, ...] = ()


def read_sequences(
    path: str | Path,
    checkpoint: Path,
    *,
    vocab_size: int,
    length: int = 2048,
    number: int = 128,
    seed: int = 0,
    max_length: int | None = None,
) -> Sequences:
    """Sequences cut from a file without overlap; of more than `number`, those that the seed picks, in the file's order.

    A model with positions for fewer than `length` tokens gets sequences of `max_length`, and a file of fewer tokens
    gives one shorter sequence; either with a note. An .npy is [tokens], or [sequences, length] of whole sequences,
    which are then cut or left as they are.

    Raises:
        SpecError: a length or number that cannot be. DataError: nothing to read, ids outside the vocabulary, or no
            tokenizer that fits.
    """
    if length < MIN_LENGTH or number < 1:
        raise SpecError(f"{number} sequences of {length} tokens: at least 1 of {MIN_LENGTH} are needed")
    if not 0 <= seed < 1 << 63:
        raise SpecError(f"seed {seed}: a number from 0 to 2^63 - 1 is needed")
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{file}: no such file; --data takes a text file or an .npy of token ids")
    notes: list[str] = []
    ids = _from_npy(file) if file.suffix == ".npy" else _from_text(file, checkpoint, vocab_size, notes)
    low, high = (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise DataError(
            f"{file}: token id {wrong} is outside the model's vocabulary of {vocab_size}; other tokens are needed"
        )
    if max_length is not None and max_length < length:
        notes.append(f"the model has positions for {max_length} tokens; sequences are as long, not {length}")
        length = max_length
    return _cut(ids, file, length, number, seed, notes)


def _cut(
    ids: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    file: Path,
    length: int,
    number: int,
    seed: int,
    notes: list[str],
) -> Sequences:
    if ids.ndim == 2 and ids.shape[1] < length:
        length = ids.shape[1]
        notes.append(f"{file.name} holds sequences of {length} tokens; none is longer")
    if ids.ndim == 1 and ids.size < length:
        length = int(ids.size)
        notes.append(f"{file.name} has {length} tokens, fewer than one sequence; it is taken as one")
    if ids.size < MIN_LENGTH or length < MIN_LENGTH:
        raise DataError(f"{file}: {ids.size} tokens; at least {MIN_LENGTH} are needed")
    rows = ids[:, : ids.shape[1] // length * length] if ids.ndim == 2 else ids[: ids.size // length * length]
    cut = rows.reshape(-1, length)
    if len(cut) > number:
        cut = cut[np.sort(np.random.default_rng(seed).choice(len(cut), number, replace=False))]
    elif len(cut) < number:
        notes.append(f"{file.name} gives {len(cut)} sequences of {length} tokens, not {number}")
    source = f"{file.name}, {len(cut)} x {length} tokens"
    return Sequences(tokens=torch.from_numpy(np.ascontiguousarray(cut)), source=source, notes=tuple(notes))


def _from_npy(file: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    try:
        ids = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{file}: not a readable .npy, truncated or foreign ({error})") from error
    if not isinstance(ids, np.ndarray) or ids.ndim not in (1, 2) or ids.dtype.kind not in "iu":
        kind = f"{ids.dtype} {[*ids.shape]}" if isinstance(ids, np.ndarray) else type(ids).__name__
        raise DataError(f"{file}: whole numbers [tokens] or [sequences, length] are needed, it has {kind}")
    if ids.dtype == np.uint64:
        ids = np.minimum(ids, np.uint64(2**62))
    token_ids: np.ndarray[tuple[int, ...], np.dtype[np.int64]] = ids.astype(np.int64)
    return token_ids


def _from_text(
    file: Path, folder: Path, vocab_size: int, notes: list[str]
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: not a UTF-8 text ({error.reason}); give a text file or an .npy of token ids"
        ) from error
    if not text.strip():
        raise DataError(f"{file}: an empty text")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise DataError(f"{folder}: no tokenizer in the checkpoint; add its files, or give an .npy of token ids")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = str(error).strip().splitlines()
        raise DataError(
            f"{folder}: its tokenizer cannot be read ({reason[0] if reason else type(error).__name__}); mend it, or"
            " give an .npy of token ids"
        ) from error
    ids: np.ndarray[tuple[int, ...], np.dtype[np.int64]] = np.asarray(
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64
    )
    if ids.size and int(ids.max()) >= vocab_size:
        raise DataError(
            f"{folder}: the tokenizer does not match the model: it gives token {int(ids.max())} and the vocabulary has"
            f" {vocab_size}; put the model's own tokenizer there"
        )
    unknown = float((ids == tokenizer.unk_token_id).mean()) if tokenizer.unk_token_id is not None and ids.size else 0.0
    if unknown > MOST_UNKNOWN:
        raise DataError(
            f"{folder}: the tokenizer does not match the text: it knows no token for {unknown:.0%} of {file.name}; put"
            " the model's own tokenizer there, or give another text"
        )
    if len(tokenizer) > vocab_size:
        notes.append(
            f"the tokenizer has {len(tokenizer)} tokens and the model {vocab_size}: it may not be the model's own"
        )
    return ids
