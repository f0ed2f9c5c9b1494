"""What the commands that run a model over data share: their options, what these open, and how they end."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocator.extras import require_models
from profiles.errors import SpecError, UserError
from profiles.interrupt import INTERRUPTED

if TYPE_CHECKING:
    from allocator.calibration.data import Sequences
    from allocator.calibration.model import StreamedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a command prints: `summary` with --json, else `text`."""

    summary: dict[str, Any]
    text: str


def run(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, work: Callable[[argparse.Namespace], Outcome]
) -> int:
    """The exit code: 0; 2 on a user's mistake, whose sentence goes to stderr; 130 when interrupted."""
    arguments = parser.parse_args(argv)
    try:
        require_models(parser.prog.removeprefix("python -m "))
        from allocator.calibration.memory import within_memory  # now what it needs is known to be installed

        outcome = within_memory(work, arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    print(json.dumps(outcome.summary) if arguments.json else outcome.text)
    return 0


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Options of everything that runs a model over data."""
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="a Hugging Face checkpoint folder")
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="FILE",
        help="a text file, or an .npy of token ids (needs no tokenizer)",
    )
    parser.add_argument("--sequence-length", type=int, default=2048, metavar="TOKENS", help="(default: %(default)s)")
    parser.add_argument(
        "--num-sequences", type=int, default=128, metavar="N", help="most sequences (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="sequences at once (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which sequences (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to run (default: a GPU if there is one)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def check_outputs(arguments: argparse.Namespace, *options: str) -> None:
    """SpecError unless a file can be put at each of these options that is given."""
    for option in options:
        path: Path | None = getattr(arguments, option.removeprefix("--"))
        if path is None:
            continue
        if not path.absolute().parent.is_dir():
            raise SpecError(f"{option} {path}: its folder does not exist")
        if path.is_dir():
            raise SpecError(f"{option} {path}: it is a folder; name a file")


def check_batch_size(size: int) -> None:
    """SpecError unless it is one."""
    if size < 1:
        raise SpecError(f"--batch-size {size}: at least 1 is needed")


def open_model(arguments: argparse.Namespace, *, layers_kept: int = 1) -> StreamedModel:
    """The checkpoint."""
    from allocator.calibration.model import StreamedModel

    check_batch_size(arguments.batch_size)
    return StreamedModel(arguments.model, device=arguments.device, layers_kept=layers_kept)


def open_data(arguments: argparse.Namespace, model: StreamedModel, file: Path) -> Sequences:
    """Sequences of a text or of token ids."""
    from allocator.calibration.data import read_sequences

    return read_sequences(
        file,
        model.checkpoint.folder,
        vocab_size=model.vocab_size,
        length=arguments.sequence_length,
        number=arguments.num_sequences,
        seed=arguments.seed,
        max_length=model.max_length,
    )


def progress_of(arguments: argparse.Namespace) -> Callable[[str], None] | None:
    """Lines on stderr, unless --quiet."""
    return None if arguments.quiet else lambda line: print(line, file=sys.stderr, flush=True)
