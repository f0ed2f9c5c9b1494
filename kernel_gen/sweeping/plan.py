"""What a sweep is asked for (SweepRequest), and what follows from it: workloads, loads, and each one's configurations
ranked by the analytic model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np

from costmodel.analytic import launch_latencies
from costmodel.facts import BuildFacts
from kernel_gen.bundle import Bundle
from kernel_gen.legality import estimated_facts
from kernel_gen.space import ALL_FAMILIES, Effort, candidates, enumerate_configs, summarise
from kernel_gen.sweeping.candidates import Candidate, Workload, runs
from profiles.errors import SpecError, UnsupportedError
from profiles.gpus import GpuSpec
from profiles.kernels import Family, KernelConfig
from profiles.loads import GENERATORS, TokenLoad, generate, read_trace
from profiles.models import MODELS, MoeShape, find_model
from profiles.schemes import KERNEL_SCHEMES, QuantScheme

LINEARS = ("gate_up", "down", "shared_gate_up", "shared_down")
DEFAULT_LINEARS = LINEARS[:2]
LOADS_PER_WORKLOAD = 3
"""Of cells that are drawn by lot."""
DEFAULT_TOKENS = {
    Effort.QUICK: (1, 16, 64, 256, 1024, 4096),
    Effort.FULL: tuple(1 << exponent for exponent in range(14)),
}


class Backend(Enum):
    """Where latencies come from."""

    AUTO = "auto"
    CUDA = "cuda"
    PREDICT = "predict"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Several schemes in one launch, with the share of the experts that each gets."""

    shares: tuple[tuple[QuantScheme, float], ...]

    @property
    def label(self) -> str:
        """The mix's one spelling, e.g. "w4a16_g128_sym:0.5+w8a8_g-1_sym:0.5"."""
        return "+".join(f"{scheme.name}:{share:g}" for scheme, share in self.shares)

    def assign(self, num_experts: int, seed: int) -> tuple[QuantScheme, ...]:
        """One scheme per expert: shares rounded so that the counts add up and every scheme has an expert, experts
        shuffled by the seed. SpecError for fewer experts than schemes.
        """
        if num_experts < len(self.shares):
            raise SpecError(f"--mixed {self.label} needs at least {len(self.shares)} experts; there are {num_experts}")
        ends = np.rint(np.cumsum([share for _, share in self.shares]) * num_experts).astype(int)
        for index in range(len(ends)):  # every scheme keeps an expert, and leaves one for each scheme after it
            ends[index] = min(
                max(ends[index], (ends[index - 1] if index else 0) + 1), num_experts - (len(ends) - 1 - index)
            )
        counts = np.diff(ends, prepend=0)
        ordered = [scheme for (scheme, _), count in zip(self.shares, counts, strict=True) for _ in range(count)]
        return tuple(ordered[index] for index in np.random.default_rng(seed).permutation(num_experts))


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRequest:
    """Everything a sweep depends on. `loads` are generators' names or traces' paths; `limit_s` bounds one candidate;
    `tries` configurations are measured per workload and load, as many as the effort says by default. `shuffle`:
    workloads in an order drawn by lot. `num_cells`: of all that, so many cells drawn by lot; None: every one.
    """

    gpu: GpuSpec
    models: tuple[MoeShape, ...]
    linears: tuple[str, ...]
    tokens: tuple[int, ...]
    loads: tuple[str, ...]
    seed: int
    schemes: tuple[QuantScheme, ...]
    mixes: tuple[Mix, ...]
    effort: Effort
    out: Path
    bundle: Bundle | None = None
    limit_s: float = 30.0
    tries: int | None = None
    families: tuple[Family, ...] = ALL_FAMILIES
    shuffle: bool = False
    num_cells: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadCase:
    """One load of a workload: its kind without the token count ("uniform"), the tokens of the batch, and the rows each
    expert gets.
    """

    kind: str
    tokens: int
    load: TokenLoad


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One workload under one load, with every configuration that can run it, best first by the analytic model.

    `prices_us` are its latencies, in the same order, over the facts known when the plan was made.
    """

    workload: Workload
    case: LoadCase
    configs: tuple[KernelConfig, ...]
    prices_us: tuple[float, ...]

    def candidate(self, config: KernelConfig) -> Candidate:
        """One of the configurations as a candidate."""
        return Candidate(workload=self.workload, load=self.case.load, config=config)


def default_schemes(
    gpu: GpuSpec, effort: Effort, bundle: Bundle | None, families: tuple[Family, ...] = ALL_FAMILIES
) -> tuple[QuantScheme, ...]:
    """Every scheme with a kernel for `gpu`, or in the bundle, by itself. UnsupportedError when there is none."""
    if bundle is not None:
        found = tuple(
            scheme for scheme in KERNEL_SCHEMES if any(kernel.spec.schemes == (scheme,) for kernel in bundle.kernels)
        )
    else:
        found = tuple(scheme for scheme in KERNEL_SCHEMES if candidates((scheme,), gpu, effort, families=families))
    if not found and bundle is None:
        _, why = next(enumerate_configs(KERNEL_SCHEMES[:1], gpu, effort))
        raise UnsupportedError(f"kernels for {gpu.name}", why)
    return found


def plan(request: SweepRequest) -> list[Cell]:
    """Every cell, workload by workload (what is prepared for one serves all of its loads), its configurations ranked.

    UnsupportedError, with every reason, for a scheme or mix without a legal configuration; SpecError for loads that do
    not fit a model.
    """
    asked: list[tuple[Workload, Sequence[LoadCase]]] = []
    for model in request.models:
        for linear in request.linears:
            cases = list(load_cases(request, model, linear))
            asked += [(workload, cases) for workload in _workloads(request, model, linear)]
    rng = np.random.default_rng(request.seed)
    if request.shuffle or request.num_cells is not None:
        asked = [asked[index] for index in rng.permutation(len(asked))]
    if request.num_cells is not None:
        asked = _drawn(asked, request.num_cells, rng)
    return [cell for workload, cases in asked for cell in _ranked(request, workload, cases)]


def _drawn(
    asked: Sequence[tuple[Workload, Sequence[LoadCase]]], number: int, rng: np.random.Generator
) -> list[tuple[Workload, Sequence[LoadCase]]]:
    """Workloads with a few of their loads each, by lot: a few, since what is prepared for a workload serves all of its
    loads, and many alike would say little. The schemes, linears, batch sizes and kinds of loads that came least often
    come next, so that wherever a sweep stops it has about as much of each. Fewer cells are the first ones of more.
    """
    drawn: list[tuple[Workload, Sequence[LoadCase]]] = []
    of_scheme, of_linear = Counter[str](), Counter[tuple[str, str]]()
    of_tokens, of_kind = Counter[int](), Counter[str]()
    left = list(asked)
    while left and number > 0:
        rarity = [of_scheme[work.label] + of_linear[work.model, work.linear] for work, _ in left]
        work, cases = left.pop(rarity.index(min(rarity)))
        of_scheme[work.label] += 1
        of_linear[work.model, work.linear] += 1
        some = [cases[index] for index in rng.permutation(len(cases))]
        picked: list[LoadCase] = []
        while some and len(picked) < min(LOADS_PER_WORKLOAD, number):
            rarest = min(some, key=lambda case: (of_tokens[case.tokens], of_kind[case.kind]))
            some.remove(rarest)
            of_tokens[rarest.tokens] += 1
            of_kind[rarest.kind] += 1
            picked.append(rarest)
        drawn.append((work, sorted(picked, key=cases.index)))
        number -= len(picked)
    return drawn


def load_cases(request: SweepRequest, model: MoeShape, linear: str) -> Iterator[LoadCase]:
    """The loads of one linear; a shared expert gets every token, whatever the load."""
    shared = linear.startswith("shared_")
    seen: set[tuple[int, ...]] = set()
    for kind in request.loads:
        for case in _generated(request, model, kind) if kind in GENERATORS else _traced(model, Path(kind)):
            load, tokens = case.load, case.tokens
            if shared:
                load = TokenLoad(tokens_per_expert=(tokens,), source=f"every token, {tokens} tokens", num_tokens=tokens)
            if (
                load.tokens_per_expert not in seen
            ):  # one candidate cannot be two rows: with one token, two kinds of load may be the same
                seen.add(load.tokens_per_expert)
                yield LoadCase(kind="every token" if shared else case.kind, tokens=case.tokens, load=load)


def _generated(request: SweepRequest, model: MoeShape, kind: str) -> Iterator[LoadCase]:
    whole, ranks = _whole(model)
    for tokens in request.tokens:
        share = _share(generate(kind, whole.num_experts, tokens, whole.top_k, request.seed), ranks)
        if share.total:
            yield LoadCase(kind=kind, tokens=tokens, load=share)


def _traced(model: MoeShape, path: Path) -> Iterator[LoadCase]:
    whole, ranks = _whole(model)
    for layer, load in read_trace(path).items():
        if load.num_experts != whole.num_experts:
            raise SpecError(
                f"{path}: {load.source} has {load.num_experts} experts, {whole.name} has {whole.num_experts}"
            )
        share = _share(load, ranks)
        if share.total:
            yield LoadCase(kind=f"{path.name} layer {layer}", tokens=-(-load.total // whole.top_k), load=share)


def _share(load: TokenLoad, ranks: int) -> TokenLoad:
    return load if ranks == 1 else load.expert_parallel(ranks, 0)


def _whole(model: MoeShape) -> tuple[MoeShape, int]:
    """The model that an expert-parallel slice is of, and its ranks: rank 0 gets its share of the whole model's load."""
    sliced = re.search(r"-ep([1-9]\d*)", model.name, re.ASCII)
    if sliced is None or (name := model.name.replace(sliced[0], "")).split("-tp")[0] not in MODELS:
        return model, 1
    return find_model(name), int(sliced[1])


def _workloads(request: SweepRequest, model: MoeShape, linear: str) -> Iterator[Workload]:
    gemm = next((gemm for gemm in model.layer_gemms(1) if gemm.name == linear), None)
    if gemm is None:
        raise SpecError(f"model {model.name} has no shared experts, so no linear {linear}")

    def workload(schemes: tuple[QuantScheme, ...], label: str) -> Workload:
        return Workload(
            model=model.name,
            linear=linear,
            num_experts=gemm.num_experts,
            n=gemm.shape.n,
            k=gemm.shape.k,
            schemes=schemes,
            label=label,
        )

    for scheme in request.schemes:
        yield workload((scheme,), scheme.name)
    for mix in request.mixes:
        if gemm.num_experts > 1:  # a shared expert cannot be of two schemes
            yield workload(mix.assign(gemm.num_experts, request.seed), mix.label)


def _ranked(request: SweepRequest, workload: Workload, cases: Sequence[LoadCase]) -> list[Cell]:
    facts = _known_facts(request, workload)
    configs = list(facts)
    launches = [
        Candidate(workload=workload, load=case.load, config=config).launch(facts[config])
        for case in cases
        for config in configs
    ]
    latency_us = launch_latencies(request.gpu, launches)["latency_us"].to_numpy().reshape(len(cases), len(configs))
    ranks = np.argsort(latency_us, axis=1, kind="stable")
    return [
        Cell(
            workload=workload,
            case=case,
            configs=tuple(configs[index] for index in order),
            prices_us=tuple(prices[order].tolist()),
        )
        for case, order, prices in zip(cases, ranks, latency_us, strict=True)
    ]


def _known_facts(request: SweepRequest, workload: Workload) -> dict[KernelConfig, BuildFacts]:
    """The configurations to consider: those of the bundle with their facts, else the legal ones of the space with
    estimates.
    """
    if request.bundle is not None:
        built = {
            kernel.spec.config: kernel.facts
            for kernel in request.bundle.kernels
            if runs(kernel.spec.schemes, kernel.spec.max_experts, workload)
        }
        if not built:
            raise SpecError(
                f"{request.bundle.path} has no kernel for {workload.label}:"
                " build one, or leave the scheme out with --schemes"
            )
        return built
    families = request.families
    legal = candidates(workload.slots, request.gpu, request.effort, max_experts=workload.max_experts, families=families)
    if not legal:
        enumerated = list(
            enumerate_configs(
                workload.slots, request.gpu, request.effort, max_experts=workload.max_experts, families=families
            )
        )
        raise UnsupportedError(
            f"{workload.label} on {request.gpu.name}", [example for _, _, example in summarise(enumerated).by_kind]
        )
    return {
        config: estimated_facts(config, workload.slots, request.gpu, max_experts=workload.max_experts)
        for config in legal
    }
