"""Recorded mixed launches against their parts.

Part s of a launch is its experts of scheme s with their tokens; R_s is its roofline. From the recorded launches of
scheme s alone, on all experts of the same linear, comes the fraction f_s of the roofline that they reach.

* `roofline_share`: sum R_s / measured. What the mixed launch reaches of its parts' rooflines one after another.
* `excess`: measured / sum (R_s / f_s) - 1. What it costs beyond its parts at the efficiency of single-scheme launches.
  f_s is that of the fastest configuration for s, which one launch's single configuration cannot be for every s:
  `excess_same_config` takes f_s in the mixed launch's own configuration, where it was recorded.
* `speedup`: the same parts as one launch each, in sequence, over measured. Such launches were not recorded; each is
  estimated as the recorded launch of scheme s on all experts, scaled by the analytic latency model from that load to
  the part's, in its best configuration; the model's fixed cost of a launch (4.8 us and filling the pipeline) is in
  each. Without any fixed cost the estimate would be the sum above, and the speedup 1 / (1 + excess): the conservative
  one, `speedup_free`. Parallel streams were not recorded and cannot be derived.

Where the same load was not recorded for s, the recorded loads with the nearest tokens below and above are used: f_s is
the mean of theirs weighted by log tokens, and the launch is scaled from whichever gives the faster one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from bench.peers.recorded import SKEWED
from bench.peers.roofline import H200, Card, roofline
from costmodel.analytic import launch_latencies
from costmodel.facts import BuildFacts
from costmodel.launches import Launch
from kernel_gen.legality import estimated_facts
from profiles import gpus, kernels, schemes
from profiles.kernels import GemmShape, KernelConfig
from profiles.loads import TokenLoad
from profiles.schemes import QuantScheme

EXCESS_BAR, SPEEDUP_BAR = 0.03, 1.0
NEIGHBOURS_WITHIN = 4.0
"""How far, as a factor of tokens, a recorded load may be from the one that it stands for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The experts of one scheme in a mixed launch: tokens of every expert, 0 of the other schemes' experts."""

    scheme: QuantScheme
    tokens_per_expert: tuple[int, ...]


def parts_of(names: Sequence[str], counts: Sequence[int]) -> list[Part]:
    """The parts of a launch with one scheme name an expert, those with tokens."""
    parts = []
    for name in dict.fromkeys(names):
        own = tuple(int(count) if other == name else 0 for other, count in zip(names, counts, strict=True))
        if any(own):
            parts.append(Part(scheme=schemes.parse(name), tokens_per_expert=own))
    return parts


@dataclass(frozen=True, slots=True, eq=False)
class Alone:
    """The recorded launches of one scheme on all experts of a linear, for the loads that stand for a mixed one's."""

    scheme: QuantScheme
    launches: pd.DataFrame
    tokens: int

    @classmethod
    def of(cls, singles: pd.DataFrame, scheme: QuantScheme, launch: pd.Series) -> Alone | None:
        """Of the same load, else of its neighbours; None where nothing near was recorded."""
        same = singles[
            (singles["scheme"] == scheme.name)
            & (singles["model"] == launch["model"])
            & (singles["linear"] == launch["linear"])
            & (singles["load"] == launch["load"])
        ]
        tokens = int(launch["tokens"])
        known = same["tokens"].unique()
        below = max((count for count in known if count <= tokens), default=None)
        above = min((count for count in known if count >= tokens), default=None)
        near = {count for count in (below, above) if count is not None}
        if any(max(count / tokens, tokens / count) > NEIGHBOURS_WITHIN for count in near) or None in (below, above):
            return None
        return cls(scheme, same[same["tokens"].isin(near)], tokens)

    @property
    def is_exact(self) -> bool:
        """Whether the load itself was recorded."""
        return bool((self.launches["tokens"] == self.tokens).all())

    def fraction(self, card: Card, config: str | None = None) -> float:
        """Of the roofline, by the fastest configuration, or by one; NaN where that one was not recorded."""
        allowed = self.launches if config is None else self.launches[self.launches["config"] == config]
        if allowed["tokens"].nunique() < self.launches["tokens"].nunique():
            return math.nan
        best = allowed.loc[allowed.groupby("tokens")["latency_us"].idxmin()].sort_values("tokens")
        found: list[float] = [
            roofline(self.scheme, row["n"], row["k"], row["tokens_per_expert"], card).us / row["latency_us"]
            for _, row in best.iterrows()
        ]
        if len(found) == 1:
            return found[0]
        low, high = best["tokens"].iloc[0], best["tokens"].iloc[-1]
        weight = math.log(self.tokens / low) / math.log(high / low)
        return (1 - weight) * found[0] + weight * found[1]

    def scaled_us(self, part: Part) -> float:
        """A launch of the part alone, in the configuration that makes it the fastest."""
        gpu = gpus.gpu(H200.gpu)
        pairs: list[Launch] = []
        for _, row in self.launches.iterrows():
            config = kernels.parse(row["config"])
            facts = estimated_facts(config, (self.scheme,), gpu)
            for counts in (row["tokens_per_expert"], part.tokens_per_expert):
                pairs.append(_launch(self.scheme, int(row["n"]), int(row["k"]), counts, config, facts))
        modelled = launch_latencies(gpu, pairs)["latency_us"].to_numpy()
        return float((self.launches["latency_us"].to_numpy() * modelled[1::2] / modelled[0::2]).min())


def _launch(
    scheme: QuantScheme, n: int, k: int, counts: Sequence[int], config: KernelConfig, facts: BuildFacts
) -> Launch:
    load = TokenLoad(tokens_per_expert=tuple(map(int, counts)), source="a part")
    return Launch(shape=GemmShape(m=load.total, n=n, k=k), load=load, schemes=(scheme,), config=config, facts=facts)


def compare_mixed(launches: pd.DataFrame, card: Card = H200) -> pd.DataFrame:
    """One row a (model, linear, tokens, mix): the fastest recorded mixed launch of skewed loads against its parts."""
    skewed = launches[launches["load"] == SKEWED].copy()
    is_mixed = skewed["schemes"].map(len) > 1
    singles, mixed = skewed[~is_mixed].copy(), skewed[is_mixed].copy()
    singles["scheme"] = singles["schemes"].str[0]
    mixed["assignment"] = mixed["schemes"].map(tuple)
    best = mixed.loc[mixed.groupby(["model", "linear", "tokens", "assignment"])["latency_us"].idxmin()]
    rows = [_row(launch, singles, card) for _, launch in best.iterrows()]
    frame = pd.DataFrame(rows)
    return frame if frame.empty else frame.sort_values(["model", "linear", "tokens", "mix"], ignore_index=True)


def _row(launch: pd.Series, singles: pd.DataFrame, card: Card) -> dict[str, Any]:
    n, k, measured = int(launch["n"]), int(launch["k"]), float(launch["latency_us"])
    parts = parts_of(launch["schemes"], launch["tokens_per_expert"])
    limits = [roofline(part.scheme, n, k, part.tokens_per_expert, card).us for part in parts]
    alone = [Alone.of(singles, part.scheme, launch) for part in parts]
    known = [found for found in alone if found is not None]
    predicted = same_config = sequential = math.nan
    if len(known) == len(parts):
        pairs = list(zip(limits, known, strict=True))
        predicted = sum(limit / found.fraction(card) for limit, found in pairs)
        same_config = sum(limit / found.fraction(card, launch["config"]) for limit, found in pairs)
        sequential = sum(found.scaled_us(part) for part, found in zip(parts, known, strict=True))
    return {
        **{name: launch[name] for name in ("model", "linear", "n", "k", "tokens", "load_source")},
        "mix": " + ".join(sorted(set(launch["schemes"]))),
        "num_parts": len(parts),
        "config": launch["config"],
        "latency_us": measured,
        "roofline_us": sum(limits),
        "roofline_share": sum(limits) / measured,
        "parts_us": predicted,
        "excess": measured / predicted - 1,
        "excess_same_config": measured / same_config - 1,
        "sequential_us": sequential,
        "speedup_free": predicted / measured,
        "speedup": sequential / measured,
        "parts_recorded": _how(alone),
        "timestamp": launch["timestamp"],
    }


def _how(alone: Sequence[Alone | None]) -> str:
    if any(found is None for found in alone):
        return "no"
    return "same load" if all(found is not None and found.is_exact for found in alone) else "neighbouring loads"
