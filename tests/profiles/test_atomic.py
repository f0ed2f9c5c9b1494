from pathlib import Path

import pytest

from profiles.atomic import remove_leftovers, replacing, require_writable
from profiles.errors import DataError


def test_a_file_takes_the_place_of_another(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted_write() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_a_path_without_a_name_is_a_folder(path: str) -> None:
    with pytest.raises(IsADirectoryError, match="Is a directory"), replacing(Path(path)):
        pytest.fail("there is nothing to write")


def test_leftovers_of_one_file_are_removed(tmp_path: Path) -> None:
    path, kept = tmp_path / "file", [".file2.ab.tmp", ".other.ab.tmp", "file", "file.tmp"]
    for name in (".file.ab.tmp", ".file.cd.tmp", *kept):
        (tmp_path / name).touch()
    remove_leftovers(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(kept)


def test_a_folder_that_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    require_writable(tmp_path / "a" / "b")
    require_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        with pytest.raises(DataError, match=f"^{folder}: nothing can be written there"):
            require_writable(folder)
