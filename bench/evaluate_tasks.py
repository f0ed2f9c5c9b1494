"""lm-eval tasks on a quantised checkpoint, where the user has lm-eval: `pip install lm-eval`."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import transformers
from torch import nn

from allocator.calibration.experts import SharedExperts
from allocator.calibration.quantizer import Quantizer
from bench.evaluation import Assignment, Evaluator, restore
from profiles.errors import SpecError


def run_tasks(
    evaluator: Evaluator,
    assignment: Assignment,
    quantizer: Quantizer,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Every score of each task. SpecError: lm-eval is not installed, or knows no such task."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise SpecError(f"tasks need lm-eval, which is not installed ({error}): pip install lm-eval") from error
    known = set(TaskManager().all_tasks)
    unknown = [task for task in tasks if task not in known]
    if unknown:
        raise SpecError(f"lm-eval has no task {', '.join(unknown)}; lm_eval ls tasks lists them")
    folder = evaluator.model.checkpoint.folder
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    language_model = HFLM(pretrained=assembled(evaluator, assignment, quantizer), tokenizer=tokenizer)
    results = simple_evaluate(model=language_model, tasks=list(tasks), limit=limit)["results"]
    return {
        task: {name: float(score) for name, score in scores.items() if isinstance(score, int | float)}
        for task, scores in results.items()
    }


def assembled(evaluator: Evaluator, assignment: Assignment, quantizer: Quantizer) -> nn.Module:
    """transformers' own model with the experts of a variant in place; it is in memory whole."""
    streamed = evaluator.model
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
        streamed.checkpoint.folder, dtype=streamed.dtype, local_files_only=True
    )
    model = model.to(streamed.device).eval().requires_grad_(False)
    layers = model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    for layer in evaluator.quantized_layers(assignment, quantizer):
        block = streamed.adapter.block(layers[layer.index])
        assert block is not None
        assert layer.routed is not None
        shared = None if layer.shared is None else SharedExperts(copy.copy(layer.shared))
        streamed.adapter.install(block, copy.copy(layer.routed), shared)
        restore(layer)
    if streamed.device.type == "cuda":
        torch.cuda.empty_cache()
    return model
