"""The model of the launches that come with the package: fitted once, then read, and never one of other launches."""

from pathlib import Path

import pytest

from costmodel import shipped
from profiles.errors import DataError
from profiles.gpus import gpu
from profiles.places import committed_profiles

SMALL = [path for path in committed_profiles("h200") if path.name == "mixed_v2.parquet"]


def test_fitted_once_then_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BITILE_CACHE", str(tmp_path))
    monkeypatch.setattr(shipped, "committed_profiles", lambda _: SMALL)
    shipped.fitted.cache_clear()
    first = shipped.fitted(gpu("h200"))
    (kept,) = (tmp_path / "latency").iterdir()
    monkeypatch.setattr(shipped, "fit", lambda _: pytest.fail("fitted again"))
    shipped.fitted.cache_clear()
    assert shipped.fitted(gpu("h200")).version == first.version
    kept.write_bytes(b"not a model")
    shipped.fitted.cache_clear()
    with pytest.raises(DataError, match="not a latency model"):
        shipped.fitted(gpu("h200"))
    shipped.fitted.cache_clear()


def test_other_launches_are_another_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    changed = tmp_path / SMALL[0].name
    changed.write_bytes(SMALL[0].read_bytes() + b" ")
    assert shipped._digest(tuple(SMALL)) != shipped._digest((changed,))


def test_a_gpu_without_launches_is_refused() -> None:
    with pytest.raises(DataError, match="no launches of rtx4090 come with bitile"):
        shipped.fitted(gpu("rtx4090"))


def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BITILE_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(shipped, "committed_profiles", lambda _: SMALL)
    monkeypatch.setattr(shipped, "fit", lambda _: None)
    shipped.fitted.cache_clear()
    with pytest.raises(DataError, match="set BITILE_CACHE to a folder that can be written"):
        shipped.fitted(gpu("h200"))
