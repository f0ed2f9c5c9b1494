"""`python -m allocator.export`: an allocation in another engine's form, with the price of what that form cannot say."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from allocator.allocation import Allocation
from allocator.command import check_outputs, open_data, open_model, progress_of
from allocator.export import compressed_tensors, gptq, modelopt
from allocator.export.names import names_of
from allocator.export.projection import Projection, project
from allocator.export.targets import DEFAULT_FORM, WRITTEN, Engine, Form, Target
from allocator.extras import require_models
from allocator.sensitivity import Sensitivity
from allocator.verify import verify
from costmodel.table import CostTable
from profiles.atomic import replacing
from profiles.errors import DataError, SpecError, UserError
from profiles.interrupt import interruptible
from profiles.models import find_model

CALIBRATION_FILE = "calibration.txt"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0 when a file was written, 2 on a user's mistake (its sentence on stderr)."""
    arguments = _parser().parse_args(argv)
    try:
        projection, written = _run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    what = WRITTEN[projection.target.form] if written is None else "a checkpoint, quantised"
    summary = projection.price() | {"written": what} | ({} if written is None else {"weights": written})
    lines = [price(projection), *([] if written is None else [weights_text(written)])]
    lines.append(f"wrote {arguments.out}: {what}")
    print(json.dumps(summary) if arguments.json else "\n".join(lines))
    return 0


def _run(arguments: argparse.Namespace) -> tuple[Projection, dict[str, Any] | None]:
    engine = None if arguments.target is None else Engine(arguments.target)
    form = Form(arguments.format) if arguments.format else (Form.NATIVE if engine is None else DEFAULT_FORM[engine])
    target = Target(form=form, engine=engine)
    if not arguments.weights:
        check_outputs(arguments, "--out")
    if arguments.weights:
        _check_weights(arguments, target)
    native = Allocation.read(arguments.allocation)
    sensitivity = Sensitivity.read(arguments.sensitivity)
    if not arguments.json:
        print(can_load(target, sensitivity))
    projection = project(
        native,
        target,
        sensitivity,
        None if arguments.cost is None else CostTable.read(arguments.cost),
        shape=find_model(str(arguments.model or native.model)),
    )
    if arguments.weights:
        return projection, _weights(projection.exported, arguments)
    content = exported(projection.exported, target, native.model, arguments.model)
    try:
        with replacing(arguments.out) as temporary:
            temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{arguments.out}: cannot be written ({error.strerror or error})") from error
    return projection, None


def _weights(allocation: Allocation, arguments: argparse.Namespace) -> dict[str, Any]:
    """The quantised checkpoint, and with --held-out what it does to the model."""
    from allocator.calibration.quantizer import Method, Quantizer
    from allocator.export.weights import write_checkpoint

    model = open_model(arguments)
    quantizer = Quantizer(method=Method.GPTQ, clip=True, rotate=False)
    calibration = open_data(arguments, model, arguments.data)
    say = None if arguments.json else progress_of(arguments)
    found = write_checkpoint(
        model,
        calibration,
        allocation,
        names_of(allocation.model, Path(arguments.model)),
        quantizer,
        arguments.out,
        batch_size=arguments.batch_size,
        progress=say,
    )
    summary = asdict(found) | {"quantizer": quantizer.name, "calibration": calibration.source}
    if arguments.held_out is None:
        return summary
    held_out = open_data(arguments, model, arguments.held_out)
    made = verify(model, held_out, calibration, {"exported": allocation}, quantizer, batch_size=arguments.batch_size)
    measured = {"mean_kl": made.finalists[0].mean_kl, "perplexity": made.finalists[0].perplexity}
    return summary | measured | {"exact_perplexity": made.exact_perplexity, "held_out": held_out.source}


def _check_weights(arguments: argparse.Namespace, target: Target) -> None:
    """SpecError: what --weights needs is not given. UserError: or not installed."""
    if target.form is not Form.COMPRESSED_TENSORS:
        raise SpecError(
            f"--weights writes compressed-tensors checkpoints, not {target.form.value}; without it there is"
            f" {WRITTEN[target.form]}"
        )
    if arguments.model is None or not Path(arguments.model).is_dir():
        raise SpecError("--weights needs --model DIR, the checkpoint folder that is quantised")
    arguments.model = Path(arguments.model)
    if arguments.data is None:
        arguments.data = arguments.model / CALIBRATION_FILE
    for option, file in (("--data", arguments.data), ("--held-out", arguments.held_out)):
        if file is not None and not file.is_file():
            raise DataError(f"{option}: no file {file}; name a text or an .npy of token ids")
    if arguments.out.exists():
        raise SpecError(f"--out {arguments.out}: there is something already; --weights makes a new folder")
    require_models("allocator.export --weights")
    compressed_tensors.require()


def weights_text(written: dict[str, Any]) -> str:
    """What was written, and what it does to the model."""
    text = (
        f"{written['num_modules']} modules quantised by {written['quantizer']} ({written['calibration']}), each read"
        f" back bit by bit; experts {written['expert_bytes'] / 1e6:.1f} MB of {written['total_bytes'] / 1e6:.1f}"
    )
    if "mean_kl" not in written:
        return text
    return (
        f"{text}\nmeasured on {written['held_out']}: KL {written['mean_kl']:.5f}, perplexity"
        f" {written['perplexity']:.4f} (the model's own {written['exact_perplexity']:.4f})"
    )


def exported(allocation: Allocation, target: Target, model: str, folder: str | None) -> dict[str, Any]:
    """The content of the file. `folder`: a checkpoint's, whose config.json says how linears are named."""
    if target.form is Form.NATIVE:
        return allocation.to_json()
    is_path = folder is not None and (Path(folder).is_dir() or Path(folder).suffix == ".json")
    names = names_of(model, Path(folder) if folder is not None and is_path else None)
    make = {
        Form.COMPRESSED_TENSORS: compressed_tensors.config,
        Form.GPTQ: gptq.config,
        Form.MODELOPT: modelopt.config,
    }[target.form]
    return make(allocation, names)


def can_load(target: Target, sensitivity: Sensitivity) -> str:
    """What is said before solving: which of the sensitivity's schemes the target can have, and why not the others."""
    possible, refused = target.split(sensitivity.schemes)
    lines = [
        f"{target.name}: one scheme a {target.granularity.value}; it can have"
        f" {', '.join(scheme.name for scheme in possible) or 'none of the schemes'}"
    ]
    return "\n".join(lines + [f"  not {scheme.name}: {'; '.join(why)}" for scheme, why in refused.items()])


def price(projection: Projection) -> str:
    """The exported allocation against the native one."""
    native, exported_one = projection.native, projection.exported
    if exported_one is native:
        return f"{projection.target.name} can say the allocation as it is: loss {native.predicted_loss:.6g}"
    ratio = "" if projection.loss_ratio is None else f", {projection.loss_ratio:.2f} times the native one"
    lines = [
        f"loss {exported_one.predicted_loss:.6g}{ratio} ({native.predicted_loss:.6g}),"
        f" at {exported_one.avg_weight_bits:.3f} bits a weight ({native.avg_weight_bits:.3f})"
    ]
    for name, us in native.predicted_latency_us.items():
        if name in exported_one.predicted_latency_us:
            then = exported_one.predicted_latency_us[name]
            lines.append(f"{name}: {then:.1f} us, {then / us - 1:+.1%} of the native {us:.1f}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m allocator.export",
        description="Write an allocation in the form that another engine reads, and say what is lost by it.",
    )
    parser.add_argument("--allocation", required=True, type=Path, metavar="FILE", help="of allocator.solve, JSON")
    parser.add_argument("--sensitivity", required=True, type=Path, metavar="FILE", help="the losses it was made from")
    parser.add_argument("--cost", type=Path, metavar="FILE", help="the cost table it was made from")
    parser.add_argument(
        "--format", choices=[form.value for form in Form], help="(default: the target's; native without one)"
    )
    parser.add_argument("--target", choices=[engine.value for engine in Engine], help="the engine that is to load it")
    parser.add_argument(
        "--model", metavar="DIR", help="the checkpoint, for its linears' names (default: the allocation's model)"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the configuration, JSON; or a folder")
    parser.add_argument("--json", action="store_true", help="print the price as one JSON object")
    weights = parser.add_argument_group("a quantised checkpoint, compressed-tensors")
    add = weights.add_argument
    add("--weights", action="store_true", help="quantise --model's experts and write a checkpoint to the folder --out")
    add("--data", type=Path, metavar="FILE", help=f"to calibrate on (default: DIR/{CALIBRATION_FILE})")
    add("--held-out", type=Path, metavar="FILE", help="measure the KL divergence of what was written on it")
    add("--sequence-length", type=int, default=2048, metavar="TOKENS", help="(default: %(default)s)")
    add("--num-sequences", type=int, default=128, metavar="N", help="(default: %(default)s)")
    add("--batch-size", type=int, default=1, metavar="N", help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="which sequences (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), help="(default: a GPU if there is one)")
    add("--quiet", action="store_true", help="no progress")
    return parser


if __name__ == "__main__":
    sys.exit(interruptible(main))
