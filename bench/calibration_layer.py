"""How long one MoE layer takes to calibrate: `python -m bench.calibration_layer`, by default of Qwen1.5-MoE's size.

A checkpoint of one layer with random weights is written to a temporary folder and calibrated on random tokens, all
linears in eight schemes, as `python -m allocator.calibrate` does, and the seconds of each stage.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers

from allocator.calibrate import DEFAULT_SCHEMES
from allocator.calibration import layer_losses, quantizer
from allocator.calibration.data import Sequences
from allocator.calibration.layer_losses import LossOptions
from allocator.calibration.measures import MEASURES, measure_of
from allocator.calibration.model import StreamedModel
from allocator.calibration.quantizer import Quantizer
from allocator.calibration.sensitivities import calibrate
from bench.evaluate import write_text
from profiles import schemes
from profiles.errors import UserError
from profiles.interrupt import interruptible

VOCABULARY = 4096
STAGES: dict[str, list[tuple[Any, str]]] = {
    "reading": [(StreamedModel, "__init__"), (StreamedModel, "_load")],
    "second moments": [(layer_losses, "gather")],
    "factorising": [(quantizer, "factorise")],
    "rounding to nearest, clipping": [(quantizer, "nearest")],
    "GPTQ": [(quantizer, "gptq")],
}
"""Functions timed by themselves; none calls another of them. What they leave is the forward and backward pass and the
changes' losses."""


@contextmanager
def timed_stages(seconds: dict[str, float]) -> Iterator[None]:
    """Within it, the seconds spent in each stage are added up in `seconds`."""

    def wrapped(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            begun = _now()
            result = function(*arguments, **options)
            seconds[stage] += _now() - begun
            return result

        return call

    with ExitStack() as patches:
        for stage, functions in STAGES.items():
            seconds[stage] = 0.0
            for owner, name in functions:
                patches.enter_context(mock.patch.object(owner, name, wrapped(stage, getattr(owner, name))))
        yield


def _now() -> float:
    """Seconds, when all work given to the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the calibration, the checkpoint's reading and the forward pass included."""
    config = transformers.Qwen2MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=arguments.hidden,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=arguments.experts,
        num_experts_per_tok=4,
        moe_intermediate_size=arguments.intermediate,
        shared_expert_intermediate_size=4 * arguments.intermediate,
        max_position_embeddings=arguments.sequence_length,
    )
    options = LossOptions(
        schemes=tuple(schemes.parse(name) for name in DEFAULT_SCHEMES.split(",")),
        quantizer=Quantizer(rotate=arguments.rotate),
    )
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (arguments.num_sequences, arguments.sequence_length))
    sequences = Sequences(tokens=torch.from_numpy(tokens), source="random tokens")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        del model
        stages: dict[str, float] = {}
        begun = _now()
        with timed_stages(stages):
            streamed = StreamedModel(Path(folder), device=arguments.device)
            calibrate(streamed, sequences, [measure_of(arguments.measure)], options, batch_size=arguments.batch_size)
        seconds = _now() - begun
    stages["forward, backward, losses"] = seconds - sum(stages.values())
    on_gpu = streamed.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(streamed.device) if on_gpu else "cpu",
        "experts": arguments.experts,
        "hidden": arguments.hidden,
        "intermediate": arguments.intermediate,
        "tokens": int(tokens.size),
        "schemes": len(options.schemes),
        "measure": arguments.measure,
        "quantizer": options.quantizer.name,
        "seconds": round(seconds, 2),
        "stages": {stage: round(spent, 2) for stage, spent in stages.items()},
        "peak_gpu_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: prints one JSON object, and writes it if asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.calibration_layer", description=__doc__)
    for name, default in (
        ("experts", 60),
        ("hidden", 2048),
        ("intermediate", 1408),
        ("num-sequences", 128),
        ("sequence-length", 2048),
        ("batch-size", 8),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--measure", choices=list(MEASURES), default="fisher", help="(default: %(default)s)")
    parser.add_argument("--rotate", action="store_true", help="rotate inputs whose activations are quantised")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: a GPU if there is one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here too")
    arguments = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    try:
        found = json.dumps(measure(arguments), indent=1)
        if arguments.json is not None:
            write_text(arguments.json, found + "\n")
        print(found)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(interruptible(main))
