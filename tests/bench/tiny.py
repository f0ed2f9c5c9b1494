"""A preset, sources and a checkpoint small enough for every test."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from bench.tiny_moe.checkpoint import write_checkpoint
from bench.tiny_moe.corpus import Corpus, Split, end_of_text, read_corpus, train_tokenizer
from bench.tiny_moe.model import make_model
from bench.tiny_moe.presets import PRESETS, Preset

PRESET: Preset = dataclasses.replace(
    PRESETS["ci"],
    num_layers=2,
    vocab_size=320,
    sequence_length=32,
    batch_size=4,
    num_steps=24,
    max_passes=1e6,
    max_minutes=60,
    num_eval_tokens=512,
)


def write_sources(folder: Path, number: int = 60) -> Path:
    """Python files of a few lines each, in all splits."""
    rng = np.random.default_rng(0)
    for i in range(number):
        lines = [f"def function_{rng.integers(9)}(x, y):\n    return x + y * {rng.integers(9)}\n" for _ in range(12)]
        (folder / f"module_{i}.py").write_text("\n".join(lines))
    return folder


def write_untrained(folder: Path, sources: Path) -> Corpus:
    """A checkpoint of random weights, large enough that its predictions differ; gives its texts."""
    corpus = read_corpus(sources)
    tokenizer = train_tokenizer(corpus.texts[Split.TRAIN], PRESET.vocab_size)
    model = make_model(dataclasses.replace(PRESET, vocab_size=tokenizer.get_vocab_size()), end_of_text(tokenizer), 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2 if parameter.dim() > 1 else 1)
    write_checkpoint(folder, model, tokenizer, corpus, {})
    return corpus
