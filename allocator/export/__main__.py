"""`python -m allocator.export`: an allocation in another engine's form, with the price of what that form cannot say."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from allocator.allocation import Allocation
from allocator.export import compressed_tensors, gptq, modelopt
from allocator.export.names import names_of
from allocator.export.projection import Projection, project
from allocator.export.targets import DEFAULT_FORM, Engine, Form, Target
from allocator.sensitivity import Sensitivity
from costmodel.table import CostTable
from profiles.atomic import replacing
from profiles.errors import DataError, SpecError, UserError
from profiles.models import find_model


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0 when a file was written, 2 on a user's mistake (its sentence on stderr)."""
    arguments = _parser().parse_args(argv)
    try:
        projection = _run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(projection.price()) if arguments.json else f"{price(projection)}\nwrote {arguments.out}")
    return 0


def _run(arguments: argparse.Namespace) -> Projection:
    engine = None if arguments.target is None else Engine(arguments.target)
    form = Form(arguments.format) if arguments.format else (Form.NATIVE if engine is None else DEFAULT_FORM[engine])
    target = Target(form=form, engine=engine)
    if not arguments.out.absolute().parent.is_dir():
        raise SpecError(f"--out {arguments.out}: its folder does not exist")
    native = Allocation.read(arguments.allocation)
    sensitivity = Sensitivity.read(arguments.sensitivity)
    if not arguments.json:
        print(can_load(target, sensitivity))
    projection = project(
        native,
        target,
        sensitivity,
        None if arguments.cost is None else CostTable.read(arguments.cost),
        shape=find_model(arguments.model or native.model),
    )
    content = exported(projection.exported, target, native.model, arguments.model)
    try:
        with replacing(arguments.out) as temporary:
            temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{arguments.out}: cannot be written ({error.strerror or error})") from error
    return projection


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
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the configuration to write, JSON")
    parser.add_argument("--json", action="store_true", help="print the price as one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
