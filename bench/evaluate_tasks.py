"""lm-eval tasks on a quantised checkpoint, where the user has lm-eval: `pip install lm-eval`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import nn

from allocator.calibration.experts import Experts, LinearStack, SharedExperts
from allocator.calibration.quantizer import Quantizer
from allocator.calibration.statistics import gather
from allocator.calibration.visits import ExpertGroup, visit
from bench.evaluation import Assignment, Evaluator
from profiles.errors import SpecError
from profiles.models import Linear, LinearId


def run_tasks(
    evaluator: Evaluator,
    assignment: Assignment,
    quantizer: Quantizer,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    folder: Path | None = None,
) -> dict[str, dict[str, float]]:
    """Every score of each task; `folder` may hold tasks beside lm-eval's own, as YAML. SpecError: lm-eval is not
    installed, or knows no such task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise SpecError(f"tasks need lm-eval, which is not installed ({error}): pip install lm-eval") from error
    manager = TaskManager(include_path=None if folder is None else str(folder))
    known = set(manager.all_tasks)
    unknown = [task for task in tasks if task not in known]
    if unknown:
        raise SpecError(f"lm-eval has no task {', '.join(unknown)}; lm_eval ls tasks lists them")
    checkpoint = evaluator.model.checkpoint.folder
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    language_model = HFLM(pretrained=assembled(evaluator, assignment, quantizer), tokenizer=tokenizer)
    results = simple_evaluate(model=language_model, tasks=list(tasks), limit=limit, task_manager=manager)["results"]
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
    for seen in visit(streamed, evaluator.calibration, batch_size=evaluator.batch_size):
        block = streamed.adapter.block(layers[seen.layer.index])
        assert block is not None
        routed, *shared = (
            _quantized(group, seen.layer.index, assignment, quantizer, streamed.dtype) for group in seen.groups()
        )
        streamed.adapter.install(block, routed, SharedExperts(shared[0]) if shared else None)
    return model


def _quantized(
    group: ExpertGroup, layer: int, assignment: Assignment, quantizer: Quantizer, dtype: torch.dtype
) -> Experts:
    """A copy of a group's experts that runs as assigned; its tokens are what the quantiser learns from."""
    number = group.experts.num_experts
    statistics = gather(group, range(number))
    chosen: dict[Linear, Sequence[LinearStack]] = {}
    for linear in Linear:
        base = group.experts.base[linear]
        ids = [LinearId(layer=layer, expert=group.first_id + e, linear=linear) for e in range(number)]
        stacks = {
            scheme: quantizer.quantize(base.weights, scheme, statistics.moments[linear], statistics.counts).stack(dtype)
            for scheme in dict.fromkeys(assignment[i] for i in ids if i in assignment)
        }
        chosen[linear] = [stacks[assignment[i]] if i in assignment else base for i in ids]
    experts = copy.copy(group.experts)
    experts.choose(chosen)
    return experts
