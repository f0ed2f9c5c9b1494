import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kernel_gen.cache import ENTRY_NAME, LEFTOVER_AGE_S, OBJECT_NAME, KernelCache, default_cache_dir
from kernel_gen.compiler import Artifact
from tests.kernel_gen.build.specs import SMALL, kernel_spec


def entry_of(cache: KernelCache) -> Path:
    (found,) = cache.root.glob(f"*/*/{ENTRY_NAME}")
    return found.parent


def truncate(folder: Path) -> None:
    path = folder / OBJECT_NAME
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(folder: Path) -> None:
    path = folder / OBJECT_NAME
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_the_entry(folder: Path) -> None:
    path = folder / ENTRY_NAME
    path.write_text(path.read_text()[:40])


def write_a_list(folder: Path) -> None:
    (folder / ENTRY_NAME).write_text("[1, 2]")


def drop_a_field(folder: Path) -> None:
    path = folder / ENTRY_NAME
    entry = json.loads(path.read_text())
    del entry["code"]["stack_bytes"]
    path.write_text(json.dumps(entry))


def claim_another_kernel(folder: Path) -> None:
    path = folder / ENTRY_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "label": "another"}))


def lose_the_object(folder: Path) -> None:
    (folder / OBJECT_NAME).unlink()


def test_what_is_put_is_got(copied_cache: KernelCache, small: Artifact) -> None:
    found = copied_cache.get(SMALL)
    assert found is not None
    assert dataclasses.replace(found, object_path=small.object_path) == small
    assert found.object_path.read_bytes() == small.object_path.read_bytes()


def test_another_spec_is_not_found(copied_cache: KernelCache) -> None:
    assert copied_cache.get(kernel_spec("w4a16_g128_asym")) is None
    assert copied_cache.get(dataclasses.replace(SMALL, arch="sm_80")) is None
    assert copied_cache.get(dataclasses.replace(SMALL, max_experts=512)) is None


def test_another_compiler_is_another_kernel(copied_cache: KernelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernel_gen.cache.dsl_version", lambda: "0.0.1")
    assert copied_cache.get(SMALL) is None


@pytest.mark.parametrize(
    "damage",
    [truncate, flip_a_bit, cut_the_entry, write_a_list, drop_a_field, claim_another_kernel, lose_the_object],
)
def test_damaged_entry_is_dropped_and_can_be_put_again(
    copied_cache: KernelCache, small: Artifact, damage: Callable[[Path], None]
) -> None:
    damage(entry_of(copied_cache))
    assert copied_cache.get(SMALL) is None
    copied_cache.put(small)
    assert copied_cache.get(SMALL) is not None


def test_putting_twice_keeps_the_first(copied_cache: KernelCache, small: Artifact) -> None:
    before = (entry_of(copied_cache) / OBJECT_NAME).stat().st_mtime_ns
    copied_cache.put(small)
    assert (entry_of(copied_cache) / OBJECT_NAME).stat().st_mtime_ns == before
    assert [path.name for path in copied_cache.root.iterdir() if path.name.startswith(".")] == []


def test_leftovers_of_killed_builds_go_and_those_of_running_ones_stay(copied_cache: KernelCache) -> None:
    with copied_cache.scratch_dir() as old, copied_cache.scratch_dir() as new:
        Path(old, "half.o").write_bytes(b"half")
        age = Path(old).stat().st_mtime - LEFTOVER_AGE_S - 1
        os.utime(old, (age, age))
        copied_cache.remove_leftovers()
        assert not Path(old).exists()
        assert Path(new).exists()
        Path(old).mkdir()
    assert copied_cache.get(SMALL) is not None


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"BITILE_CACHE": "/a/b", "XDG_CACHE_HOME": "/x"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/bitile"),
        ({"HOME": "/home/someone"}, "/home/someone/.cache/bitile"),
    ],
)
def test_place_of_the_cache(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
    for name in ("BITILE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert default_cache_dir() == Path(expected)
