"""Finalists measured on a GPU: each layer's linears as the one launch of many schemes that they are.

`python -m allocator.latency` runs where the GPU is; it needs allocations and a routing trace, no checkpoint. Weights
are random, since values do not change a kernel's time; every launch is checked against fp32 before it is timed, by the
rules of the sweep (kernel_gen.measure).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from allocator.allocation import Allocation
from allocator.command import check_outputs
from allocator.latencies import Latencies, LaunchTime, digest_of
from allocator.report_data import launch_name
from allocator.scenarios import by_share, loads_of
from costmodel.analytic import launch_latencies
from kernel_gen.legality import estimated_facts, reasons
from kernel_gen.space import Effort, candidates
from kernel_gen.sweeping.builds import can_compile
from kernel_gen.sweeping.candidates import Candidate, Measurement, Workload
from kernel_gen.sweeping.detect import describe, installed_gpus, matching_gpus
from kernel_gen.sweeping.measuring import Bench, GpuBench
from kernel_gen.sweeping.predict import package_version
from profiles import gpus
from profiles.errors import DataError, SpecError, UserError
from profiles.gpus import GpuSpec
from profiles.interrupt import interruptible
from profiles.kernels import KernelConfig
from profiles.loads import TokenLoad, read_trace
from profiles.models import MoeShape, find_model
from profiles.records import Status
from profiles.schemes import QuantScheme

MOST_LAYERS = 4
TRIES = 4
LIMIT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured.

    Attributes:
        shape: the model's.
        gpu: where.
        loads: by scenario, the routed experts' load, experts by falling share (`typical_load`).
        trace: by layer, tokens of each expert: which expert is which of the load's.
        most_layers: layers that are measured, evenly spaced; totals are scaled to all.
        tries: configurations of each launch that are measured.
    """

    shape: MoeShape
    gpu: GpuSpec
    loads: Mapping[str, TokenLoad]
    trace: Mapping[int, TokenLoad]
    most_layers: int = MOST_LAYERS
    tries: int = TRIES

    def __post_init__(self) -> None:
        for name, value in (("layers", self.most_layers), ("tries", self.tries)):
            if value < 1:
                raise SpecError(f"{name}: at least 1 is needed, not {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Launch:
    """One launch of one allocation. configs: to be tried."""

    allocation: str
    layer: int
    scenario: str
    workload: Workload
    load: TokenLoad
    configs: tuple[KernelConfig, ...]

    @property
    def candidates(self) -> list[Candidate]:
        return [Candidate(workload=self.workload, load=self.load, config=config) for config in self.configs]


def why_not(gpu: GpuSpec) -> str | None:
    """Why nothing can be measured here, to be said; None where it can."""
    installed = installed_gpus()
    if not matching_gpus(gpu, installed):
        return f"no {gpu.name} here ({describe(installed)} found)"
    if not all(importlib.util.find_spec(name) for name in ("torch", "tvm_ffi")) or not can_compile():
        return f"an {gpu.name} is here, but not what compiles and runs kernels: pip install 'bitile[compile,torch]'"
    return None


def open_bench(gpu: GpuSpec) -> GpuBench:
    """This machine's GPUs of that kind, as a context manager. SpecError: see `why_not`."""
    reason = why_not(gpu)
    if reason is not None:
        raise SpecError(f"launches cannot be measured: {reason}")
    return GpuBench(gpu, matching_gpus(gpu, installed_gpus()), None, LIMIT_S)


def measure(allocations: Mapping[str, Allocation], plan: Plan, bench: Bench, *, live: bool = False) -> Latencies:
    """Every launch of every allocation under every load.

    Launches that are alike (the same schemes in the order of the load) are measured once.

    Raises:
        SpecError: no allocation. DataError: one is of another model, or of layers that the trace does not have.
    """
    if not allocations:
        raise SpecError("no allocation to measure")
    layers = sorted({block.layer for one in allocations.values() for block in one.assignment})
    spaced = np.linspace(0, len(layers) - 1, min(plan.most_layers, len(layers)))
    chosen = [layers[i] for i in np.unique(spaced.round().astype(int))]
    launches = [
        launch for name, one in allocations.items() for layer in chosen for launch in _launches(name, one, layer, plan)
    ]
    wanted = list(dict.fromkeys(candidate for launch in launches for candidate in launch.candidates))
    bench.build(wanted, live=live)
    found = _measured(wanted, bench)
    times, failures, broken = [], dict[str, None](), set[str]()
    for launch in launches:
        time = _fastest(launch, found)
        if isinstance(time, LaunchTime):
            times.append(time)
        else:
            failures[time] = None
            broken.add(launch.allocation)
    scale = len(layers) / len(chosen)
    return Latencies(
        model=plan.shape.name,
        gpu=plan.gpu.name,
        num_layers=len(layers),
        layers=tuple(chosen),
        total_us={
            name: {
                scenario: scale * sum(t.latency_us for t in times if (t.allocation, t.scenario) == (name, scenario))
                for scenario in plan.loads
            }
            for name in allocations
            if name not in broken
        },
        digests={name: digest_of(one) for name, one in allocations.items()},
        launches=tuple(times),
        failures=tuple(failures),
        versions=_versions(found),
    )


def _launches(name: str, allocation: Allocation, layer: int, plan: Plan) -> list[_Launch]:
    """One layer's, experts in the order of the loads."""
    shape = plan.shape
    if allocation.model != shape.name:
        raise DataError(f"{name} is an allocation of {allocation.model}, not of {shape.name}")
    if layer not in plan.trace or plan.trace[layer].num_experts != shape.num_experts:
        raise DataError(f"{name} has a layer {layer}, of which the trace has no {shape.num_experts} experts")
    order = by_share(plan.trace[layer])
    held: dict[str, dict[int, QuantScheme]] = {}
    for block, scheme in allocation.assignment.items():
        if block.layer == layer:
            held.setdefault(launch_name(block), {})[block.expert] = scheme
    made = []
    for gemm in shape.layer_gemms(1):
        if gemm.name not in held:
            continue
        experts = (-1,) if gemm.name.startswith("shared_") else order
        if set(held[gemm.name]) != set(experts):
            raise DataError(f"{name}: layer {layer} {gemm.name} has {len(held[gemm.name])} experts of {len(experts)}")
        schemes = tuple(held[gemm.name][expert] for expert in experts)
        workload = Workload(
            model=shape.name,
            linear=gemm.name,
            num_experts=len(experts),
            n=gemm.shape.n,
            k=gemm.shape.k,
            schemes=schemes if len(set(schemes)) > 1 else schemes[:1],
            label="+".join(f"{scheme.name}:{count}" for scheme, count in _counts(schemes).items()),
        )
        for scenario, load in plan.loads.items():
            if len(experts) == 1:
                tokens = load.total // shape.top_k
                load = TokenLoad(tokens_per_expert=(tokens,), source=f"every token, {tokens} tokens")
            own = {
                kernel.config for kernel in allocation.kernel_configs
                if kernel.scenario == scenario and kernel.linear == gemm.name and kernel.scheme in schemes
            }  # fmt: skip
            configs = _configs(workload, load, own, plan)
            made.append(
                _Launch(allocation=name, layer=layer, scenario=scenario, workload=workload, load=load, configs=configs)
            )
    return made


def _counts(schemes: Sequence[QuantScheme]) -> Counter[QuantScheme]:
    return Counter(sorted(schemes, key=lambda scheme: scheme.name))


def _configs(workload: Workload, load: TokenLoad, own: set[KernelConfig], plan: Plan) -> tuple[KernelConfig, ...]:
    """The allocation's own configurations that hold all the schemes, then the fastest by the analytic model."""
    size = workload.max_experts
    legal = candidates(workload.slots, plan.gpu, Effort.QUICK, max_experts=size)
    held = sorted((c for c in own if not reasons(c, workload.slots, plan.gpu, max_experts=size)), key=lambda c: c.name)
    every = list(dict.fromkeys((*held, *legal)))
    if not every:
        return ()
    launches = [
        Candidate(workload=workload, load=load, config=config).launch(
            estimated_facts(config, workload.slots, plan.gpu, max_experts=size)
        )
        for config in every
    ]
    price = dict(zip(every, launch_latencies(plan.gpu, launches)["latency_us"].tolist(), strict=True))
    ranked = sorted(every, key=lambda config: (config not in held, price[config]))
    return tuple(ranked[: plan.tries])


def _measured(wanted: Sequence[Candidate], bench: Bench) -> dict[Candidate, tuple[str, Measurement]]:
    """(kernel fingerprint, outcome) of each candidate."""
    found: dict[Candidate, tuple[str, Measurement]] = {}
    remaining = []
    for candidate in wanted:
        built = bench.find(candidate)
        if built is None:
            continue
        if built.failure is not None:
            found[candidate] = built.fingerprint, built.failure
        else:
            remaining.append(candidate)
            found[candidate] = built.fingerprint, Measurement.failed(Status.LAUNCH_ERROR, "not measured")
    if remaining:
        with bench.pool() as pool:
            for candidate, outcome in pool.run(remaining):
                found[candidate] = found[candidate][0], outcome
    return found


def _fastest(launch: _Launch, found: Mapping[Candidate, tuple[str, Measurement]]) -> LaunchTime | str:
    """The launch's time, or what is to be said of its failure."""
    outcomes = [(c, found[c][1]) for c in launch.candidates if c in found]
    good = [(c, o) for c, o in outcomes if o.status is Status.OK]
    where = f"{launch.allocation}, layer {launch.layer} {launch.workload.linear}, {launch.scenario}"
    if not good:
        why = "; ".join(dict.fromkeys(o.error for _, o in outcomes)) or "no configuration holds its schemes"
        return f"{where} ({launch.workload.label}): {why}"
    best, outcome = min(good, key=lambda pair: pair[1].latency_us or np.inf)
    assert outcome.latency_us is not None
    schemes = launch.workload.schemes * (launch.workload.num_experts if len(launch.workload.schemes) == 1 else 1)
    return LaunchTime(
        allocation=launch.allocation,
        layer=launch.layer,
        linear=launch.workload.linear,
        scenario=launch.scenario,
        experts={scheme.name: count for scheme, count in _counts(schemes).items()},
        config=best.config.name,
        latency_us=outcome.latency_us,
        p20_us=outcome.p20_us or outcome.latency_us,
        p80_us=outcome.p80_us or outcome.latency_us,
        tried=len(good),
    )


def _versions(found: Mapping[Candidate, tuple[str, Measurement]]) -> dict[str, str]:
    """Of this package, of what measured, and of the kernels, by family."""
    versions = {"bitile": package_version()}
    for candidate, (fingerprint, outcome) in found.items():
        versions[f"kernels, {candidate.config.family.value}"] = fingerprint
        versions |= {name: text for name, text in outcome.versions.items() if name != "reference_ratio"}
    return versions


def read_finalists(paths: Sequence[Path]) -> dict[str, Allocation]:
    """Allocations by name: of an allocation's file by the file's name, of a tuning's finalists by theirs.

    DataError: neither, or two of one name.
    """
    found: dict[str, Allocation] = {}
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not a readable JSON file ({error})") from error
        if not isinstance(content, dict) or not content:
            raise DataError(f"{path}: neither an allocation nor a tuning's finalists")
        several = content if "kind" not in content else {path.stem: content}
        for name, one in several.items():
            if name in found:
                raise DataError(f"{path}: there are two allocations called {name!r}")
            found[name] = Allocation.from_json(one, where=f"{path}: {name}")
    return found


def main(argv: Sequence[str] | None = None, *, bench: Bench | None = None) -> int:
    """The command line. Returns 0, or 2 on a user's mistake (its sentence on stderr).

    `bench`: measure there, whatever GPUs this machine has (tests have one without a GPU).
    """
    arguments = _parser().parse_args(argv)
    try:
        found = _run(arguments, bench)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found.to_json()) if arguments.json else f"{report(found)}\nwrote {arguments.out}")
    return 0


def _run(arguments: argparse.Namespace, bench: Bench | None) -> Latencies:
    check_outputs(arguments, "--out")
    allocations = read_finalists(arguments.allocation)
    shape = find_model(arguments.model or next(iter(allocations.values())).model)
    trace = read_trace(arguments.trace)
    loads = loads_of(arguments.loads, trace, shape)
    plan = Plan(
        shape=shape,
        gpu=gpus.gpu(arguments.gpu),
        loads=loads,
        trace=trace,
        most_layers=arguments.layers,
        tries=arguments.tries,
    )
    if bench is not None:
        found = measure(allocations, plan, bench, live=not arguments.json)
    else:
        with open_bench(plan.gpu) as own:
            found = measure(allocations, plan, own, live=not arguments.json)
    found.write(arguments.out)
    return found


def report(found: Latencies) -> str:
    """What the command prints."""
    scenarios = list(dict.fromkeys(time.scenario for time in found.launches))
    lines = [
        f"measured on {found.gpu}: launches of {found.extent}, us",
        f"{'':34}" + "".join(f"{name:>14}" for name in scenarios),
    ]
    for name, total in found.total_us.items():
        lines.append(f"{name:34}" + "".join(f"{total[scenario]:14.1f}" for scenario in scenarios))
    return "\n".join([*lines, *(f"failed: {failure}" for failure in found.failures)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m allocator.latency", description="Measure the launches of whole allocations on this GPU."
    )
    add = parser.add_argument
    add(
        "--allocation", required=True, nargs="+", type=Path, metavar="FILE", help="allocations, or a tuning's finalists"
    )
    add("--trace", required=True, type=Path, metavar="FILE", help="tokens per expert of every layer")
    add("--gpu", required=True, help=f"which GPU is meant: {', '.join(gpus.GPUS)}")
    add("--loads", default="decode,prefill", metavar="A,B=TOKENS", help="batches (default: %(default)s)")
    add("--model", metavar="DIR", help="a checkpoint folder, config.json or name (default: the allocation's model)")
    add("--layers", type=int, default=MOST_LAYERS, metavar="N", help="measured, evenly spaced (default: %(default)s)")
    add("--tries", type=int, default=TRIES, metavar="N", help="configurations a launch (default: %(default)s)")
    add("--out", required=True, type=Path, metavar="FILE", help="the latencies, JSON")
    add("--json", action="store_true", help="print them as one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(interruptible(main))
