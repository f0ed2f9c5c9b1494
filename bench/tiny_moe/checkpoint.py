"""The checkpoint folder: a Hugging Face model in bf16 with its tokenizer, texts to calibrate and measure, a report."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, Qwen2MoeForCausalLM

from bench.tiny_moe.corpus import END_OF_TEXT, Corpus, Split
from profiles.atomic import sync_folder
from profiles.errors import DataError

CALIBRATION_FILE = "calibration.txt"
HELD_OUT_FILE = "held_out.txt"
REPORT_FILE = "training.json"
CALIBRATION_BYTES = 2_000_000


def write_checkpoint(
    out: Path, model: Qwen2MoeForCausalLM, tokenizer: Tokenizer, corpus: Corpus, report: dict[str, Any]
) -> None:
    """The folder, whole or not at all. DataError if it cannot be written or is there already."""
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.mkdir(parents=True)
        model.to(torch.bfloat16).save_pretrained(temporary)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
        )
        fast.save_pretrained(temporary)
        train = corpus.texts[Split.TRAIN]
        step = max(1, corpus.num_bytes(Split.TRAIN) // CALIBRATION_BYTES)
        (temporary / CALIBRATION_FILE).write_text(_joined(train[::step]), encoding="utf-8", newline="")
        (temporary / HELD_OUT_FILE).write_text(_joined(corpus.texts[Split.HELD_OUT]), encoding="utf-8", newline="")
        (temporary / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        temporary.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        raise DataError(f"{out}: the checkpoint cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_report(out: Path) -> dict[str, Any]:
    """The report of a finished training. DataError if the folder is something else."""
    try:
        report = json.loads((out / REPORT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{out}: exists and is no trained model (no {REPORT_FILE}); choose another --out") from error
    if not isinstance(report, dict):
        raise DataError(f"{out / REPORT_FILE}: not a report of a training; choose another --out")
    return report


def _joined(texts: Iterable[str]) -> str:
    return "".join(text + END_OF_TEXT for text in texts)
