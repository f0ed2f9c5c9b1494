"""The command line of `python -m kernel_gen.sweep`, and the request it describes. Whatever cannot be raises a UserError
that says what to do.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kernel_gen.bundle import Bundle, load_bundle
from kernel_gen.legality import ARCHITECTURES
from kernel_gen.space import Effort
from kernel_gen.sweeping import guided_arguments
from kernel_gen.sweeping.guided_arguments import GuidedOptions
from kernel_gen.sweeping.plan import (
    DEFAULT_LINEARS,
    DEFAULT_TOKENS,
    LINEARS,
    LOADS_PER_WORKLOAD,
    Backend,
    Mix,
    SweepRequest,
    default_schemes,
)
from profiles import gpus, models, schemes
from profiles.errors import DataError, SpecError
from profiles.gpus import GpuSpec
from profiles.kernels import Family
from profiles.loads import GENERATORS
from profiles.schemes import QuantScheme

MAX_TOKENS = 1 << 20
DEFAULT_LAUNCHES, MAX_LAUNCHES = 50, 1000
EXAMPLES = """\
examples:
  # A cost table for an RTX 4090 from any machine: predicted where there is none, measured where there is.
  python -m kernel_gen.sweep --gpu rtx4090 --model qwen1.5-moe-a2.7b

  # Two schemes and a mix of them, skewed routing, a model from its config.json.
  python -m kernel_gen.sweep --gpu rtx4090 --model ./my-model/config.json --load zipf --tokens 16,512 \\
      --schemes w4a16_g128_sym,w8a8_g-1_sym --mixed w4a16_g128_sym:0.75+w8a8_g-1_sym:0.25

  # Measure kernels that were built elsewhere, with the loads of a real trace.
  # The same command again continues where it was stopped.
  python -m kernel_gen.sweep --gpu h200 --backend cuda --bundle ./bundle --load trace.json --out h200.parquet

  # Tune a model in a few minutes: measure only what a latency model is unsure of.
  python -m kernel_gen.sweep --gpu h200 --model qwen3-30b-a3b --effort full --guided --goal 0.01 --out qwen3.parquet

exit status: 0 done, 2 a mistake that you can mend (one sentence on stderr), 130 interrupted (finished rows are kept).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The request, and how to carry it out and show it. `guided`: measure by choice, not all. `again`: profiles of
    which `num_launches` launches are measured anew, instead of what the request describes. `build_only`: the kernels
    are compiled into the cache, and that is all.
    """

    request: SweepRequest
    backend: Backend
    as_json: bool
    explain: bool
    ray_address: str | None
    guided: GuidedOptions | None
    again: tuple[Path, ...] = ()
    num_launches: int = DEFAULT_LAUNCHES
    build_only: bool = False


def parser() -> argparse.ArgumentParser:
    """The argument parser; `--help` is the reference of every option."""
    made = argparse.ArgumentParser(
        prog="python -m kernel_gen.sweep",
        description="Find the fastest kernel configuration per precision scheme and token load of an MoE model on a GPU"
        ", by measuring or predicting.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = made.add_argument_group("what to sweep")
    what.add_argument("--gpu", required=True, help=f"the GPU: {', '.join(gpus.GPUS)}")
    what.add_argument(
        "--model",
        action="extend",
        nargs="+",
        metavar="NAME|PATH",
        help="models by name, or a Hugging Face config.json (default: qwen1.5-moe-a2.7b)",
    )
    what.add_argument(
        "--linear",
        action="extend",
        nargs="+",
        metavar="LINEAR",
        help=f"of {', '.join(LINEARS)} (default: {', '.join(DEFAULT_LINEARS)})",
    )
    what.add_argument(
        "--tokens",
        action="extend",
        nargs="+",
        metavar="N",
        help="batch sizes in tokens, such as 1,16,512 (default: by --effort)",
    )
    what.add_argument(
        "--load",
        action="extend",
        nargs="+",
        metavar="LOAD",
        help=f"of {', '.join(GENERATORS)}, or traces (.json, .parquet) (default: uniform)",
    )
    what.add_argument("--seed", type=int, default=0, help="of generated loads and mixes (default: 0)")
    what.add_argument(
        "--schemes",
        action="extend",
        nargs="+",
        metavar="SCHEME",
        help="such as w4a16_g128_sym,w8a8_g-1_sym (default: all that have kernels)",
    )
    what.add_argument(
        "--mixed",
        action="extend",
        nargs="+",
        metavar="MIX",
        help="several schemes in one launch, SCHEME[:SHARE]+SCHEME[:SHARE]..., shares of the experts",
    )
    how = made.add_argument_group("how")
    how.add_argument(
        "--effort",
        choices=[effort.value for effort in Effort],
        default=Effort.QUICK.value,
        help="how many configurations (default: quick)",
    )
    how.add_argument(
        "--tries",
        type=int,
        metavar="N",
        help="configurations measured per workload and load, the best by the analytic model first"
        " (default: 4, or 16 with --effort full)",
    )
    how.add_argument(
        "--family",
        action="extend",
        nargs="+",
        metavar="FAMILY",
        help=f"kernels of {', '.join(family.value for family in Family)} only (default: all that the GPU has)",
    )
    how.add_argument(
        "--backend",
        choices=[backend.value for backend in Backend],
        default=Backend.AUTO.value,
        help="auto measures where the GPU is, else predicts (default)",
    )
    how.add_argument(
        "--bundle",
        type=Path,
        metavar="DIR",
        help="kernels made by python -m kernel_gen.build, instead of compiling here",
    )
    how.add_argument(
        "--build-only",
        action="store_true",
        help="compile the kernels that this sweep would measure into the cache, and stop: needs no GPU, and saves the"
        " time of one that is lent",
    )
    how.add_argument(
        "--cells",
        type=int,
        metavar="N",
        help="only N cells (a scheme, linear and load), drawn by lot: schemes and linears shuffled,"
        f" {LOADS_PER_WORKLOAD} loads of each until there are N",
    )
    how.add_argument(
        "--shuffle",
        action="store_true",
        help="models, linears and schemes in an order drawn by lot, so that a sweep that is cut short has some of each",
    )
    how.add_argument(
        "--time-limit",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds for one candidate; one that takes longer is recorded as timeout (default: 30)",
    )
    how.add_argument(
        "--ray", metavar="ADDRESS", help="spread the work over a Ray cluster, such as auto or 10.0.0.1:6379"
    )
    guided_arguments.add_to(made)
    again = made.add_argument_group("measuring again")
    again.add_argument(
        "--again",
        type=Path,
        action="extend",
        nargs="+",
        metavar="FILE",
        help="measure a few launches of these profiles anew, for python -m costmodel.recalibrate; they are chosen so"
        " that they tell what changed",
    )
    again.add_argument("--launches", type=int, metavar="N", help=f"how many (default: {DEFAULT_LAUNCHES})")
    out = made.add_argument_group("output")
    out.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help="the profile: a .parquet file, or a folder to put profile.parquet in (default: sweep-GPU.parquet)."
        " A profile that is there is continued; the heat map lies beside it",
    )
    out.add_argument(
        "--json",
        action="store_true",
        help="the result as JSON on stdout, nothing but mistakes and plain progress on stderr",
    )
    out.add_argument("--explain", action="store_true", help="say why configurations were rejected")
    return made


def parse(argv: Sequence[str] | None) -> Options:
    """The options of a command line. SpecError or DataError for what cannot be; argparse itself exits with 2 on unknown
    options.
    """
    given = parser().parse_args(argv)
    gpu = gpus.gpu(given.gpu)
    guided = guided_arguments.parse(given)
    _check_again(given)
    _check_build_only(given)
    bundle = _bundle(given.bundle, gpu)
    effort = Effort(given.effort)
    if given.seed < 0:
        raise SpecError(f"--seed {given.seed}: it must not be negative")
    if given.tries is not None and not 1 <= given.tries <= 1000:
        raise SpecError(f"--tries {given.tries}: expected 1 to 1000")
    if given.cells is not None and given.cells < 1:
        raise SpecError(f"--cells {given.cells}: at least 1")
    if not 0 < given.time_limit < 86400:
        raise SpecError(f"--time-limit {given.time_limit:g}: seconds, more than 0 and less than a day")
    families = _families(given.family, gpu)
    mixes = tuple(dict.fromkeys(_mix(text) for text in _split(given.mixed)))
    named = tuple(dict.fromkeys(schemes.parse(name) for name in _split(given.schemes)))
    request = SweepRequest(
        gpu=gpu,
        models=tuple(
            {shape.name: shape for shape in map(models.find_model, given.model or ["qwen1.5-moe-a2.7b"])}.values()
        ),
        linears=_linears(given.linear),
        tokens=tuple(sorted({_tokens(text) for text in _split(given.tokens)})) or DEFAULT_TOKENS[effort],
        loads=tuple(dict.fromkeys(_load(text) for text in _split(given.load))) or ("uniform",),
        seed=given.seed,
        schemes=named if named or mixes else default_schemes(gpu, effort, bundle, families),
        mixes=mixes,
        effort=effort,
        out=_out(given.out, gpu),
        bundle=bundle,
        limit_s=given.time_limit,
        tries=given.launches or DEFAULT_LAUNCHES if given.again else given.tries,
        families=families,
        shuffle=given.shuffle,
        num_cells=given.cells,
    )
    return Options(
        request=request,
        backend=Backend(given.backend),
        as_json=given.json,
        explain=given.explain,
        ray_address=given.ray,
        guided=guided,
        again=tuple(given.again or ()),
        num_launches=given.launches or DEFAULT_LAUNCHES,
        build_only=given.build_only,
    )


def _check_build_only(given: argparse.Namespace) -> None:
    """SpecError for options that do not go with --build-only."""
    if not given.build_only:
        return
    if given.guided or given.worth:
        raise SpecError(
            "--build-only builds every candidate, and --guided measures few: leave out --guided and --worth"
        )
    if given.bundle is not None or given.ray is not None or given.backend == Backend.PREDICT.value:
        raise SpecError(
            "--build-only fills this machine's cache for measuring: leave out --bundle, --ray and --backend predict"
        )


def _check_again(given: argparse.Namespace) -> None:
    """SpecError for options that do not go with --again, or need it."""
    if given.launches is not None and not (given.again and 1 <= given.launches <= MAX_LAUNCHES):
        raise SpecError(f"--launches {given.launches}: from 1 to {MAX_LAUNCHES}, and only with --again")
    if not given.again:
        return
    if given.guided or given.worth or given.backend == Backend.PREDICT.value:
        raise SpecError("--again measures what was measured before: leave out --guided, --worth and --backend predict")
    for name in ("model", "linear", "tokens", "load", "schemes", "mixed", "tries", "cells"):
        if getattr(given, name):
            raise SpecError(f"--again measures launches that the profiles hold: leave out --{name}")


def _split(texts: Sequence[str] | None) -> list[str]:
    """Values separated by commas or given apart; empty ones are refused where they are read."""
    return [part.strip() for text in texts or () for part in text.split(",")]


def _bundle(path: Path | None, gpu: GpuSpec) -> Bundle | None:
    if path is None:
        return None
    bundle = load_bundle(path)
    if bundle.gpu.name != gpu.name:
        raise DataError(
            f"{path} was built for {bundle.gpu.name} ({bundle.gpu.arch}), not {gpu.name} ({gpu.arch}):"
            f" build one with --gpu {gpu.name}"
        )
    return bundle


def _linears(texts: Sequence[str] | None) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(_split(texts)))
    for name in names:
        if name not in LINEARS:
            raise SpecError(f"unknown linear {name!r}: known are {', '.join(LINEARS)}")
    return names or DEFAULT_LINEARS


def _families(texts: Sequence[str] | None, gpu: GpuSpec) -> tuple[Family, ...]:
    names = _split(texts)
    known = [family.value for family in Family]
    for name in names:
        if name not in known:
            raise SpecError(f"unknown family {name!r}: known are {', '.join(known)}")
        if gpu.arch not in (archs := ARCHITECTURES[Family(name)]):
            raise SpecError(f"--family {name}: its kernels are for {', '.join(archs)}; {gpu.name} is {gpu.arch}")
    return tuple(family for family in Family if family.value in names) or tuple(Family)


def _tokens(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_TOKENS):
        raise SpecError(f"--tokens {text!r}: batch sizes are whole numbers from 1 to {MAX_TOKENS}, such as 1,16,512")
    return int(text)


def _load(text: str) -> str:
    if text not in GENERATORS and not Path(text).is_file():
        raise SpecError(
            f"unknown load {text!r}: known are {', '.join(GENERATORS)}, or the path of a trace; there is no such file"
        )
    return text


def _mix(text: str) -> Mix:
    parts = [part.partition(":") for part in text.split("+")]
    shares: dict[QuantScheme, float] = {}
    for name, colon, share in parts:
        scheme = schemes.parse(name.strip())
        try:
            value = float(share) if colon else 1.0
        except ValueError:
            value = -1.0
        if not 0 < value < 1e6:
            raise SpecError(f"--mixed {text!r}: the share {share!r} of {scheme.name} is not a positive number")
        if scheme in shares:
            raise SpecError(f"--mixed {text!r}: {scheme.name} is there twice")
        shares[scheme] = value
    if len(shares) < 2:
        raise SpecError(f"--mixed {text!r}: a mix has at least two schemes, joined by +")
    total = sum(shares.values())
    return Mix(shares=tuple((scheme, share / total) for scheme, share in shares.items()))


def _out(path: Path | None, gpu: GpuSpec) -> Path:
    if path is None:
        return Path(f"sweep-{gpu.name}.parquet")
    if path.suffix == ".parquet":
        if path.is_dir():
            raise SpecError(f"--out {path} is a folder whose name ends like a file's: give another name")
        return path
    if path.exists() and not path.is_dir():
        raise SpecError(f"--out {path} is a file that is no profile: give a name that ends in .parquet, or a folder")
    return path / "profile.parquet"
