"""Token loads by name for one model, and what launches cost under them: predicted, or looked up in a profile."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from allocator.problem import Floats, Ints
from costmodel.launches import Launch
from costmodel.model_file import FittedModel
from costmodel.pricing import cost_table
from costmodel.table import CostTable, PricedLaunch
from kernel_gen.legality import estimated_facts, reasons
from kernel_gen.select import table_size
from kernel_gen.space import Effort, candidates
from profiles import kernels
from profiles.errors import DataError, SpecError
from profiles.gpus import GpuSpec
from profiles.gpus import gpu as find_gpu
from profiles.kernels import GemmShape
from profiles.loads import TokenLoad
from profiles.models import MoeShape
from profiles.schemes import QuantScheme

BATCH_TOKENS = {"decode": 64, "prefill": 4096}
"""Tokens of a batch that the two usual loads have."""
MOST_DRAWS, DRAWN_ROWS = 1024, 1 << 21
"""Batches that a typical load is the mean of: so many, fewer where their rows are more; one a layer at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch that a load is made of. skew_percentile: of such batches the one that is more skewed than so many in a
    hundred; None: their mean.
    """

    num_tokens: int
    skew_percentile: int | None = None

    def load(self, trace: Mapping[int, TokenLoad], shape: MoeShape, name: str) -> TokenLoad:
        """`typical_load` or `skewed_load`."""
        if self.skew_percentile is None:
            return typical_load(trace, shape, self.num_tokens, name)
        return skewed_load(trace, shape, self.num_tokens, self.skew_percentile, name)


def parse_loads(text: str) -> dict[str, Batch]:
    """Batches by name, of `decode,prefill`, `decode=32,long=16384` or `decode=32@p95`. SpecError: a name without a
    number that is not a usual one, twice the same name, not a number, or a percentile that is not from 1 to 99.
    """
    found: dict[str, Batch] = {}
    for part in text.split(","):
        batch, at, percentile = (piece.strip() for piece in part.partition("@"))
        name, equals, number = (piece.strip() for piece in batch.partition("="))
        if not name or name in found:
            raise SpecError(f"--loads {text}: {part.strip()!r} has no name, or one that was there before")
        if equals and not (number.isascii() and number.isdigit() and int(number) > 0):
            raise SpecError(f"--loads {text}: {name} needs a number of tokens of at least 1, such as {name}=64")
        if not equals and name not in BATCH_TOKENS:
            raise SpecError(
                f"--loads {text}: {', '.join(BATCH_TOKENS)} are known; give {name} a number of tokens, {name}=64"
            )
        if at and not (percentile[:1] == "p" and percentile[1:].isdecimal() and 1 <= int(percentile[1:]) <= 99):
            raise SpecError(f"--loads {text}: a percentile of the routing skew is @p1 to @p99, not @{percentile}")
        tokens = int(number) if equals else BATCH_TOKENS[name]
        found[name] = Batch(num_tokens=tokens, skew_percentile=int(percentile[1:]) if at else None)
    return found


def loads_of(text: str, trace: Mapping[int, TokenLoad], shape: MoeShape) -> dict[str, TokenLoad]:
    """The loads that `--loads` names. Raises what `parse_loads` and `typical_load` do."""
    return {name: batch.load(trace, shape, name) for name, batch in parse_loads(text).items()}


def typical_load(trace: Mapping[int, TokenLoad], shape: MoeShape, num_tokens: int, name: str) -> TokenLoad:
    """A batch as routing deals it out on average: experts by falling count, as many of them idle as in real batches.

    A token takes top_k different experts, each with a probability of top_k times its share of its layer's trace; tokens
    are independent. Batches of every layer are drawn so; their sorted counts are averaged over draws and layers, and
    rounded by largest remainder. Of a layer with probabilities q, sum(1 - (1 - q)^num_tokens) experts are active on
    average. No expert gets more than `num_tokens` rows. Seeded: the same trace, the same load.

    Raises:
        SpecError: no tokens. DataError: the trace has no layer, one without tokens, or another number of experts.
    """
    mean = _batches(trace, shape, num_tokens, name).mean(axis=0)
    counts = np.floor(mean).astype(np.int64)
    counts[np.argsort(counts - mean, kind="stable")[: num_tokens * shape.top_k - int(counts.sum())]] += 1
    return TokenLoad(tokens_per_expert=tuple(counts.tolist()), source=name)


def skewed_load(
    trace: Mapping[int, TokenLoad], shape: MoeShape, num_tokens: int, percentile: int, name: str
) -> TokenLoad:
    """Of the batches that a typical load is the mean of, the one whose spread (`TokenLoad.spread`) is above that of
    `percentile` in a hundred, over all draws and layers. Raises what `typical_load` does.
    """
    batches = _batches(trace, shape, num_tokens, name)
    order = np.argsort(batches.std(axis=1), kind="stable")  # every batch has the same mean
    at = order[min(len(order) * percentile // 100, len(order) - 1)]
    return TokenLoad(tokens_per_expert=tuple(batches[at].tolist()), source=name)


def _batches(trace: Mapping[int, TokenLoad], shape: MoeShape, num_tokens: int, name: str) -> Ints:
    """[draws of all layers, experts], each sorted by falling count."""
    if num_tokens < 1:
        raise SpecError(f"load {name}: at least 1 token is needed, not {num_tokens}")
    if not trace or any(load.num_experts != shape.num_experts or not load.total for load in trace.values()):
        raise DataError(f"the trace has other than the {shape.num_experts} experts of {shape.name}, or no tokens")
    draws = max(1, min(MOST_DRAWS, DRAWN_ROWS // (num_tokens * shape.top_k)) // len(trace))
    rng = np.random.default_rng(0)
    found = []
    for load in trace.values():
        chances = _chances(np.asarray(load.tokens_per_expert, dtype=np.float64), shape.top_k)
        found += [_drawn(chances, num_tokens, shape.top_k, rng) for _ in range(draws)]
    return np.sort(np.array(found), axis=1)[:, ::-1]


def _chances(tokens: Floats, top_k: int) -> Floats:
    """How probably a token takes each expert, [experts]: as its tokens, at most 1, top_k in all. Where fewer than top_k
    experts have tokens, the others share the rest evenly.
    """
    certain = np.zeros(len(tokens), dtype=np.bool_)
    chances = np.zeros(len(tokens))
    while (left := top_k - int(certain.sum())) > 0:
        weights = np.where(certain, 0.0, tokens)
        weights = weights if weights.any() else np.where(certain, 0.0, 1.0)
        chances = np.where(certain, 1.0, left * weights / weights.sum())
        if not (chances > 1).any():
            break
        certain |= chances > 1
    return np.minimum(np.where(certain, 1.0, chances), 1.0)


def _drawn(chances: Floats, num_tokens: int, top_k: int, rng: np.random.Generator) -> Ints:
    """Rows of each expert, [experts]. Systematic sampling (Madow 1949) gives every token different experts with exactly
    these chances: the experts lie on a line, each as long as its chance, and a token takes those at u, u + 1, ...
    """
    order = rng.permutation(len(chances))
    ends = np.cumsum(chances[order])
    at = rng.random(num_tokens)[:, None] + np.arange(top_k)
    hit = np.searchsorted(ends * (top_k / ends[-1]), at.ravel(), side="right")
    return np.bincount(order[np.minimum(hit, len(order) - 1)], minlength=len(order))


def by_share(load: TokenLoad) -> tuple[int, ...]:
    """Experts by falling share of a layer's tokens: a `typical_load` gives its counts in this order."""
    return tuple(sorted(range(load.num_experts), key=lambda expert: -load.tokens_per_expert[expert]))


def predicted_table(
    gpu: GpuSpec,
    shape: MoeShape,
    loads: Mapping[str, TokenLoad],
    schemes: Sequence[QuantScheme],
    *,
    effort: Effort = Effort.QUICK,
) -> CostTable:
    """The analytic model's latencies of every linear, the shared experts' too, for each scheme that has kernels on the
    GPU. Build facts are estimates.

    Raises:
        SpecError: no scheme has a kernel there.
    """
    launches, size = [], table_size(shape.num_experts)
    for scheme in schemes:
        for config in candidates((scheme,), gpu, effort, max_experts=size):
            facts = estimated_facts(config, (scheme,), gpu, max_experts=size)
            if facts.ctas_per_sm < 1:
                continue
            for scenario, load in loads.items():
                for gemm in shape.layer_gemms(1):
                    shared = gemm.name.startswith("shared_")
                    tokens = load.total // shape.top_k
                    one = TokenLoad(tokens_per_expert=(tokens,), source=load.source) if shared else load
                    launch = Launch(
                        shape=GemmShape(m=one.total, n=gemm.shape.n, k=gemm.shape.k),
                        load=one,
                        schemes=(scheme,),
                        config=config,
                        facts=facts,
                    )
                    launches.append(PricedLaunch(model=shape.name, linear=gemm.name, scenario=scenario, launch=launch))
    if not launches:
        raise SpecError(f"none of {', '.join(scheme.name for scheme in schemes)} has a kernel for {gpu.name}")
    return CostTable.from_predictions(gpu, launches)


def learned_table(
    fitted: FittedModel, shape: MoeShape, loads: Mapping[str, TokenLoad], schemes: Sequence[QuantScheme]
) -> CostTable:
    """A fitted model's latencies of every linear, the shared experts' too: each scheme's fastest configuration of
    the quick space and of those that the model was fitted on with the scheme.

    Raises:
        SpecError: no scheme has a kernel there.
    """
    gpu, size = find_gpu(fitted.gpu), table_size(shape.num_experts)
    configs = {}
    for scheme in schemes:
        seen = [kernels.parse(name) for name in fitted.configs.get(scheme.name, ())]
        legal = [config for config in seen if not reasons(config, (scheme,), gpu, max_experts=size)]
        configs[scheme] = list(dict.fromkeys([*candidates((scheme,), gpu, Effort.QUICK, max_experts=size), *legal]))
    known = [scheme for scheme in schemes if configs[scheme]]
    if not known:
        raise SpecError(f"none of {', '.join(scheme.name for scheme in schemes)} has a kernel for {gpu.name}")
    parts = [cost_table(fitted, shape, loads, known, configs=configs).frame()]
    if shape.num_shared_experts:
        alone = replace(shape, num_experts=1, top_k=1, intermediate_size=shape.shared_intermediate_size)
        every = {
            name: TokenLoad(tokens_per_expert=(load.total // shape.top_k,), source=load.source)
            for name, load in loads.items()
        }
        shared = cost_table(fitted, alone, every, known, configs=configs).frame()
        parts.append(shared.assign(linear="shared_" + shared["linear"]))
    return CostTable(pd.concat(parts, ignore_index=True))


def profiled_table(
    profile: pd.DataFrame, gpu: GpuSpec, shape: MoeShape, loads: Mapping[str, TokenLoad]
) -> tuple[CostTable, tuple[str, ...]]:
    """The fastest kernels that a profile has of this model, for each load the rows of the nearest batch size.

    Gives the table and, where a load is not exactly one of the profile's, a sentence that says which was taken.

    Raises:
        DataError: the profile has no rows of this model on this GPU.
    """
    rows = profile[(profile["model"] == shape.name) & (profile["gpu"] == gpu.name)]
    if rows.empty:
        have = ", ".join(sorted(set(profile["model"].astype(str)))) or "nothing"
        raise DataError(
            f"the profile has no rows of {shape.name} on {gpu.name}; it has {have}: measure with"
            f" python -m kernel_gen.sweep --gpu {gpu.name} --model DIR, or leave --profile out to predict"
        )
    shared = rows["linear"].str.startswith("shared_").to_numpy(dtype=np.bool_)
    totals = np.array([int(np.sum(tokens)) for tokens in rows["tokens_per_expert"]])
    totals //= np.where(shared, 1, shape.top_k)
    parts: list[pd.DataFrame] = []
    notes: list[str] = []
    for name, load in loads.items():
        wanted = load.total // shape.top_k
        nearest = min(totals.tolist(), key=lambda tokens: abs(math.log(max(tokens, 1) / wanted)))
        if nearest != wanted:
            notes.append(f"{name}: no rows of {wanted} tokens in the profile, those of {nearest} are taken")
        parts.append(rows[totals == nearest].assign(load_source=name))
    return CostTable.from_profile(pd.concat(parts, ignore_index=True)), tuple(notes)
