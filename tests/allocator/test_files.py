"""The nouns and their files: round trips, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import allocator
from allocator import Allocation, Budget, Options, Sensitivity, allocate
from profiles import schemes
from profiles.errors import DataError, SpecError
from profiles.models import Linear, LinearId
from profiles.schemes import KERNEL_SCHEMES
from tests.allocator.tables import a_cost_table, a_sensitivity


@pytest.fixture(scope="module")
def allocation() -> Allocation:
    budget = Budget(avg_weight_bits=4.25, max_latency_us={"decode": 225.0})
    return allocate(a_sensitivity(), a_cost_table(), budget)


def test_a_sensitivity_comes_back_as_it_was_written(tmp_path: Path) -> None:
    table = a_sensitivity()
    table.write(tmp_path / "s.parquet")
    back = Sensitivity.read(tmp_path / "s.parquet")
    pd.testing.assert_frame_equal(back.frame(), table.frame())
    assert back.provenance == {
        "model": "olmoe-1b-7b",
        "metric": "block_l2",
        "data": "synthetic",
        "num_samples": 4,
        "seed": 0,
    }
    assert list(tmp_path.iterdir()) == [tmp_path / "s.parquet"]


def test_a_sensitivity_from_losses_as_arrays() -> None:
    one, two = schemes.parse("w4a16_g128_sym"), schemes.parse("w16a16")
    block = LinearId(layer=0, expert=3, linear=Linear.DOWN)
    other = LinearId(layer=0, expert=-1, linear=Linear.DOWN)
    table = Sensitivity.from_losses(
        {(block, one): 0.5, (block, two): 0.0, (other, two): -0.25},
        model="m",
        metric="l2",
        data="d",
        num_samples=1,
        seed=0,
    )
    blocks, columns, losses = table.arrays()
    assert blocks == (other, block)
    assert columns == (two, one)
    assert losses.tolist() == [[-0.25, np.inf], [0.0, 0.5]]
    assert table.schemes == columns


BROKEN_ROWS: list[tuple[str, object, str]] = [
    ("loss", np.nan, "has no loss"),
    ("loss", np.inf, "a finite number is needed"),
    ("scheme", "w5a5", "w5a5"),
    ("linear", "router", "one of gate_up, down is needed"),
    ("layer", -1, "layer -1"),
    ("expert", -2, "expert -2"),
    ("num_samples", 0, "of one num_samples"),
    ("metric", "kl", "of one metric"),
    ("loss", "many", "type"),
]


@pytest.mark.parametrize(("column", "value", "says"), BROKEN_ROWS)
def test_broken_sensitivities_are_refused(column: str, value: object, says: str) -> None:
    frame = a_sensitivity().frame().astype(object)
    frame.loc[5, column] = value
    with pytest.raises(DataError, match=says):
        Sensitivity(frame)


def test_numbers_as_text_are_refused(tmp_path: Path) -> None:
    frame = a_sensitivity().frame()
    frame.assign(loss=frame["loss"].astype(str)).to_parquet(tmp_path / "s.parquet", index=False)
    with pytest.raises(DataError, match="loss is text"):
        Sensitivity.read(tmp_path / "s.parquet")


def test_rows_that_are_twice_or_missing_are_refused() -> None:
    frame = a_sensitivity().frame()
    with pytest.raises(DataError, match="two rows for layer 0, expert 0"):
        Sensitivity(pd.concat([frame, frame.iloc[:1]]))
    with pytest.raises(DataError, match="missing columns loss"):
        Sensitivity(frame.drop(columns="loss"))
    with pytest.raises(DataError, match="no rows"):
        Sensitivity(frame.iloc[:0])


def test_foreign_sensitivity_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    with pytest.raises(DataError, match="no such file"):
        Sensitivity.read(path)
    a_sensitivity().write(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not a readable Parquet file"):
        Sensitivity.read(path)
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(DataError, match="not a sensitivity"):
        Sensitivity.read(path)
    pq.write_table(pa.Table.from_pandas(a_sensitivity().frame().assign(schema_version=9)), path)
    with pytest.raises(DataError, match="schema version 9"):
        Sensitivity.read(path)
    with pytest.raises(DataError, match="cannot be written"):
        a_sensitivity().write(tmp_path / "missing" / "s.parquet")


def test_an_allocation_comes_back_as_it_was_written(tmp_path: Path, allocation: Allocation) -> None:
    allocation.write(tmp_path / "a.json")
    assert Allocation.read(tmp_path / "a.json") == allocation


EDITS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda a: a.update(kind="recipe"), "not an allocation"),
    (lambda a: a.update(schema_version=2), "schema version 2"),
    (lambda a: a.pop("bound"), "has no bound"),
    (lambda a: a.update(bound=a["predicted_loss"] * 2), "do not fit loss"),
    (lambda a: a.update(gap=float("nan")), "type"),
    (lambda a: a.update(gap=-0.5), "do not fit loss"),
    (lambda a: a.update(avg_weight_bits=5.0), "exceeds its budget 4.25"),
    (lambda a: a["predicted_latency_us"].update(decode=1e6), "exceeds its budget 225"),
    (lambda a: a["assignment"].append(a["assignment"][0]), "a linear twice"),
    (lambda a: a.update(assignment=[]), "empty"),
    (lambda a: a["assignment"][0].__setitem__(3, "w9a9"), "w9a9"),
    (lambda a: a["assignment"][0].__setitem__(2, "router"), "router"),
    (lambda a: a["assignment"][0].__setitem__(0, "zero"), "type"),
    (lambda a: a["assignment"][0].pop(), "type"),
    (lambda a: a["kernel_configs"][0].__setitem__(3, "mma"), "mma"),
    (lambda a: a.update(budget=None), "type"),
    (lambda a: a["budget"].update(avg_weight_bits=-4), "positive"),
    (lambda a: a.update(granularity="tile"), "tile"),
    (lambda a: a.update(author="me"), "has no field 'author'"),
    (lambda a: a["assignment"][0].__setitem__(0, -1), "layer -1 expert"),
    (lambda a: a["assignment"][0].__setitem__(1, -2), "expert -2, which cannot be"),
    (lambda a: a["budget"].update(avg_weight_bits=None, weight_bytes=9), "exceeds its budget 9"),
]
SCHEMA = json.loads((Path(allocator.__file__).parent / "allocation.schema.json").read_text())


def test_the_schema_is_the_files(allocation: Allocation) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    content = json.loads(json.dumps(allocation.to_json()))
    jsonschema.validate(content, SCHEMA)
    assert set(SCHEMA["properties"]) == set(SCHEMA["required"]) == set(content)
    assert SCHEMA["properties"]["schema_version"]["const"] == content["schema_version"]
    for scheme in KERNEL_SCHEMES:
        jsonschema.validate(scheme.name, SCHEMA["$defs"]["scheme"])


IN_SCHEMA = [
    edit for edit, says in EDITS if says not in ("do not fit loss", "a linear twice", "mma") and "exceeds" not in says
]


@pytest.mark.parametrize("edit", IN_SCHEMA)
def test_what_breaks_a_type_breaks_the_schema_too(
    allocation: Allocation, edit: Callable[[dict[str, Any]], Any]
) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    content = json.loads(json.dumps(allocation.to_json()))
    edit(content)
    if content.get("gap") != content.get("gap"):
        return  # JSON has no NaN
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, SCHEMA)


@pytest.mark.parametrize(("edit", "says"), EDITS)
def test_edited_allocations_are_refused(
    tmp_path: Path, allocation: Allocation, edit: Callable[[dict[str, Any]], Any], says: str
) -> None:
    content = allocation.to_json()
    edit(content)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=says) as caught:
        Allocation.read(path)
    assert str(caught.value).startswith(str(path))


def test_foreign_allocation_files_are_refused(tmp_path: Path, allocation: Allocation) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(DataError, match="no such file"):
        Allocation.read(path)
    allocation.write(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a readable JSON file"):
        Allocation.read(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not a readable JSON file"):
        Allocation.read(path)
    path.write_text("[1, 2]")
    with pytest.raises(DataError, match="not an allocation"):
        Allocation.read(path)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "needs a limit"),
        ({"avg_weight_bits": 0.0}, "positive"),
        ({"avg_weight_bits": float("nan")}, "positive"),
        ({"avg_weight_bits": 4.0, "weight_bytes": 10}, "not both"),
        ({"max_latency_us": {"decode": -1.0}}, r"max_latency_us\[decode\]"),
        ({"max_latency_us": {"decode": 10.0}, "per_layer": True}, "per layer"),
    ],
)
def test_budgets_that_cannot_be_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        Budget(**fields)


def test_options_have_the_launch_s_four_slots() -> None:
    assert Options().max_schemes == 4
