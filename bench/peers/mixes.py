"""`--mixed`: mixed launches of one linear, each beside its schemes alone under the same load."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pandas as pd

from bench.layer.allocations import MIXED, allocation
from bench.peers.cells import CELL, Cell
from bench.peers.contenders import OURS
from bench.peers.routing import Draw
from profiles.models import Linear
from profiles.records import Status

OWN = (*CELL, "config", "latency_us", "fraction", "reference_ratio")


def mixes_and_parts(models: Sequence[str], tokens: Sequence[int]) -> list[Cell]:
    """For each number of tokens, model and linear the mixes of bench.layer.allocations that are worth timing there,
    those with two schemes at least in this linear, and before them each of their schemes on all experts.
    """
    return [
        cell
        for number in tokens  # first: a run that its time limit cuts has every model
        for name in models
        for linear in Linear
        for cell in _group(name, linear, number)
    ]


def _group(model: str, linear: Linear, tokens: int) -> Iterator[Cell]:
    of_all = [
        Cell(model=model, linear=linear, tokens=tokens, draw=Draw.PEERS, what=mix)
        for mix in MIXED
        if mix.serves(tokens)
    ]
    mixed = [cell for cell in of_all if len(set(cell.schemes)) > 1]
    for scheme in dict.fromkeys(scheme for cell in mixed for scheme in cell.schemes):
        yield Cell(model=model, linear=linear, tokens=tokens, draw=Draw.PEERS, what=scheme)
    yield from mixed


def excesses(measured: pd.DataFrame) -> pd.DataFrame:
    """A row a mixed launch: its time, the time that its parts would take, each at the fraction of its roofline that its
    scheme reached alone on all experts under the same load, and `excess`, by how much the launch takes longer; NaN
    where a scheme alone failed.
    """
    ours = measured[(measured["status"] == Status.OK.value) & (measured["contender"] == OURS)]
    best = ours.loc[ours.groupby(list(CELL), sort=False)["latency_us"].idxmin()]
    alone = {tuple(row[name] for name in CELL): row["fraction"] for row in best[~best["is_mix"]].to_dict("records")}
    rows = []
    for row in best[best["is_mix"]].to_dict("records"):
        cell = Cell(
            model=row["model"],
            linear=Linear(row["linear"]),
            tokens=int(row["tokens"]),
            draw=Draw(row["draw"]),
            what=allocation(row["scheme"]),
            seed=int(row["seed"]),
        )
        parts_us = sum(
            part.us / alone.get((*cell.key[:-1], scheme.name), math.nan) for scheme, part in cell.parts.items()
        )
        rows.append(
            {
                **{name: row[name] for name in OWN},
                "parts_us": parts_us,
                "excess": row["latency_us"] / parts_us - 1,
            }
        )
    return pd.DataFrame(rows, columns=[*OWN, "parts_us", "excess"])
