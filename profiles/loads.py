"""Token loads: how many tokens each expert of one layer gets, generated from a seed or read from a trace of a real run.

A generated load has `num_tokens * top_k` rows in all. Where the router is random, each token draws `top_k` different
experts, so that no expert gets more than `num_tokens` rows; the draws are those of successive sampling without
replacement (Gumbel top-k, Kool et al. 2019).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from profiles.atomic import replacing
from profiles.errors import DataError, SpecError
from profiles.parquet_file import read_verified

TRACE_SCHEMA = pa.schema([("layer", pa.int32()), ("tokens_per_expert", pa.list_(pa.int32()))])
FloatArray = npt.NDArray[np.float64]
MAX_DRAWS_AT_ONCE = 1 << 22  # scores held in memory while tokens are routed: 32 MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLoad:
    """How many tokens each expert gets in one launch, and where that comes from.

    Attributes:
        tokens_per_expert: one whole number per expert; zeros are idle experts.
        source: a generator with its arguments, or the trace's file and layer.
        num_tokens: tokens of the batch before routing, of all ranks together; None where that is not known, as of a
            trace. Loads that differ in it alone are equal.
    """

    tokens_per_expert: tuple[int, ...]
    source: str
    num_tokens: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not self.tokens_per_expert:
            raise SpecError(f"token load {self.source!r} has no experts")
        for expert, count in enumerate(self.tokens_per_expert):
            if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < 2**31:
                raise SpecError(
                    f"token load {self.source!r}: expert {expert} has {count!r} tokens;"
                    " a whole number from 0 to 2^31 - 1 is needed"
                )
        batch = self.num_tokens
        if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or not 0 <= batch < 2**31):
            raise SpecError(f"token load {self.source!r}: num_tokens {batch!r} is no whole number from 0 to 2^31 - 1")

    @property
    def num_experts(self) -> int:
        """Experts, idle ones too."""
        return len(self.tokens_per_expert)

    @property
    def total(self) -> int:
        """Token rows of all experts together; `num_tokens * top_k` of a generated load."""
        return sum(self.tokens_per_expert)

    @property
    def num_active(self) -> int:
        """Experts that get a token."""
        return sum(count > 0 for count in self.tokens_per_expert)

    @property
    def max(self) -> int:
        """Tokens of the busiest expert."""
        return max(self.tokens_per_expert)

    @property
    def spread(self) -> float:
        """Coefficient of variation over all experts, idle ones too: standard deviation (population) / mean. 0 is even;
        0 for no tokens.

        With E experts it is at most sqrt(E - 1), when one expert gets everything.
        """
        counts = np.asarray(self.tokens_per_expert, dtype=np.float64)
        return float(counts.std() / counts.mean()) if self.total else 0.0

    def expert_parallel(self, ranks: int, rank: int) -> TokenLoad:
        """What one rank's experts get, when consecutive experts are spread over `ranks`.

        Raises:
            SpecError: `ranks` does not divide the experts, or there is no such rank.
        """
        if ranks < 1 or self.num_experts % ranks or not 0 <= rank < ranks:
            raise SpecError(
                f"rank {rank} of {ranks}: the ranks must divide the load's {self.num_experts} experts, and count from 0"
            )
        size = self.num_experts // ranks
        share = self.tokens_per_expert[rank * size : (rank + 1) * size]
        source = f"{self.source}, expert-parallel rank {rank} of {ranks}"
        return TokenLoad(tokens_per_expert=share, source=source, num_tokens=self.num_tokens)


def uniform(num_experts: int, num_tokens: int, top_k: int, seed: int = 0) -> TokenLoad:
    """An even split; the seed says which experts get the remainder's one token more."""
    rng = _checked(num_experts, num_tokens, top_k, seed)
    even, rest = divmod(num_tokens * top_k, num_experts)
    counts = np.full(num_experts, even)
    counts[rng.permutation(num_experts)[:rest]] += 1
    return _load("uniform", counts, num_tokens, top_k, seed)


def zipf(num_experts: int, num_tokens: int, top_k: int, seed: int = 0, *, exponent: float = 1.0) -> TokenLoad:
    """Random routing; the expert of popularity rank r (the seed shuffles them) has a weight of r^-exponent.
    SpecError for an exponent beyond 0 to 10, or sizes that cannot be.
    """
    rng = _checked(num_experts, num_tokens, top_k, seed)
    if not 0 <= exponent <= 10:
        raise SpecError(f"zipf exponent {exponent} must be from 0 to 10")
    log_weights = -exponent * np.log(np.arange(1, num_experts + 1, dtype=np.float64))
    counts = _route(rng, rng.permutation(log_weights), num_tokens, top_k)
    return _load(f"zipf, exponent {exponent:g}", counts, num_tokens, top_k, seed)


def log_normal(num_experts: int, num_tokens: int, top_k: int, seed: int = 0, *, sigma: float = 0.7) -> TokenLoad:
    """Random routing; the experts' weights are exp(sigma * standard normal), that is, softmax of normal logits.
    SpecError for a sigma beyond 0 to 10, or sizes that cannot be.
    """
    rng = _checked(num_experts, num_tokens, top_k, seed)
    if not 0 <= sigma <= 10:
        raise SpecError(f"log-normal sigma {sigma} must be from 0 to 10")
    counts = _route(rng, sigma * rng.standard_normal(num_experts), num_tokens, top_k)
    return _load(f"log-normal, sigma {sigma:g}", counts, num_tokens, top_k, seed)


def one_hot(num_experts: int, num_tokens: int, top_k: int, seed: int = 0) -> TokenLoad:
    """All `num_tokens * top_k` rows to one expert, which the seed picks: the worst case, with as many rows as the
    other loads.
    """
    rng = _checked(num_experts, num_tokens, top_k, seed)
    counts = np.zeros(num_experts, dtype=np.int64)
    counts[rng.integers(num_experts)] = num_tokens * top_k
    return _load("one-hot", counts, num_tokens, top_k, seed)


GENERATORS: Mapping[str, Callable[[int, int, int, int], TokenLoad]] = MappingProxyType(
    {"uniform": uniform, "zipf": zipf, "log_normal": log_normal, "one_hot": one_hot}
)
"""(num_experts, num_tokens, top_k, seed) -> TokenLoad, by name."""


def generate(kind: str, num_experts: int, num_tokens: int, top_k: int, seed: int = 0) -> TokenLoad:
    """The load of a generator's name.

    Raises:
        SpecError: an unknown name, or arguments that cannot be.
    """
    if kind not in GENERATORS:
        raise SpecError(f"unknown token load {kind!r}: known are {', '.join(GENERATORS)}")
    return GENERATORS[kind](num_experts, num_tokens, top_k, seed)


def _checked(num_experts: int, num_tokens: int, top_k: int, seed: int) -> np.random.Generator:
    if num_experts < 1 or num_tokens < 0 or seed < 0:
        raise SpecError(f"{num_experts} experts, {num_tokens} tokens, seed {seed}: at least 1, 0 and 0 are needed")
    if not 1 <= top_k <= num_experts:
        raise SpecError(f"top_k {top_k} must be from 1 to the number of experts, {num_experts}")
    return np.random.default_rng(seed)


def _route(rng: np.random.Generator, log_weights: FloatArray, num_tokens: int, top_k: int) -> npt.NDArray[np.int64]:
    """Counts per expert when each token draws `top_k` different experts."""
    num_experts = log_weights.size
    counts = np.zeros(num_experts, dtype=np.int64)
    step = max(1, MAX_DRAWS_AT_ONCE // num_experts)
    for start in range(0, num_tokens, step):
        rows = min(step, num_tokens - start)
        scores = log_weights + rng.gumbel(size=(rows, num_experts))
        chosen = np.argpartition(scores, num_experts - top_k, axis=1)[:, num_experts - top_k :]
        counts += np.bincount(chosen.ravel(), minlength=num_experts)
    return counts


def _load(kind: str, counts: npt.NDArray[np.int64], num_tokens: int, top_k: int, seed: int) -> TokenLoad:
    source = f"{kind}, {num_tokens} tokens, top {top_k}, seed {seed}"
    return TokenLoad(tokens_per_expert=tuple(counts.tolist()), source=source, num_tokens=num_tokens)


def read_trace(path: str | os.PathLike[str]) -> dict[int, TokenLoad]:
    """The token loads of a trace, by layer.

    A JSON file is an object of layer -> list of tokens per expert, `{"0": [12, 0, 4], "1": [3, 8, 5]}`; a Parquet file
    has the columns `layer` and `tokens_per_expert` (a list). Every layer has as many experts.

    Raises:
        DataError: unreadable, of another form, or with numbers that cannot be tokens.
    """
    file = Path(path)
    pairs = _read_parquet_trace(file) if file.suffix == ".parquet" else _read_json_trace(file)
    loads: dict[int, TokenLoad] = {}
    for layer, counts in pairs:
        if not (str(layer).isascii() and str(layer).isdigit()):
            raise DataError(f"{file}: {layer!r} is not the number of a layer")
        number = int(str(layer))
        if number in loads:
            raise DataError(f"{file}: layer {number} is there twice")
        if not isinstance(counts, list):
            raise DataError(f"{file}: layer {number} has no list of tokens per expert")
        try:
            loads[number] = TokenLoad(tokens_per_expert=tuple(counts), source=f"{file.name}, layer {number}")
        except SpecError as error:
            raise DataError(f"{file}: {error}") from error
    if not loads:
        raise DataError(f"{file}: a trace without layers")
    sizes = {load.num_experts for load in loads.values()}
    if len(sizes) > 1:
        raise DataError(f"{file}: layers differ in their number of experts ({min(sizes)} to {max(sizes)})")
    return dict(sorted(loads.items()))


def write_trace(loads: Mapping[int, TokenLoad], path: str | os.PathLike[str]) -> None:
    """Writes what `read_trace` reads, whole or not at all; Parquet if the name ends so, else JSON.

    Raises:
        DataError: it cannot be written.
    """
    file = Path(path)
    rows = {layer: list(load.tokens_per_expert) for layer, load in sorted(loads.items())}
    try:
        with replacing(file) as temporary:
            if file.suffix == ".parquet":
                columns = {"layer": list(rows), "tokens_per_expert": list(rows.values())}
                pq.write_table(pa.table(columns, schema=TRACE_SCHEMA), temporary, write_page_checksum=True)
            else:
                temporary.write_text(json.dumps(rows) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{file}: cannot be written ({error.strerror or error})") from error


def _read_json_trace(file: Path) -> Iterable[tuple[object, object]]:
    try:
        # pairs, since a dict would hide a layer that is there twice; an object among the values becomes a tuple too
        pairs = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=tuple)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error})") from error
    if not isinstance(pairs, tuple):
        raise DataError(f"{file}: not a trace; a JSON object of layer -> tokens per expert is needed")
    return pairs


def _read_parquet_trace(file: Path) -> Iterable[tuple[object, object]]:
    table = read_verified(file)
    if not set(TRACE_SCHEMA.names) <= set(table.column_names):
        raise DataError(f"{file}: not a trace; the columns {' and '.join(TRACE_SCHEMA.names)} are needed")
    return zip(*(table.column(name).to_pylist() for name in TRACE_SCHEMA.names), strict=True)
