from pathlib import Path

import pytest

from profiles.__main__ import main
from profiles.store import ProfileStore
from tests.profiles.strategies import record


def write(path: Path, *numbers: int) -> str:
    with ProfileStore(path) as store:
        for number in numbers:
            store.append(record(number))
    return str(path)


def test_merge_then_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two, out = (
        write(tmp_path / "one.parquet", 0, 1),
        write(tmp_path / "two.parquet", 1, 2),
        tmp_path / "all.parquet",
    )
    assert main(["merge", "--out", str(out), one, two]) == 0
    assert main(["show", str(out), one]) == 0
    said = capsys.readouterr().out
    assert f"{out}: 3 rows" in said
    assert f"{one}: 2 rows" in said
    assert "rtx4090 qwen1.5-moe-a2.7b measured ok         3" in said


def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = tmp_path / "absent.parquet"
    for arguments in (["show", str(absent)], ["merge", "--out", str(tmp_path / "all.parquet"), str(absent)]):
        assert main(arguments) == 2
        assert capsys.readouterr().err == f"error: {absent}: no such profile\n"
    assert not list(tmp_path.iterdir())
