"""Kernels on linears: all of a launch but its tokens, one by one or as a profile's rows have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from costmodel.facts import BuildFacts
from costmodel.launches import Launch
from profiles import kernels
from profiles import schemes as scheme_names
from profiles.errors import DataError
from profiles.kernels import GemmShape, KernelConfig
from profiles.loads import TokenLoad
from profiles.schemes import QuantScheme

Codes = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelUse:
    """A kernel on a linear: all of a launch but its tokens. `schemes` holds one scheme, or one per expert."""

    n: int
    k: int
    schemes: tuple[QuantScheme, ...]
    config: KernelConfig
    ctas_per_sm: int

    def launch(self, load: TokenLoad) -> Launch:
        """It, run on a load."""
        return Launch(
            shape=GemmShape(m=load.total, n=self.n, k=self.k),
            load=load,
            schemes=self.schemes,
            config=self.config,
            facts=nominal_facts(self.config, self.ctas_per_sm),
        )


def nominal_facts(config: KernelConfig, ctas_per_sm: int | None = None) -> BuildFacts:
    """What the latency model needs of a build when none is at hand: the CTAs per SM that the kernel is built for.

    A lower bound: a build may fit more often than it was asked to, and the narrow tiles of the mma family mostly do.
    """
    return BuildFacts(
        registers_per_thread=0,
        smem_bytes=0,
        stack_bytes=0,
        spill_bytes=0,
        num_threads=config.num_threads,
        ctas_per_sm=config.min_ctas_per_sm if ctas_per_sm is None else ctas_per_sm,
        mma_instructions=(),
        compile_seconds=0.0,
        fingerprint="",
    )


def use_of(launch: Launch) -> KernelUse:
    """What a launch runs, without its tokens."""
    return KernelUse(
        n=launch.shape.n,
        k=launch.shape.k,
        schemes=launch.schemes,
        config=launch.config,
        ctas_per_sm=launch.facts.ctas_per_sm,
    )


OCCUPANCY = "ctas_per_sm"
"""Under which a row's `versions` keep the occupancy of the build that was measured."""


def of_rows(
    rows: pd.DataFrame, facts: Mapping[str, BuildFacts]
) -> tuple[list[KernelUse], list[TokenLoad], Codes, Codes]:
    """The distinct kernels and loads of a profile's rows, and which of them each row has.

    The CTAs per SM are those of `facts` (by kernel fingerprint), else what the row says that its build had, else what
    the configuration asks for.
    """
    use_index: dict[tuple[object, ...], int] = {}
    load_index: dict[bytes, int] = {}
    uses: list[KernelUse] = []
    loads: list[TokenLoad] = []
    use_of_row, load_of_row = np.empty(len(rows), dtype=np.intp), np.empty(len(rows), dtype=np.intp)
    columns = (rows["n"], rows["k"], rows["schemes"], rows["config"], _occupancies(rows, facts))
    for row, (n, k, names, config_name, ctas_per_sm) in enumerate(zip(*columns, strict=True)):
        key = (n, k, tuple(names), config_name, ctas_per_sm)
        if key not in use_index:
            config = kernels.parse(config_name)
            use_index[key] = len(uses)
            uses.append(
                KernelUse(
                    n=int(n),
                    k=int(k),
                    schemes=tuple(scheme_names.parse(name) for name in names),
                    config=config,
                    ctas_per_sm=ctas_per_sm or config.min_ctas_per_sm,
                )
            )
        use_of_row[row] = use_index[key]
    for row, tokens in enumerate(rows["tokens_per_expert"]):
        counts = np.asarray(tokens, dtype=np.int64)
        digest = counts.tobytes()
        if digest not in load_index:
            load_index[digest] = len(loads)
            loads.append(TokenLoad(tokens_per_expert=tuple(counts.tolist()), source="profile"))
        load_of_row[row] = load_index[digest]
    return uses, loads, use_of_row, load_of_row


def _occupancies(rows: pd.DataFrame, facts: Mapping[str, BuildFacts]) -> list[int | None]:
    """CTAs per SM of each row's build, None where nothing says it."""
    none = [""] * len(rows)
    fingerprints = rows.get("kernel_fingerprint", none)
    versions = rows.get("versions", none)
    found: list[int | None] = []
    for fingerprint, of_row in zip(fingerprints, versions, strict=True):
        recorded = dict(of_row).get(OCCUPANCY)
        if fingerprint in facts:
            found.append(facts[fingerprint].ctas_per_sm)
        elif recorded is None:
            found.append(None)
        elif recorded.isdecimal() and int(recorded) > 0:
            found.append(int(recorded))
        else:
            raise DataError(f"a row's {OCCUPANCY} is {recorded!r}: a number of at least 1 is needed")
    return found
