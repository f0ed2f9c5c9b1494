import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles import loads
from profiles.errors import DataError, SpecError
from profiles.loads import GENERATORS, TokenLoad, generate, log_normal, one_hot, read_trace, uniform, write_trace, zipf

KINDS = st.sampled_from(list(GENERATORS))


@st.composite
def arguments(draw: st.DrawFn) -> tuple[int, int, int, int]:
    num_experts = draw(st.integers(1, 70))
    return num_experts, draw(st.integers(0, 300)), draw(st.integers(1, num_experts)), draw(st.integers(0, 2**40))


@given(KINDS, arguments())
def test_every_row_goes_to_an_expert_and_the_seed_decides_where(
    kind: str, arguments: tuple[int, int, int, int]
) -> None:
    num_experts, num_tokens, top_k, _ = arguments
    load = generate(kind, *arguments)
    assert load == generate(kind, *arguments)
    assert load.num_experts == num_experts
    assert load.total == num_tokens * top_k
    assert 0 <= load.spread <= math.sqrt(num_experts - 1) + 1e-9
    if kind != "one_hot":
        assert load.max <= num_tokens


@given(arguments())
def test_uniform_is_even(arguments: tuple[int, int, int, int]) -> None:
    load = uniform(*arguments)
    assert load.max - min(load.tokens_per_expert) <= 1


@given(arguments())
def test_one_hot_has_one_active_expert(arguments: tuple[int, int, int, int]) -> None:
    load = one_hot(*arguments)
    assert load.num_active == (1 if load.total else 0)
    if load.total:
        assert load.spread == pytest.approx(math.sqrt(load.num_experts - 1))


def test_top_1_draws_follow_the_weights() -> None:
    """With one draw a token, counts are multinomial: within 6 standard deviations of the expectation."""
    num_tokens = 200_000
    counts = sorted(zipf(8, num_tokens, 1, seed=3, exponent=1.5).tokens_per_expert, reverse=True)
    weights = np.arange(1, 9) ** -1.5
    expected = num_tokens * weights / weights.sum()
    assert np.abs(counts - expected).max() < 6 * np.sqrt(expected.max())


def test_successive_draws_are_without_replacement() -> None:
    """Two of three experts with weights 2, 1, 1: the first is missed with probability 2 * (1/4 * 1/3) = 1/6."""
    scores = np.log([2.0, 1.0, 1.0])
    counts = loads._route(np.random.default_rng(0), scores, 60_000, 2)
    assert counts[0] == pytest.approx(50_000, abs=6 * math.sqrt(60_000 * 5 / 36))


def test_routing_in_pieces_is_routing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loads, "MAX_DRAWS_AT_ONCE", 100)
    assert log_normal(60, 77, 4, 0).total == 77 * 4


def test_skew_grows_with_its_parameter() -> None:
    spreads = [zipf(60, 4096, 1, 0, exponent=exponent).spread for exponent in (0.0, 0.5, 1.0, 2.0)]
    assert spreads == sorted(spreads)
    assert log_normal(60, 4096, 1, 0, sigma=0.0).spread < 0.2 < log_normal(60, 4096, 1, 0, sigma=1.5).spread


def test_a_known_load() -> None:
    load = TokenLoad(tokens_per_expert=(0, 2, 4), source="test")
    assert (load.total, load.num_active, load.max, load.num_experts) == (6, 2, 4, 3)
    assert load.spread == pytest.approx(math.sqrt(8 / 3) / 2)
    assert TokenLoad(tokens_per_expert=(0, 0), source="test").spread == 0


def test_expert_parallel_shares_make_the_whole() -> None:
    load = zipf(60, 512, 4, 0)
    shares = [load.expert_parallel(4, rank).tokens_per_expert for rank in range(4)]
    assert sum(shares, ()) == load.tokens_per_expert
    for ranks, rank in ((7, 0), (4, 4), (4, -1), (0, 0)):
        with pytest.raises(SpecError, match="must divide"):
            load.expert_parallel(ranks, rank)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((8, 16, 9, 0), "top_k 9"),
        ((8, 16, 0, 0), "top_k 0"),
        ((0, 16, 1, 0), "0 experts"),
        ((8, -1, 1, 0), "-1 tokens"),
        ((8, 16, 1, -1), "seed -1"),
    ],
)
@pytest.mark.parametrize("kind", GENERATORS)
def test_arguments_that_cannot_be_are_refused(kind: str, arguments: tuple[int, int, int, int], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        generate(kind, *arguments)


def test_parameters_that_cannot_be_are_refused() -> None:
    with pytest.raises(SpecError, match="exponent nan"):
        zipf(8, 16, 2, exponent=math.nan)
    with pytest.raises(SpecError, match="sigma -1"):
        log_normal(8, 16, 2, sigma=-1)
    with pytest.raises(SpecError, match="unknown token load 'poisson': known are uniform"):
        generate("poisson", 8, 16, 2)
    for counts in ((), (-1,), (1.5,), (True,), (2**31,)):
        with pytest.raises(SpecError, match="token load"):
            TokenLoad(tokens_per_expert=counts, source="test")


@pytest.mark.parametrize("name", ["trace.json", "trace.parquet"])
def test_a_trace_is_read_back(name: str, tmp_path: Path) -> None:
    trace = {layer: zipf(16, 100, 2, layer) for layer in (3, 0, 11)}
    write_trace(trace, tmp_path / name)
    read = read_trace(tmp_path / name)
    assert list(read) == [0, 3, 11]
    assert {layer: load.tokens_per_expert for layer, load in read.items()} == {
        layer: load.tokens_per_expert for layer, load in trace.items()
    }
    assert read[3].source == f"{name}, layer 3"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "not JSON"),
        ("[[1, 2]]", "a JSON object"),
        ("{}", "without layers"),
        ('{"0": [1, 2], "1": [1]}', r"differ in their number of experts \(1 to 2\)"),
        ('{"0": [1, -2]}', "expert 1 has -2 tokens"),
        ('{"0": [1, 2.5]}', r"expert 1 has 2\.5"),
        ('{"0": [1, NaN]}', "expert 1 has nan"),
        ('{"0": [1, null]}', "expert 1 has None"),
        ('{"0": [1, true]}', "expert 1 has True"),
        ('{"0": []}', "has no experts"),
        ('{"0": {"0": 1}}', "no list of tokens"),
        ('{"0": 7}', "no list of tokens"),
        ('{"gate": [1]}', "'gate' is not the number of a layer"),
        ('{"-1": [1]}', "'-1' is not the number"),
        ('{"0": [1], "0": [2]}', "layer 0 is there twice"),
    ],
)
def test_a_bad_json_trace_is_refused(content: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=says) as caught:
        read_trace(file)
    assert str(file) in str(caught.value)


def test_a_bad_parquet_trace_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "trace.parquet"
    with pytest.raises(DataError, match="not a readable Parquet"):
        read_trace(file)
    file.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="not a readable Parquet"):
        read_trace(file)
    pq.write_table(pa.table({"layer": [0]}), file)
    with pytest.raises(DataError, match="the columns layer and tokens_per_expert are needed"):
        read_trace(file)
    pq.write_table(pa.table({"layer": [0, 0], "tokens_per_expert": [[1], [2]]}), file)
    with pytest.raises(DataError, match="layer 0 is there twice"):
        read_trace(file)
    pq.write_table(pa.table({"layer": [0, None], "tokens_per_expert": [[1], [2]]}), file)
    with pytest.raises(DataError, match="None is not the number of a layer"):
        read_trace(file)
    pq.write_table(pa.table({"layer": [0], "tokens_per_expert": [[1.5]]}), file)
    with pytest.raises(DataError, match=r"expert 0 has 1\.5"):
        read_trace(file)


def test_flipped_bits_of_a_parquet_trace_are_refused_or_change_nothing(tmp_path: Path) -> None:
    path, trace = tmp_path / "trace.parquet", {0: uniform(60, 64, 4, seed=0), 5: zipf(60, 64, 4)}
    write_trace(trace, path)
    whole, expected = path.read_bytes(), {layer: load.tokens_per_expert for layer, load in trace.items()}
    refused = 0
    for place in np.random.default_rng(0).integers(len(whole), size=150):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            found = read_trace(path)
        except DataError:
            refused += 1
        else:
            assert {layer: load.tokens_per_expert for layer, load in found.items()} == expected
    assert refused > 30


def test_a_trace_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be written"):
        write_trace({0: uniform(4, 8, 2)}, tmp_path / "nowhere" / "trace.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", loads.GENERATORS)
def test_a_load_carries_its_batch(kind: str) -> None:
    load = loads.generate(kind, 8, 12, 2, 0)
    assert load.num_tokens == load.expert_parallel(2, 0).num_tokens == 12
    assert load == loads.TokenLoad(tokens_per_expert=load.tokens_per_expert, source=load.source)
    with pytest.raises(SpecError, match="num_tokens -1"):
        loads.TokenLoad(tokens_per_expert=(1,), source="bad", num_tokens=-1)
