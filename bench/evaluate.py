"""Perplexity and KL divergence of a checkpoint whose MoE linears are quantised: `python -m bench.evaluate`.

How they are measured: bench.evaluation.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from allocator.allocation import Allocation
from allocator.calibration.data import Sequences, read_sequences
from allocator.calibration.model import StreamedModel
from allocator.calibration.quantizer import Method, Quantizer
from bench.evaluate_tasks import run_tasks
from bench.evaluation import Evaluator
from profiles import schemes
from profiles.atomic import replacing
from profiles.errors import DataError, SpecError, UserError
from profiles.interrupt import interruptible
from profiles.models import LinearId
from profiles.schemes import QuantScheme

CALIBRATION_FILE = "calibration.txt"
HELD_OUT_FILE = "held_out.txt"
KEEP_ALL_LAYERS = 1 << 20


def open_model(folder: Path, device: str | None, *, stream: bool = False) -> StreamedModel:
    """A checkpoint for evaluation: all layers stay in memory unless they are to be streamed."""
    return StreamedModel(folder, device=device, layers_kept=1 if stream else KEEP_ALL_LAYERS)


def read_texts(
    model: StreamedModel, held_out: Path | None, calibration: Path | None, *, length: int, number: int, calibrating: int
) -> tuple[Sequences, Sequences]:
    """(held out, calibration) sequences; by default from the texts beside the checkpoint, where there are any."""
    folder = model.checkpoint.folder
    texts = []
    for path, name, option, most in (
        (held_out, HELD_OUT_FILE, "--data", number),
        (calibration, CALIBRATION_FILE, "--calibration", calibrating),
    ):
        file = path or folder / name
        if path is None and not file.is_file():
            raise DataError(f"{folder}: no {name} in the checkpoint's folder; name a text with {option}")
        texts.append(read_sequences(file, folder, vocab_size=model.vocab_size, length=length, number=most))
    return texts[0], texts[1]


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which model and which texts."""
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a Hugging Face checkpoint folder")
    parser.add_argument("--data", type=Path, metavar="FILE", help=f"held-out text or .npy of ids (DIR/{HELD_OUT_FILE})")
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help=f"text that quantisers learn from (DIR/{CALIBRATION_FILE})"
    )
    parser.add_argument("--length", type=int, default=512, metavar="N", help="tokens a sequence (default: 512)")
    parser.add_argument("--sequences", type=int, default=128, metavar="N", help="held-out sequences (default: 128)")
    parser.add_argument(
        "--calibration-sequences", type=int, default=128, metavar="N", help="sequences to calibrate on (default: 128)"
    )
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="sequences at a time (default: 16)")
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="CPU threads (default: 1, which busy cores forgive)"
    )
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda; by default a GPU where there is one")
    parser.add_argument(
        "--stream", action="store_true", help="keep one layer in memory, read it again for each variant"
    )


def open_evaluator(arguments: argparse.Namespace) -> tuple[Evaluator, Sequences, Sequences]:
    """The evaluator of a command's options, and its texts."""
    if arguments.batch_size < 1:
        raise SpecError(f"--batch-size {arguments.batch_size}: at least 1 is needed")
    if arguments.threads < 1:
        raise SpecError(f"--threads {arguments.threads}: at least 1 is needed")
    torch.set_num_threads(arguments.threads)
    model = open_model(arguments.model, arguments.device, stream=arguments.stream)
    held_out, calibration = read_texts(
        model,
        arguments.data,
        arguments.calibration,
        length=arguments.length,
        number=arguments.sequences,
        calibrating=arguments.calibration_sequences,
    )
    evaluator = Evaluator(
        model=model, held_out=held_out.tokens, calibration=calibration.tokens, batch_size=arguments.batch_size
    )
    return evaluator, held_out, calibration


def _assignment(arguments: argparse.Namespace, linears: tuple[LinearId, ...]) -> dict[LinearId, QuantScheme]:
    if arguments.allocation is not None:
        return dict(Allocation.read(arguments.allocation).assignment)
    if arguments.scheme is not None:
        return dict.fromkeys(linears, schemes.parse(arguments.scheme))
    return {}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.evaluate", description=__doc__)
    add_model_options(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--scheme", metavar="NAME", help="one scheme for all MoE linears, as in w4a16_g128_asym")
    what.add_argument("--allocation", type=Path, metavar="FILE", help="an allocation's file")
    parser.add_argument("--method", choices=[method.value for method in Method], default=Method.GPTQ.value)
    parser.add_argument("--clip", action="store_true", help="search for narrower ranges")
    parser.add_argument("--rotate", action="store_true", help="rotate inputs before activations are quantised")
    parser.add_argument("--tasks", metavar="A,B", help="lm-eval tasks to run too, where lm-eval is installed")
    parser.add_argument("--tasks-folder", type=Path, metavar="DIR", help="lm-eval tasks of your own, as YAML")
    parser.add_argument("--limit", type=int, metavar="N", help="documents of each task")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; gives the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        quantizer = Quantizer(method=Method(arguments.method), clip=arguments.clip, rotate=arguments.rotate)
        evaluator, held_out, calibration = open_evaluator(arguments)
        assignment = _assignment(arguments, evaluator.linears)
        found = evaluator.measure(assignment, quantizer)
        result: dict[str, Any] = {
            "model": evaluator.model.shape.name,
            "scheme": arguments.scheme or (str(arguments.allocation) if arguments.allocation else "w16a16"),
            "quantizer": quantizer.name if assignment else None,
            "data": held_out.source,
            "calibration": calibration.source,
            "notes": [*held_out.notes, *calibration.notes],
            **asdict(found),
        }
        if arguments.tasks:
            names = arguments.tasks.split(",")
            result["tasks"] = run_tasks(
                evaluator, assignment, quantizer, names, limit=arguments.limit, folder=arguments.tasks_folder
            )
        if arguments.json is not None:
            write_text(arguments.json, json.dumps(result, indent=1) + "\n")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for note in result["notes"]:
        print(f"note: {note}")
    print(f"perplexity {found.perplexity:.4f}, KL {found.mean_kl:.6f} nats, {found.avg_weight_bits:.3f} bits a weight")
    for task, scores in result.get("tasks", {}).items():
        print(f"{task}: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
    return 0


def write_text(path: Path, text: str) -> None:
    """A file, whole or not at all. DataError if it cannot be written."""
    try:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error


if __name__ == "__main__":
    sys.exit(interruptible(main))
