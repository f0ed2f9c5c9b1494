"""From a GPU and a model to a bundle of kernels: enumerate, reject with reasons, compile what the cache lacks, gate,
link.

`build` does it; `python -m kernel_gen.build` is `build` with a progress bar and a table. Interrupted at any moment, it
keeps every finished kernel: the same command continues.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from kernel_gen import build_report
from kernel_gen.bundle import Bundle, RefusedKernel, write_bundle
from kernel_gen.cache import KernelCache, default_cache_dir
from kernel_gen.compiler import Artifact, dsl_version
from kernel_gen.gate import rejections
from kernel_gen.kernels import KernelSpec
from kernel_gen.linker import check_installed
from kernel_gen.pool import Failure, Outcome, compile_all
from kernel_gen.select import table_size
from kernel_gen.space import Effort, enumerate_configs
from kernel_gen.sweeping.progress import Phase, phase
from kernel_gen.timing import monotonic_s
from profiles import schemes
from profiles.atomic import require_writable
from profiles.errors import SpecError, UnsupportedError, UserError
from profiles.gpus import GpuSpec, gpu
from profiles.interrupt import INTERRUPTED, interruptible
from profiles.kernels import KernelConfig
from profiles.models import MoeShape, find_model
from profiles.records import Status
from profiles.schemes import KERNEL_SCHEMES, QuantScheme

EPILOG = """examples:
  python -m kernel_gen.build --gpu rtx4090 --model qwen1.5-moe-a2.7b --out bundle
  python -m kernel_gen.build --gpu rtx4090 --model mixtral-8x7b --out bundle --schemes w4a16_g128_sym,w8a8_g-1_sym
  python -m kernel_gen.build --gpu l40s --model ./config.json --out bundle --schemes w4a16_g128_asym+w8a8_g-1_sym
  python -m kernel_gen.build --gpu rtx4090 --model olmoe-1b-7b --out bundle --effort full --explain > rejections.txt

Kernels are kept in $BITILE_CACHE, else in ~/.cache/bitile, and compiled once. Ctrl-C loses nothing that is finished.

exit codes: 0 a bundle was written (rejections are counted, not errors); 1 it was, but some kernel could not be
compiled; 2 a mistake in the command; 130 interrupted"""

Slots = tuple[QuantScheme, ...]
"""The schemes of one kernel, one a slot."""
Track = Callable[[int], AbstractContextManager[Phase]]
"""Shows progress: given the number of steps, a context that is told of each."""
EVERY_SCHEME: tuple[Slots, ...] = tuple((scheme,) for scheme in KERNEL_SCHEMES)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """What to build. Kernels take N, K and the number of tokens when they run: of the model, only its number of experts
    matters.
    """

    gpu: GpuSpec
    model: MoeShape
    out_dir: Path
    slots: tuple[Slots, ...]
    effort: Effort = Effort.QUICK
    jobs: int | None = None

    @property
    def max_experts(self) -> int:
        """Experts that the kernels have room for."""
        return table_size(self.model.num_experts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A configuration that the rules reject for these schemes, before any compiler saw it."""

    slots: Slots
    config: KernelConfig
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a request comes to: the kernels to build, and what the rules rejected."""

    specs: tuple[KernelSpec, ...]
    rejected: tuple[Rejected, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedKernels:
    """What became of some kernels: those that may run, and those that may not or could not be compiled."""

    kept: tuple[Artifact, ...]
    refused: tuple[RefusedKernel, ...]
    num_cached: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildResult:
    """A finished build. `num_cached` of the plan's kernels were there already; `seconds` is the whole build's wall
    time.
    """

    plan: Plan
    bundle: Bundle
    num_cached: int
    seconds: float

    @property
    def failures(self) -> tuple[RefusedKernel, ...]:
        """Kernels that the gate never saw: the compiler refused them, or its process died or hung."""
        return tuple(item for item in self.bundle.refused if item.status is not Status.REJECTED)


class _Silent:
    def step(self, note: str = "") -> None:
        """Show nothing."""


def silent(num_kernels: int) -> AbstractContextManager[Phase]:
    """No progress is shown."""
    return nullcontext(_Silent())


def make_plan(request: BuildRequest) -> Plan:
    """Enumerate and reject. UnsupportedError, with every kind of reason, when nothing can be generated for this GPU and
    these schemes.
    """
    specs, rejected = [], []
    for slots in request.slots:
        for config, reasons in enumerate_configs(slots, request.gpu, request.effort, max_experts=request.max_experts):
            if reasons:
                rejected.append(Rejected(slots=slots, config=config, reasons=reasons))
            else:
                specs.append(
                    KernelSpec(config=config, schemes=slots, arch=request.gpu.arch, max_experts=request.max_experts)
                )
    if not specs:
        kinds = build_report.count_kinds(item.reasons for item in rejected)
        raise UnsupportedError(
            f"any of {len(rejected)} kernels for {request.gpu.name}", [kind.example for kind in kinds]
        )
    return Plan(specs=tuple(specs), rejected=tuple(rejected))


def compile_and_gate(
    specs: Sequence[KernelSpec], gpu: GpuSpec, cache: KernelCache, *, jobs: int | None = None, track: Track = silent
) -> GatedKernels:
    """Compile what the cache lacks, in parallel, and judge every kernel by the gate.

    `track(n)` gives the context in which n kernels are compiled and that is told of each. DataError for a cache that
    cannot be written, such as on a full disk.
    """
    outcomes: dict[KernelSpec, Outcome] = {
        spec: artifact for spec in specs if (artifact := cache.get(spec)) is not None
    }
    missing = [spec for spec in specs if spec not in outcomes]
    with track(len(missing)) as phase:
        compiled = compile_all(missing, cache, jobs=jobs, on_outcome=lambda outcome: phase.step(outcome.spec.label))
    outcomes |= {outcome.spec: outcome for outcome in compiled}
    kept: list[Artifact] = []
    refused: list[RefusedKernel] = []
    for spec in specs:
        outcome = outcomes[spec]
        if isinstance(outcome, Failure):
            refused.append(RefusedKernel(spec=spec, status=outcome.status, reasons=(outcome.error,)))
        elif reasons := rejections(outcome.code, spec, gpu):
            refused.append(RefusedKernel(spec=spec, status=Status.REJECTED, reasons=reasons))
        else:
            kept.append(outcome)
    return GatedKernels(kept=tuple(kept), refused=tuple(refused), num_cached=len(specs) - len(missing))


def build(request: BuildRequest, plan: Plan, cache: KernelCache, *, track: Track = silent) -> BuildResult:
    """Compile, gate, and write the bundle. A rejection by the gate, or a kernel that cannot be compiled, is recorded in
    the bundle with its reasons. SpecError for a file where the folder should be, DataError for a folder that cannot be
    written, before anything is compiled; UserError when no kernel is left; OSError when a disk is full.
    """
    started = monotonic_s()
    if request.out_dir.exists() and not request.out_dir.is_dir():
        raise SpecError(f"{request.out_dir} is a file: name a folder for the bundle")
    dsl_version()
    check_installed()
    require_writable(request.out_dir)
    gated = compile_and_gate(plan.specs, request.gpu, cache, jobs=request.jobs, track=track)
    bundle = write_bundle(request.out_dir, request.gpu, gated.kept, gated.refused)
    return BuildResult(plan=plan, bundle=bundle, num_cached=gated.num_cached, seconds=monotonic_s() - started)


def parse_slots(text: str) -> tuple[Slots, ...]:
    """`--schemes`: names separated by commas; names joined by + share one kernel, a slot each. SpecError for what is
    not a scheme, or is there twice.
    """
    found = tuple(tuple(schemes.parse(name.strip()) for name in kernel.split("+")) for kernel in text.split(","))
    for slots in found:
        if len(set(slots)) != len(slots):
            raise SpecError(
                f"--schemes names a scheme twice in one kernel: {'+'.join(scheme.name for scheme in slots)}"
            )
    return tuple(dict.fromkeys(found))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0 when a bundle was written, 1 when it was but some kernel could not be compiled, 2 on
    a user's mistake, 130 on Ctrl-C.

    What the rules or the gate reject is no failure: it is counted, and kept in the manifest.
    """
    options = _parser().parse_args(argv)
    try:
        request = BuildRequest(
            gpu=gpu(options.gpu),
            model=find_model(options.model),
            out_dir=options.out,
            slots=EVERY_SCHEME if options.schemes is None else parse_slots(options.schemes),
            effort=Effort(options.effort),
            jobs=options.jobs,
        )
        return _run(request, explain=options.explain, as_json=options.json)
    except UserError as error:
        print(f"kernel_gen.build: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"kernel_gen.build: {error.filename or options.out}: {error.strerror}; finished kernels are kept",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("kernel_gen.build: interrupted; finished kernels are kept, the same command continues", file=sys.stderr)
        return INTERRUPTED


def _run(request: BuildRequest, *, explain: bool, as_json: bool) -> int:
    plan = make_plan(request)
    if explain:
        build_report.print_rejected(plan, file=sys.stderr if as_json else sys.stdout)
    result = build(
        request,
        plan,
        KernelCache(root=default_cache_dir()),
        track=lambda num_kernels: phase("compiling", num_kernels, live=True),
    )
    if as_json:
        print(json.dumps(build_report.summary(request, result), indent=1))
    else:
        build_report.print_result(request, result, explain=explain)
    return 1 if result.failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kernel_gen.build",
        description="Compile the kernels for a GPU, which need not be here, and link them into a bundle, "
        "which a machine without a compiler can run.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gpu", required=True, help="the GPU to build for, such as rtx4090")
    parser.add_argument(
        "--model", required=True, help="a known model's name, or the path of a Hugging Face config.json"
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="the bundle's folder; a bundle that is there is replaced"
    )
    parser.add_argument(
        "--schemes",
        metavar="A,B+C",
        help="schemes, one kernel each; + joins schemes in one kernel (default: every scheme)",
    )
    parser.add_argument(
        "--effort",
        choices=[effort.value for effort in Effort],
        default=Effort.QUICK.value,
        help="how many configurations",
    )
    parser.add_argument("--explain", action="store_true", help="show every rejection with its reasons")
    parser.add_argument(
        "--jobs",
        type=_positive,
        metavar="N",
        help="compile in at most N processes (default: what cores and memory allow)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


if __name__ == "__main__":
    sys.exit(interruptible(main))
