"""The model of the launches that come with the package: fitted once, then read, and never one of other launches."""

from pathlib import Path

import pytest

from costmodel import model_file, shipped
from profiles.errors import DataError
from profiles.gpus import gpu
from profiles.places import committed_profiles

SMALL = [path for path in committed_profiles("h200") if path.name == "repeat_v4.parquet"]


def test_fitted_once_then_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BITILE_CACHE", str(tmp_path))
    monkeypatch.setattr(shipped, "committed_profiles", lambda _: SMALL)
    shipped.fitted.cache_clear()
    first = shipped.fitted(gpu("h200"))
    assert len(list((tmp_path / "latency").iterdir())) == 1
    monkeypatch.setattr(shipped, "fit", lambda _: pytest.fail("fitted again"))
    shipped.fitted.cache_clear()
    assert shipped.fitted(gpu("h200")).version == first.version
    shipped.fitted.cache_clear()


def test_a_damaged_file_is_fitted_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("BITILE_CACHE", str(tmp_path))
    monkeypatch.setattr(shipped, "committed_profiles", lambda _: SMALL)
    shipped.fitted.cache_clear()
    first = shipped.fitted(gpu("h200"))
    (kept,) = (tmp_path / "latency").iterdir()
    kept.write_bytes(kept.read_bytes()[:1000])
    shipped.fitted.cache_clear()
    assert shipped.fitted(gpu("h200")).version == first.version
    assert "not a latency model, truncated or foreign; fitted again" in caplog.text
    assert model_file.read(kept).version == first.version
    shipped.fitted.cache_clear()


def test_other_launches_are_another_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    changed = tmp_path / SMALL[0].name
    changed.write_bytes(SMALL[0].read_bytes() + b" ")
    assert shipped._digest(tuple(SMALL)) != shipped._digest((changed,))


def test_a_gpu_without_launches_is_refused() -> None:
    with pytest.raises(DataError, match="no launches of rtx4090 come with bitile"):
        shipped.fitted(gpu("rtx4090"))


def test_a_cache_that_cannot_be_written_costs_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A launch needs the model, not the file."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BITILE_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(shipped, "committed_profiles", lambda _: SMALL)
    shipped.fitted.cache_clear()
    assert shipped.fitted(gpu("h200")).gpu == "h200"
    assert "the latency model is not kept, and will be fitted again" in caplog.text
    shipped.fitted.cache_clear()
