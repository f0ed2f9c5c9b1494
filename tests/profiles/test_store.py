import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from profiles import journal as journals
from profiles import loads
from profiles import store as stores
from profiles import table as tables
from profiles.errors import DataError, SpecError
from profiles.kernels import parse as parse_config
from profiles.loads import TokenLoad
from profiles.records import ProfileRecord, Source, Status
from profiles.schemes import parse
from profiles.store import ProfileStore, merge
from tests.profiles.strategies import record


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "profile.parquet"


def journal(path: Path) -> Path:
    return path.with_name("profile.parquet.journal")


def fill(path: Path, *entries: ProfileRecord) -> Path:
    with ProfileStore(path) as store:
        for entry in entries:
            store.append(entry)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def write_rows(path: Path, *rows: dict[str, Any]) -> None:
    pq.write_table(tables.from_rows(rows, "test"), path)


def full_disk(*_: object, **__: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_rows_are_read_while_and_after_they_are_written(path: Path) -> None:
    entries = [record(0), record(1, status=Status.CRASHED, error="gone", latency_us=None, p20_us=None, p80_us=None)]
    with ProfileStore(path) as store:
        for entry in entries:
            assert store.append(entry)
        assert len(ProfileStore(path).records()) == len(store.records()) == 2
        assert not path.exists()
    assert list(contents(path.parent)) == ["profile.parquet"]
    assert ProfileStore(path).keys() == {entry.key for entry in entries}
    assert ProfileStore(path).keys(Status.CRASHED, Status.TIMEOUT) == {entries[1].key}
    assert ProfileStore(path).load() == entries
    assert ProfileStore(path).load(status=Status.OK) == entries[:1]


def test_append_needs_no_with(path: Path) -> None:
    store = ProfileStore(path)
    store.append(record(0))
    store.close()
    store.close()
    store.append(record(1))
    store.close()
    assert len(store.records()) == 2


def test_batch_sizes_of_files_from_before_the_column_are_those_that_their_loads_name(path: Path) -> None:
    of_batch = [loads.zipf(8, 48, 2), loads.uniform(8, 512, 2).expert_parallel(2, 1)]
    of_nothing = [
        TokenLoad(tokens_per_expert=(3, 4), source=source) for source in ("a trace of 9 tokens", "trace.json")
    ]
    entries = [replace(record(index), load=load) for index, load in enumerate((*of_batch, *of_nothing))]
    fill(path, *entries)
    assert [entry.load.num_tokens for entry in ProfileStore(path).load()] == [48, 512, None, None]
    pq.write_table(pq.read_table(path).drop_columns("num_tokens"), path)
    assert [entry.load.num_tokens for entry in ProfileStore(path).load()] == [48, 512, None, None]
    assert ProfileStore(path).load() == entries
    with ProfileStore(path) as store:
        store.append(replace(record(4), load=loads.uniform(8, 7, 2)))
    assert ProfileStore(path).records()["num_tokens"].tolist()[:2] == [48, 512]
    assert ProfileStore(path).load()[-1].load.num_tokens == 7


def test_there_is_nothing_in_a_profile_that_is_not_there(path: Path) -> None:
    frame = ProfileStore(path).records()
    assert frame.empty
    assert list(frame.columns) == tables.SCHEMA.names
    with ProfileStore(path):
        pass
    assert not list(path.parent.iterdir())


def test_provenance_is_kept(path: Path) -> None:
    row = ProfileStore(fill(path, record())).records().iloc[0]
    assert (row.gpu, row.sm_clock_mhz, row.kernel_fingerprint) == ("rtx4090", 2520.0, "c0ffee")
    assert row.versions == {"torch": "2.13.0", "driver": "580.95"}


def test_a_query_takes_values_enums_and_collections(path: Path) -> None:
    mixed = (parse("w16a16"), parse("w4a16_g128_asym"), parse("w16a16"), parse("w16a16"))
    predicted = record(2, source=Source.PREDICTED, num_samples=0, sm_clock_mhz=None)
    store = ProfileStore(fill(path, record(0), record(1, schemes=mixed), predicted))

    def numbers(**filters: object) -> list[int]:
        return [n - 2048 for n in store.records(**filters)["n"]]

    assert numbers() == [0, 1, 2]
    assert numbers(n=2049) == [1]
    assert numbers(n=(2048, 2050)) == [0, 2]
    assert numbers(source=Source.PREDICTED) == numbers(source="predicted") == [2]
    assert numbers(schemes=parse("w4a16_g128_asym")) == numbers(schemes="w4a16_g128_asym") == [0, 2]
    assert numbers(schemes="w16a16") == []
    assert numbers(config=parse_config("mma_128x16_w8x1x1_s4_k1_at_o2"), status=[Status.OK], n=2048) == [0]
    with pytest.raises(SpecError, match="cannot be filtered by n='many'"):
        store.records(n="many")
    for name in ("latency", "tokens_per_expert"):
        with pytest.raises(SpecError, match=f"cannot be filtered by '{name}', only by gpu, model"):
            store.records(**{name: 1})


def test_a_candidate_is_kept_once(path: Path) -> None:
    other = record(0, latency_us=41.5)
    with ProfileStore(path) as store:
        assert store.append(record(0))
        assert not store.append(record(0, timestamp="2026-11-24T00:00:00+00:00"))
        with pytest.raises(DataError, match=r"w4a16_g128_asym mma_.* is 41\.5 us, but 41\.25 us in an earlier row"):
            store.append(other)
    with ProfileStore(path) as store, pytest.raises(DataError, match="in an earlier row"):
        store.append(other)
    assert len(ProfileStore(path).records()) == 1


FAILED = {"status": "timeout", "error": "60 s", "latency_us": None, "p20_us": None, "p80_us": None}
BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"latency_us": float("nan")}, "row 1 has latency_us nan; a positive, finite"),
    ({"latency_us": -1.0}, r"latency_us -1\.0; a positive"),
    ({"latency_us": 0.0}, r"latency_us 0\.0; a positive"),
    ({"latency_us": float("inf")}, "latency_us inf; a positive"),
    ({"latency_us": None}, "latency_us None; a finished candidate has a latency"),
    ({"p20_us": 50.0}, "p20_us 50.0; it must not exceed the median"),
    ({"p80_us": 1.0}, r"p80_us 1\.0; it must not be below"),
    ({"p80_us": float("nan")}, "p80_us nan"),
    ({"sm_clock_mhz": 0.0}, r"sm_clock_mhz 0\.0"),
    ({"num_samples": 0}, "num_samples 0; a measured latency has at least 1"),
    ({"gpu": "rtx9999"}, "unknown GPU 'rtx9999': known are"),
    ({"gpu": None}, "row 1 has no gpu"),
    ({"schemes": ["w5a5_g128_sym"]}, "no scheme 'w5a5_g128_sym'"),
    ({"schemes": []}, r"schemes \[\]; one, or one per expert"),
    ({"schemes": ["w16a16", "w16a16"]}, "one, or one per expert"),
    ({"schemes": [None]}, "an absent name among the schemes"),
    ({"config": "fast"}, "unknown kernel configuration 'fast'"),
    ({"status": "fine"}, "unknown status 'fine'"),
    ({"source": "guessed"}, "unknown source 'guessed'"),
    ({"timestamp": "yesterday"}, "unknown timestamp 'yesterday'"),
    ({"timestamp": "2026-11-23T08:15:00+02:00"}, "unknown timestamp"),
    ({"error": "oh"}, "error oh; a finished candidate has none"),
    (FAILED | {"error": ""}, "one that failed has one"),
    (FAILED | {"latency_us": 3.0}, r"latency_us 3\.0; a candidate that failed has none"),
    ({"n": 0}, "n 0; at least 1"),
    ({"num_experts": 3}, "one number per expert is needed"),
    ({"tokens_per_expert": [1, 2, 3, -4]}, "numbers of at least 0"),
    ({"tokens_per_expert": [1, 2, 3, None]}, "numbers of at least 0"),
    ({"schema_version": 2}, "schema version is 2; this version of bitile reads 1"),
    ({"n": 2048, "latency_us": 41.5, "p20_us": 41.0}, r"row 1: rtx4090 .* is 41\.5 us, but 41\.25 us in .* row 0"),
    ({"n": 2048, "latency_us": 41.25, "p20_us": 40.0}, r"is 41\.25 us with other quantiles, but 41\.25 us"),
]


@pytest.mark.parametrize(("changes", "says"), BAD_ROWS, ids=lambda value: str(value)[:40])
def test_a_table_with_a_bad_row_is_refused_whole_and_unchanged(changes: dict[str, Any], says: str, path: Path) -> None:
    write_rows(path, record(0).to_row(), record(1).to_row() | changes)
    before = contents(path.parent)
    attempts: list[Callable[[], object]] = [
        ProfileStore(path).records,
        ProfileStore(path).keys,
        lambda: ProfileStore(path).append(record(2)),
        lambda: merge([path], path.parent / "merged.parquet"),
    ]
    for attempt in attempts:
        with pytest.raises(DataError, match=says) as caught:
            attempt()
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert contents(path.parent) == before


def test_a_bad_record_is_refused_and_the_store_goes_on(path: Path) -> None:
    with ProfileStore(path, gpu="rtx4090") as store:
        for number, (changes, says) in enumerate(
            [
                ({"latency_us": float("nan")}, "latency_us nan"),
                ({"latency_us": -3.0}, "latency_us -3"),
                ({"gpu": "rtx9999"}, "unknown GPU"),
                ({"gpu": "h200"}, "rows of the GPU h200, where rtx4090 is expected"),
                ({"n": 2**40}, "does not have the columns"),
            ]
        ):
            with pytest.raises(DataError, match=says):
                store.append(record(0, **changes))
            store.append(record(number + 1))
    assert len(ProfileStore(path).records()) == 5


def test_another_gpus_table_is_refused(path: Path) -> None:
    fill(path, record())
    assert len(ProfileStore(path, gpu="rtx4090").records()) == 1
    with pytest.raises(DataError, match="rows of the GPU rtx4090, where h200 is expected"):
        ProfileStore(path, gpu="h200").records()
    with pytest.raises(DataError, match="where h200 is expected"):
        ProfileStore(path, gpu="h200").open()


def test_foreign_files_are_refused_and_unchanged(path: Path) -> None:
    write_rows(path, record().to_row())
    whole = path.read_bytes()
    for foreign in (b"", b"PAR1", b"a,b\n1,2\n", whole[: len(whole) // 2], whole[:-1], whole[10:], b"\0" * 4096):
        path.write_bytes(foreign)
        for attempt in (ProfileStore(path).records, ProfileStore(path).open):
            with pytest.raises(DataError, match="not a readable Parquet file, truncated or foreign") as caught:
                attempt()
            assert "\n" not in str(caught.value)
        assert contents(path.parent) == {path.name: foreign}
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(DataError, match=r"not a profile \(missing columns: gpu, .* and 14 more; unknown: x\)"):
        ProfileStore(path).records()
    pq.write_table(tables.from_rows([record().to_row()], "").set_column(3, "n", pa.array(["many"])), path)
    with pytest.raises(DataError, match="not of a profile's type"):
        ProfileStore(path).records()
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match="not a"):
        ProfileStore(path).records()


def test_a_profile_that_pandas_rewrote_is_read(path: Path) -> None:
    frame = ProfileStore(fill(path, record(0), record(1))).records()
    frame["versions"] = [list(versions.items()) for versions in frame["versions"]]
    table = pa.Table.from_pandas(frame, schema=tables.SCHEMA)
    pq.write_table(table.set_column(3, "n", table.column("n").cast(pa.int64())), path)
    assert ProfileStore(path).keys() == {record(0).key, record(1).key}


def test_damaged_pages_are_noticed(path: Path) -> None:
    """Any single flipped byte of the data pages: checksums notice it, or it was of no consequence."""
    rows = ProfileStore(fill(path, record(0), record(1))).records()
    whole = path.read_bytes()
    end = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")  # where the footer begins
    noticed = 0
    for position in range(4, end, 23):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            assert ProfileStore(path).records().equals(rows)
        except DataError:
            noticed += 1
    assert noticed > (end - 4) / 23 / 2


class TestMerge:
    def test_rows_of_several_machines_come_together(self, tmp_path: Path) -> None:
        one = fill(tmp_path / "one.parquet", record(0), record(1))
        two = fill(tmp_path / "two.parquet", record(1), record(2, gpu="h200"))
        out = tmp_path / "all.parquet"
        for _ in range(2):
            assert merge([one, two], out) == 3
            assert list(ProfileStore(out).records()["gpu"]) == ["rtx4090", "rtx4090", "h200"]
        assert merge([one, out], one) == 3
        assert len(ProfileStore(one).records()) == 3
        assert sorted(contents(tmp_path)) == ["all.parquet", "one.parquet", "two.parquet"]

    def test_rows_that_a_running_sweep_has_finished_are_merged(self, tmp_path: Path) -> None:
        with ProfileStore(tmp_path / "one.parquet") as running:
            running.append(record(0))
            assert merge([running.path], tmp_path / "all.parquet") == 1

    def test_a_disagreement_changes_nothing(self, tmp_path: Path) -> None:
        one = fill(tmp_path / "one.parquet", record(0), record(1))
        two = fill(tmp_path / "two.parquet", record(2), record(1, latency_us=42.0))
        out = fill(tmp_path / "all.parquet", record(7))
        before = contents(tmp_path)
        with pytest.raises(DataError, match=r"two\.parquet row 1: .* is 42 us, but 42\.25 us in .*one\.parquet row 1"):
            merge([one, two], out)
        assert contents(tmp_path) == before

    def test_an_absent_profile_is_refused(self, tmp_path: Path) -> None:
        one = fill(tmp_path / "one.parquet", record(0))
        with pytest.raises(DataError, match=r"two\.parquet: no such profile"):
            merge([one, tmp_path / "two.parquet"], tmp_path / "all.parquet")
        assert list(contents(tmp_path)) == ["one.parquet"]


class TestJournal:
    @pytest.fixture
    def abandoned(self, path: Path) -> Path:
        """The journal of a writer that died after three rows."""
        store = ProfileStore(path)
        for number in range(3):
            store.append(record(number))
        content = journal(path).read_bytes()
        store.close()
        path.unlink()
        journal(path).write_bytes(content)
        return journal(path)

    def test_what_a_dead_writer_left_is_read_then_folded(self, abandoned: Path, path: Path) -> None:
        (path.parent / ".profile.parquet.0123456789abcdef.tmp").write_bytes(b"half a file")
        assert len(ProfileStore(path).records()) == 3
        with ProfileStore(path) as store:
            assert len(pq.read_table(path)) == 3
            store.append(record(3))
        assert len(pq.read_table(path)) == 4
        assert list(contents(path.parent)) == ["profile.parquet"]

    def test_a_journal_cut_anywhere_loses_the_row_in_flight_only(self, abandoned: Path, path: Path) -> None:
        content = abandoned.read_bytes()
        for cut in range(0, len(content), 13):
            abandoned.write_bytes(content[:cut])
            assert len(ProfileStore(path).records()) == max(content[:cut].count(b"\n") - 1, 0)
        with ProfileStore(path) as store:
            store.append(record(2))
        assert list(ProfileStore(path).records()["n"]) == [2048, 2049, 2050]

    def test_a_byte_that_changed_is_refused_and_unchanged(self, abandoned: Path, path: Path) -> None:
        content = abandoned.read_bytes()
        for position in range(0, len(content) - 1, 29):
            abandoned.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
            before = contents(path.parent)
            for attempt in (ProfileStore(path).records, ProfileStore(path).open):
                with pytest.raises(DataError, match=r"line [1-4] is damaged, its checksum differs"):
                    attempt()
            assert contents(path.parent) == before

    @pytest.mark.parametrize(
        ("values", "says"),
        [
            ({"bitile_journal": 2}, "line 1 is not the heading"),
            ({"gpu": "rtx4090"}, "line 1 is not the heading"),
            ([1], "line 1 is not a row"),
        ],
    )
    def test_another_journal_is_refused(self, values: Any, says: str, path: Path) -> None:
        journal(path).write_bytes(journals._encode(values))
        with pytest.raises(DataError, match=says):
            ProfileStore(path).records()

    def test_a_row_folded_twice_is_one_row(self, abandoned: Path, path: Path) -> None:
        """The writer died between replacing the Parquet file and emptying the journal."""
        content = abandoned.read_bytes()
        fill(path)
        journal(path).write_bytes(content)
        assert len(ProfileStore(path).records()) == 3
        fill(path, record(3))
        assert len(ProfileStore(path).records()) == 4

    def test_a_reader_misses_no_row_that_is_folded_meanwhile(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        writer = ProfileStore(path)
        writer.append(record(0))

        def read_then_fold(file: Path) -> list[dict[str, Any]]:
            monkeypatch.undo()
            rows = journals.read_journal(file)
            writer.append(record(1))
            writer.close()
            return rows

        monkeypatch.setattr(stores, "read_journal", read_then_fold)
        assert len(ProfileStore(path).records()) == 2

    def test_a_full_disk_keeps_the_earlier_rows(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with ProfileStore(path) as store:
            store.append(record(0))
            pwrite = os.pwrite

            def half_then_full(file: int, data: memoryview, offset: int) -> int:
                monkeypatch.setattr(os, "pwrite", full_disk)
                return pwrite(file, data[: len(data) // 2], offset)

            monkeypatch.setattr(os, "pwrite", half_then_full)
            with pytest.raises(
                DataError, match=r"cannot be written \(No space left on device\); earlier rows are kept"
            ):
                store.append(record(1))
            assert len(ProfileStore(path).records()) == 1
            monkeypatch.undo()
            store.append(record(1))
        assert list(ProfileStore(path).records()["n"]) == [2048, 2049]

    def test_a_disk_too_full_to_fold_keeps_the_journal(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fill(path, record(0))
        before = path.read_bytes()
        store = ProfileStore(path)
        store.append(record(1))
        monkeypatch.setattr(tables.pq, "write_table", full_disk)
        with pytest.raises(
            DataError, match=r"cannot be written \(No space left on device\); what was there is unchanged"
        ):
            store.close()
        monkeypatch.undo()
        assert path.read_bytes() == before
        assert sorted(contents(path.parent)) == ["profile.parquet", "profile.parquet.journal"]
        assert len(ProfileStore(path).records()) == 2
        fill(path, record(2))
        assert len(pq.read_table(path)) == 3

    def test_an_interrupted_append_harms_no_other(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(_: int) -> None:
            raise KeyboardInterrupt

        with ProfileStore(path) as store:
            store.append(record(0))
            monkeypatch.setattr(os, "fsync", interrupt)
            with pytest.raises(KeyboardInterrupt):
                store.append(record(1, model="a longer name than that of the row which comes after it"))
            monkeypatch.undo()
            store.append(record(2))
        assert list(ProfileStore(path).records()["n"]) == [2048, 2050]
