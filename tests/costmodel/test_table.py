"""CostTable: picks the fastest, finds crossovers, survives a round trip, and refuses what it cannot trust."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from costmodel.analytic import launch_latency
from costmodel.launches import Launch
from costmodel.table import SCHEMA, CostTable, PricedLaunch, crossover_tokens
from kernel_gen.legality import estimated_facts
from kernel_gen.space import Effort, candidates
from profiles import kernels, loads, schemes
from profiles.errors import DataError, SpecError
from profiles.gpus import gpu
from profiles.kernels import GemmShape
from profiles.records import ProfileRecord, Source, Status
from profiles.store import ProfileStore

ADA = gpu("rtx4090")
W4A16, W8A8 = schemes.parse("w4a16_g128_sym"), schemes.parse("w8a8_g-1_sym")
SHAPE = GemmShape(m=0, n=2816, k=2048)
FAST, SLOW = (kernels.parse(f"mma_128x{n}_w8x1x1_s4_k1_at_o1") for n in (16, 32))
TOKENS = (16, 256, 1024, 4096, 16384)


def priced() -> list[PricedLaunch]:
    return [
        PricedLaunch(
            model="qwen",
            linear="gate_up",
            scenario=f"uniform {tokens}",
            launch=Launch(
                shape=SHAPE,
                load=loads.uniform(60, tokens, 4, 0),
                schemes=(scheme,),
                config=config,
                facts=estimated_facts(config, [scheme], ADA),
            ),
        )
        for scheme in (W4A16, W8A8)
        for tokens in TOKENS
        for config in candidates([scheme], ADA, Effort.QUICK)
    ]


@pytest.fixture(scope="module")
def table() -> CostTable:
    return CostTable.from_predictions(ADA, priced())


def record(latency_us: float | None, **changes: object) -> ProfileRecord:
    fields: dict[str, object] = {
        "gpu": "rtx4090",
        "model": "qwen",
        "linear": "gate_up",
        "n": 2816,
        "k": 2048,
        "load": loads.uniform(4, 16, 2, 0),
        "schemes": (W4A16,),
        "config": FAST,
        "status": Status.OK,
        "source": Source.MEASURED,
        "latency_us": latency_us,
        "p20_us": latency_us and latency_us * 0.9,
        "p80_us": latency_us and latency_us * 1.1,
        "num_samples": 30,
    }
    return ProfileRecord(**(fields | changes))  # type: ignore[arg-type]


def test_prediction_picks_the_fastest_configuration(table: CostTable) -> None:
    assert len(table) == 2 * len(TOKENS)
    assert table.gpu is ADA
    assert set(table.frame()["source"]) == {"predicted"}
    for row in table.frame().itertuples():
        times = {
            item.launch.config.name: launch_latency(
                ADA, SHAPE, item.launch.load, item.launch.schemes, item.launch.config, item.launch.facts
            ).latency_us
            for item in priced()
            if item.scenario == row.scenario and item.launch.schemes[0].name == row.scheme
        }
        assert row.latency_us == pytest.approx(min(times.values()))
        assert times[str(row.config)] == pytest.approx(row.latency_us)


def test_entries_and_order(table: CostTable) -> None:
    best = table.best_per_scheme_and_load()
    for _, rows in best.groupby("scheme"):
        assert list(rows["tokens_per_expert"]) == sorted(rows["tokens_per_expert"])
    one = table.latency_us(model="qwen", linear="gate_up", scheme=W4A16, scenario="uniform 16")
    assert one == best[(best.scheme == W4A16.name) & (best.scenario == "uniform 16")]["latency_us"].item()
    with pytest.raises(SpecError, match=r"no entry for qwen, down, w4a16_g128_sym, uniform 16"):
        table.latency_us(model="qwen", linear="down", scheme=W4A16, scenario="uniform 16")


def test_crossover_of_the_table(table: CostTable) -> None:
    (found,) = table.crossovers(W4A16, W8A8)
    assert found.tokens_per_expert is not None
    assert 16 * 4 / 60 < found.tokens_per_expert < 16384 * 4 / 60
    assert found.winner is None
    (reverse,) = table.crossovers(W8A8, W4A16)
    assert reverse.tokens_per_expert is None
    assert table.crossovers(W4A16, schemes.parse("w2a16_g128_sym")) == ()


def test_crossover_tokens() -> None:
    assert crossover_tokens([1, 4], [-1, 1]) == pytest.approx(2)  # half way on log tokens
    assert crossover_tokens([1, 10, 100], [-1, -1, 3]) == pytest.approx(10 ** (1 + 0.25))
    assert crossover_tokens([1, 2, 4, 8], [0.0, -1, 0.0005, 1]) == pytest.approx(4)  # ties do not count
    assert crossover_tokens([1, 2, 4, 8, 16], [-1, 1, -1, 1, 1]) == pytest.approx(math.sqrt(32))  # for good
    assert crossover_tokens([1, 2], [1, 2]) is None
    assert crossover_tokens([1, 2], [-1, -2]) is None
    assert crossover_tokens([], []) is None


def test_from_profile_takes_the_fastest_and_measured_first(tmp_path: Path) -> None:
    with ProfileStore(tmp_path / "p.parquet") as store:
        store.append(record(50.0))
        store.append(record(60.0, config=SLOW))
        store.append(record(1.0, config=SLOW, source=Source.PREDICTED, num_samples=0, p20_us=None, p80_us=None))
        store.append(record(None, schemes=(W8A8,), status=Status.CRASHED, error="died"))
        store.append(record(3.0, schemes=(W4A16, W8A8, W8A8, W8A8)))
        profile = store.records()
    (row,) = CostTable.from_profile(profile).frame().itertuples()
    assert (row.latency_us, row.config, row.source) == (50.0, FAST.name, "measured")
    assert row.std_us == pytest.approx(10 / (2 * 0.8416), rel=1e-3)
    assert row.tokens_per_expert == 8
    failed = profile[profile["status"] != "ok"]
    with pytest.raises(DataError, match="no finished launch"):
        CostTable.from_profile(failed)


def test_round_trip(table: CostTable, tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    table.write(path)
    pd.testing.assert_frame_equal(CostTable.read(path, gpu="rtx4090").frame(), table.frame())
    assert [item.name for item in tmp_path.iterdir()] == ["table.parquet"]
    with pytest.raises(DataError, match="where h200 is expected"):
        CostTable.read(path, gpu="h200")


def test_frame_is_a_copy(table: CostTable) -> None:
    frame = table.frame()
    frame.loc[:, "latency_us"] = -1.0
    assert (table.frame()["latency_us"] > 0).all()


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("latency_us", 0.0, "latency_us 0"),
        ("latency_us", -3.0, "latency_us -3"),
        ("latency_us", np.nan, "has no latency_us"),
        ("latency_us", np.inf, "latency_us inf"),
        ("std_us", -1.0, "std_us -1"),
        ("tokens_per_expert", np.inf, "tokens_per_expert inf"),
        ("scheme", "w5a16_g128_sym", "w5a16"),
        ("config", "mma_1", "mma_1"),
        ("gpu", "gtx1080", "gtx1080"),
        ("gpu", "h200", "of one gpu"),
        ("source", "dreamt", "dreamt"),
        (
            "scenario",
            "uniform 256",
            "two rows for model qwen, linear gate_up, scheme w4a16_g128_sym, scenario uniform 256",
        ),
    ],
)
def test_broken_rows_are_refused(table: CostTable, tmp_path: Path, column: str, value: object, says: str) -> None:
    frame = table.frame()
    frame.loc[frame.index[0], column] = value
    with pytest.raises(DataError, match=says):
        CostTable(frame)
    path = tmp_path / "bad.parquet"
    pq.write_table(pa.Table.from_pandas(frame, schema=SCHEMA, preserve_index=False), path)
    with pytest.raises(DataError, match=rf"bad\.parquet: .*{says}"):
        CostTable.read(path)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def foreign(path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), path)


def text(path: Path) -> None:
    path.write_text("latency_us\n3\n")


def gone(path: Path) -> None:
    path.unlink()


def of_a_later_version(path: Path) -> None:
    frame = pq.read_table(path).to_pandas()
    pq.write_table(pa.Table.from_pandas(frame.assign(schema_version=99)), path)


def of_another_type(path: Path) -> None:
    frame = pq.read_table(path).to_pandas()
    pq.write_table(pa.Table.from_pandas(frame.assign(latency_us="fast")), path)


def empty(path: Path) -> None:
    pq.write_table(SCHEMA.empty_table(), path)


@pytest.mark.parametrize("spoil", [truncated, foreign, text, gone, of_a_later_version, of_another_type, empty])
def test_bad_files_are_refused(table: CostTable, tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    path = tmp_path / "table.parquet"
    table.write(path)
    spoil(path)
    with pytest.raises(DataError, match=r"table\.parquet: ") as caught:
        CostTable.read(path)
    assert "\n" not in str(caught.value)


def test_flipped_bits_are_refused_or_change_nothing(table: CostTable, tmp_path: Path) -> None:
    """Pages have checksums; what the footer says beside the schema is not read."""
    path = tmp_path / "table.parquet"
    table.write(path)
    whole = path.read_bytes()
    refused = 0
    for place in np.random.default_rng(0).integers(len(whole), size=150):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            found = CostTable.read(path)
        except DataError:
            refused += 1
        else:
            pd.testing.assert_frame_equal(found.frame(), table.frame())
    assert refused > 30


def test_a_table_that_cannot_be_written_changes_nothing(table: CostTable, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be written"):
        table.write(tmp_path / "no folder" / "table.parquet")
    assert list(tmp_path.iterdir()) == []


def test_a_mixed_launch_has_no_row() -> None:
    config = FAST
    launch = Launch(
        shape=SHAPE,
        load=loads.uniform(4, 16, 2, 0),
        schemes=(W4A16, W8A8, W8A8, W8A8),
        config=config,
        facts=estimated_facts(config, [W4A16, W8A8], ADA),
    )
    with pytest.raises(SpecError, match="has one scheme, this launch has 2"):
        CostTable.from_predictions(
            ADA, [PricedLaunch(model="qwen", linear="gate_up", scenario="uniform", launch=launch)]
        )
    with pytest.raises(SpecError, match="no launches"):
        CostTable.from_predictions(ADA, [])
