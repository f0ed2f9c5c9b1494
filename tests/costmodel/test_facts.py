import json

import pytest

from costmodel.facts import BuildFacts
from profiles.errors import DataError

FACTS = BuildFacts(
    registers_per_thread=128,
    smem_bytes=50_000,
    stack_bytes=0,
    spill_bytes=0,
    num_threads=256,
    ctas_per_sm=2,
    mma_instructions=("HMMA.16816.F32.BF16",),
    compile_seconds=0.5,
    fingerprint="ab12",
)


def test_round_trip() -> None:
    assert BuildFacts.from_json(FACTS.to_json()) == FACTS
    assert not FACTS.is_estimated


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("smem_bytes", -1),
        ("registers_per_thread", 12.5),
        ("num_threads", True),
        ("mma_instructions", "HMMA"),
        ("mma_instructions", [1]),
        ("fingerprint", None),
        ("compile_seconds", float("nan")),
        ("compile_seconds", float("inf")),
    ],
)
def test_bad_value_is_named(name: str, value: object) -> None:
    data = json.loads(FACTS.to_json()) | {name: value}
    with pytest.raises(DataError, match=name):
        BuildFacts.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '{"smem_bytes": 1}'])
def test_not_facts(text: str) -> None:
    with pytest.raises(DataError):
        BuildFacts.from_json(text)


def test_unknown_field_is_named() -> None:
    data = json.loads(FACTS.to_json()) | {"colour": 1}
    with pytest.raises(DataError, match="colour"):
        BuildFacts.from_json(json.dumps(data))
