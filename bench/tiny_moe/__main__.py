"""`python -m bench.tiny_moe train`: see bench/tiny_moe/__init__.py."""

from __future__ import annotations

import argparse
import dataclasses
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench.tiny_moe.checkpoint import read_report, write_checkpoint
from bench.tiny_moe.corpus import Split, encode, end_of_text, read_corpus, train_tokenizer
from bench.tiny_moe.model import make_model
from bench.tiny_moe.presets import PRESETS, Preset
from bench.tiny_moe.report import expert_loads, perplexities, summary, windows
from bench.tiny_moe.train import Progress as TrainingProgress
from bench.tiny_moe.train import Trainer
from profiles.errors import DataError, SpecError, UserError
from profiles.interrupt import interruptible


def train_model(
    preset: Preset,
    out: Path,
    *,
    seed: int = 0,
    device: str | None = None,
    corpus_folder: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Trains a model, or goes on with it, and writes the checkpoint folder `out`; gives its report.

    A finished `out` is left as it is. A killed training is in `OUT.training.pt` and goes on from there.

    Raises:
        SpecError, DataError: a preset, device or folder that cannot be.
    """
    if out.exists():
        return read_report(out)
    console = console or Console(quiet=True)
    place = _device(device)
    corpus = read_corpus(corpus_folder, max_bytes=preset.max_corpus_bytes)
    tokenizer = train_tokenizer(corpus.texts[Split.TRAIN], preset.vocab_size)
    ids = {split: encode(tokenizer, texts) for split, texts in corpus.texts.items()}
    length = preset.sequence_length
    short = [split.value for split, tokens in ids.items() if len(tokens) <= length]
    if short:
        raise DataError(f"the texts for {', '.join(short)} are shorter than one sequence of {length} tokens")
    bytes_per_token = {split: corpus.num_bytes(split) / len(tokens) for split, tokens in ids.items()}
    console.print(
        f"{corpus.num_bytes(Split.TRAIN) / 1e6:.1f} MB of sources to train on, {bytes_per_token[Split.TRAIN]:.2f} bytes"
        f" a token, {corpus.num_bytes(Split.HELD_OUT) / 1e6:.1f} MB held out; on {place}"
    )
    model = make_model(preset, end_of_text(tokenizer), seed)
    # Float32 masters are the trainer's, so that a GPU's forward and backward passes are bf16 throughout.
    model.to(place, torch.float32 if place.type == "cpu" else torch.bfloat16)
    state = out.with_name(f"{out.name}.training.pt")
    out.parent.mkdir(parents=True, exist_ok=True)
    validation = windows(ids[Split.VALIDATION], length, preset.num_eval_tokens // 4)
    trainer = Trainer(model, preset, ids[Split.TRAIN], validation, seed, state)
    _run(trainer, console)
    progress = trainer.progress
    held_out = windows(ids[Split.HELD_OUT], length, preset.num_eval_tokens)
    model.to(torch.bfloat16).to(torch.float32 if place.type == "cpu" else torch.bfloat16)  # what is saved is measured
    found = perplexities(model, ids[Split.TRAIN], held_out, preset.vocab_size, preset.batch_size)
    num_bytes = progress.step * preset.batch_size * length * bytes_per_token[Split.TRAIN]
    report = {
        "preset": dataclasses.asdict(preset),
        "seed": seed,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_steps": progress.step,
        "seconds": progress.seconds,
        "bytes_per_second": num_bytes / max(progress.seconds, 1e-9),
        "validation_loss": progress.best_loss,
        "held_out_perplexity": found,
        "held_out_bits_per_byte": float(np.log2(found["model"])) / bytes_per_token[Split.HELD_OUT],
        "held_out_tokens": held_out[:, 1:].numel(),
        "held_out_tokens_per_expert": expert_loads(model, trainer.tap, held_out, preset.batch_size),
        "corpus": {
            split.value: {"files": len(texts), "bytes": corpus.num_bytes(split), "tokens": len(ids[split])}
            for split, texts in corpus.texts.items()
        },
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else "CPU",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    write_checkpoint(out, model, tokenizer, corpus, report)
    state.unlink(missing_ok=True)
    return report


def _device(name: str | None) -> torch.device:
    """The device of a name; a GPU where there is one by default."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(name)
    except RuntimeError:
        raise SpecError(f"--device {name}: cpu or cuda") from None
    if place.type not in ("cpu", "cuda") or (place.type == "cuda" and not torch.cuda.is_available()):
        raise SpecError(f"--device {name}: not here; torch {torch.__version__} sees no such device")
    return place


def _run(trainer: Trainer, console: Console) -> None:
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn())
    detail = TextColumn("step {task.fields[step]}, loss {task.fields[loss]:.3f}, validation {task.fields[best]:.3f}")
    with Progress(*columns, detail, console=console) as bar:
        task = bar.add_task("training", total=1.0, step=0, loss=0.0, best=0.0)

        def show(progress: TrainingProgress) -> None:
            bar.update(
                task,
                completed=progress.share,
                step=progress.step,
                loss=progress.last_loss,
                best=progress.best_loss,
            )

        trainer.run(show)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.tiny_moe", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a model, or go on training it")
    train.add_argument("--preset", choices=sorted(PRESETS), default="ci", help="sizes and schedule (default: ci)")
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="the checkpoint folder to make")
    train.add_argument("--minutes", type=float, metavar="M", help="time budget, instead of the preset's")
    train.add_argument("--steps", type=int, metavar="N", help="most steps, instead of the preset's")
    train.add_argument("--seed", type=int, default=0, metavar="N")
    train.add_argument("--device", metavar="NAME", help="cpu or cuda; by default a GPU where there is one")
    train.add_argument(
        "--threads", type=int, default=1, metavar="N", help="CPU threads (default: 1, which busy cores forgive)"
    )
    train.add_argument("--corpus", type=Path, metavar="DIR", help="sources, instead of this Python's standard library")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; gives the exit code."""
    arguments = _parser().parse_args(argv)
    console = Console(stderr=True)
    transformers.utils.logging.disable_progress_bar()
    try:
        preset = PRESETS[arguments.preset]
        if arguments.minutes is not None:
            preset = dataclasses.replace(preset, max_minutes=_positive("--minutes", arguments.minutes))
        if arguments.steps is not None:
            preset = dataclasses.replace(preset, num_steps=int(_positive("--steps", arguments.steps)))
        torch.set_num_threads(int(_positive("--threads", arguments.threads)))
        report = train_model(
            preset,
            arguments.out,
            seed=arguments.seed,
            device=arguments.device,
            corpus_folder=arguments.corpus,
            console=console,
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(summary(report))
    print(f"the model is in {arguments.out}")
    return 0


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise SpecError(f"{name} {value:g}: a number above 0 is needed")
    return value


if __name__ == "__main__":
    sys.exit(interruptible(main))
