from hypothesis import given

from profiles import table as tables
from profiles.records import ProfileRecord, candidate_key
from profiles.schemes import parse
from tests.profiles.strategies import record, records


@given(records())
def test_a_record_is_a_row_that_keeps_the_rules_and_is_read_back(entry: ProfileRecord) -> None:
    table = tables.from_rows([entry.to_row()], "test")
    tables.check(table, "test", entry.gpu)
    assert ProfileRecord.from_row(tables.row_of(table, 0)) == entry
    assert tables.keys(table) == [entry.key]


def test_one_scheme_for_all_experts_has_one_spelling() -> None:
    scheme = parse("w8a8_g-1_sym")
    assert record(schemes=(scheme,) * 4).key == record(schemes=(scheme,)).key
    assert record(schemes=(scheme,) * 4).to_row()["schemes"] == ["w8a8_g-1_sym"]


def test_the_key_is_what_was_run_and_not_how_it_went() -> None:
    base = record()
    assert base.key == record(latency_us=40.0, p20_us=40.0, p80_us=40.0, num_samples=7, versions={}, timestamp="x").key
    changes = [
        {"gpu": "h200"},
        {"model": "other"},
        {"linear": "gate_up"},
        {"n": 64},
        {"k": 64},
        {"kernel_fingerprint": "other"},
        {"schemes": (parse("w4a16_g128_sym"),)},
    ]
    assert len({record(**change).key for change in changes} | {base.key}) == len(changes) + 1


def test_the_key_of_a_candidate_needs_no_record() -> None:
    row = record().to_row()
    names = (
        "gpu",
        "model",
        "linear",
        "n",
        "k",
        "tokens_per_expert",
        "schemes",
        "config",
        "source",
        "kernel_fingerprint",
    )
    assert candidate_key(**{name: row[name] for name in names}) == record().key
