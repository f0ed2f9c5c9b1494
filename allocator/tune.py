"""`python -m allocator.tune`: from a checkpoint and a budget to a measured, reported allocation, in one command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocator.allocation import Granularity
from allocator.budget import Budget
from allocator.calibrate import DEFAULT_SCHEMES
from allocator.command import check_batch_size
from allocator.extras import require_models
from allocator.scenarios import parse_loads
from allocator.tuning_plan import STUDY_TRIALS, Plan, Tuned
from allocator.verify import Finalist
from profiles import gpus, schemes
from profiles.errors import DataError, SpecError, UserError
from profiles.interrupt import INTERRUPTED, interruptible

if TYPE_CHECKING:
    from kernel_gen.sweeping.measuring import Bench

_LATENCIES = "predicted of launches / measured"
CALIBRATION_FILE, HELD_OUT_FILE = "calibration.txt", "held_out.txt"


def main(argv: Sequence[str] | None = None, *, bench: Bench | None = None) -> int:
    """The command line. Returns 0, 2 on a user's mistake (its sentence on stderr), 130 when interrupted; the same
    command goes on then.

    `bench`: measure launches there, whatever GPUs this machine has (tests have one without a GPU).
    """
    arguments = _parser().parse_args(argv)
    try:
        require_models("allocator.tune")
        tuned = _run(arguments, bench)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tune: interrupted; finished stages and layers are kept, the same command continues", file=sys.stderr)
        return INTERRUPTED
    print(json.dumps(summary(tuned)) if arguments.json else report(tuned))
    return 0


def _run(arguments: argparse.Namespace, bench: Bench | None) -> Tuned:
    from allocator.tuning import Tuning

    def say(line: str) -> None:
        if not arguments.quiet:
            print(f"tune: {line}", file=sys.stderr, flush=True)

    return Tuning(plan_of(arguments), say, bench).run()


def plan_of(arguments: argparse.Namespace) -> Plan:
    """The plan of a command's options. SpecError, DataError: an option that cannot be."""
    model: Path = arguments.model
    if not model.is_dir():
        raise SpecError(f"--model {model}: no such folder; it takes a Hugging Face checkpoint folder")
    check_batch_size(arguments.batch_size)
    loads = parse_loads(arguments.loads)
    limits = dict(_limit(text) for text in arguments.max_latency)
    for name in limits:
        if name not in loads:
            raise SpecError(f"--max-latency {name}: not one of --loads, {', '.join(loads)}")
    plan = Plan(
        model=model,
        data=_text(arguments.data, model / CALIBRATION_FILE, "--data"),
        held_out=_text(arguments.held_out, model / HELD_OUT_FILE, "--held-out"),
        gpu=gpus.gpu(arguments.gpu),
        budget=Budget(avg_weight_bits=arguments.budget_bits, max_latency_us=limits),
        loads=loads,
        schemes=tuple(schemes.parse(name) for name in dict.fromkeys(arguments.schemes.split(","))),
        out=arguments.out or Path(f"tune-{model.resolve().name}-{arguments.gpu}"),
        profile=arguments.profile,
        latencies=arguments.latencies,
        granularity=Granularity(arguments.granularity),
        study_trials=arguments.study_trials,
        loss_weight=arguments.loss_weight,
        num_sequences=arguments.num_sequences,
        length=arguments.sequence_length,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        max_rows=arguments.max_rows,
        rotate=arguments.rotate,
        device=arguments.device,
    )
    for option, file in (("--profile", plan.profile), ("--latencies", plan.latencies)):
        if file is not None and not file.is_file():
            raise DataError(f"{option} {file}: no such file")
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--out {plan.out}: cannot be a folder ({error.strerror or error})") from error
    return plan


def _text(given: Path | None, beside: Path, option: str) -> Path:
    path = given or beside
    if not path.is_file():
        raise DataError(f"{option}: no file {path}; name a text or an .npy of token ids")
    return path


def _limit(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise SpecError(f"--max-latency {text}: it is LOAD=MICROSECONDS, such as decode=850") from None


def summary(tuned: Tuned) -> dict[str, Any]:
    """What `--json` prints."""
    allocation = tuned.allocation
    return {
        "model": allocation.model,
        "gpu": allocation.gpu,
        "chosen": tuned.chosen,
        "avg_weight_bits": allocation.avg_weight_bits,
        "predicted_loss": allocation.predicted_loss,
        "latency_us": dict(allocation.predicted_latency_us),
        "latency_source": tuned.cost_source,
        "verification": tuned.verification.to_json(),
        "notes": list(tuned.notes),
        "stages": dict(tuned.stages),
        "files": {name: str(path) for name, path in tuned.files.items()},
    }


def report(tuned: Tuned) -> str:
    """What the command prints."""
    allocation, verification = tuned.allocation, tuned.verification
    lines = [
        f"{allocation.model} on {allocation.gpu}: {tuned.chosen}, {allocation.avg_weight_bits:.3f} bits a weight",
        f"measured on {verification.data}; the model's own perplexity is {verification.exact_perplexity:.4f}",
        "",
        f"{'':34}{'bits':>7}{'predicted':>12}{'KL':>10}{'perplexity':>12}  us, {_LATENCIES}",
    ]
    for one in verification.finalists:
        predicted = "" if one.predicted_loss is None else f"{one.predicted_loss:.5g}"
        measured = f"{one.mean_kl:10.5f}{one.perplexity:12.4f}"
        latency = ", ".join(f"{name} {_latency(one, name)}" for name in one.latency_us)
        lines.append(f"{one.name:34}{one.avg_weight_bits:7.3f}{predicted:>12}{measured}  {latency}")
    stages = ", ".join(f"{name} {state}" for name, state in tuned.stages.items())
    lines += ["", *(f"note: {note}" for note in tuned.notes), f"stages: {stages}"]
    return "\n".join([*lines, f"wrote {tuned.files['allocation']} and {tuned.files['report']}"])


def _latency(one: Finalist, scenario: str) -> str:
    """Predicted, and measured where it was."""
    predicted = one.launch_us.get(scenario, one.latency_us[scenario])
    measured = one.measured_us.get(scenario)
    return f"{predicted:.1f}" if measured is None else f"{predicted:.1f} / {measured:.1f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m allocator.tune",
        description="Trace, calibrate, price, allocate, verify and report. Finished stages are found again.",
    )
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="a Hugging Face checkpoint folder")
    parser.add_argument("--gpu", required=True, help=f"whose latencies count: {', '.join(gpus.GPUS)}")
    parser.add_argument("--budget-bits", required=True, type=float, metavar="BITS", help="most stored bits per weight")
    parser.add_argument(
        "--loads",
        default="decode,prefill",
        metavar="A,B=TOKENS",
        help="batches to price; A=TOKENS@p95: more skewed than 95 in 100 (default: %(default)s)",
    )
    parser.add_argument("--max-latency", action="append", default=[], metavar="LOAD=US", help="may be repeated")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="measured launches of this model on this GPU")
    parser.add_argument(
        "--latencies", type=Path, metavar="FILE", help="of these finalists, by allocator.latency where the GPU is"
    )
    parser.add_argument("--data", type=Path, metavar="FILE", help=f"to calibrate on (default: DIR/{CALIBRATION_FILE})")
    parser.add_argument("--held-out", type=Path, metavar="FILE", help=f"to measure on (default: DIR/{HELD_OUT_FILE})")
    parser.add_argument("--schemes", default=DEFAULT_SCHEMES, metavar="A,B", help="(default: %(default)s)")
    parser.add_argument(
        "--granularity",
        choices=[granularity.value for granularity in Granularity],
        default=Granularity.LINEAR.value,
        help="what gets one scheme (default: %(default)s)",
    )
    parser.add_argument(
        "--study-trials",
        type=int,
        default=STUDY_TRIALS,
        metavar="N",
        help="of the study of kernels and bits together; 0: none (default: %(default)s)",
    )
    parser.add_argument(
        "--loss-weight",
        type=float,
        default=1.0,
        metavar="R",
        help="rank finalists by KL^R * latency^(1-R) (default: 1, by KL alone)",
    )
    parser.add_argument("--sequence-length", type=int, default=2048, metavar="TOKENS", help="(default: %(default)s)")
    parser.add_argument("--num-sequences", type=int, default=128, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--max-rows", type=int, default=2048, metavar="N", help="tokens of an expert (default: 2048)")
    parser.add_argument("--rotate", action="store_true", help="rotate inputs whose activations are quantised")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: a GPU if there is one)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder of results (default: tune-MODEL-GPU)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser


if __name__ == "__main__":
    sys.exit(interruptible(main))
