"""Several sessions' measurements as one table, on made-up profiles."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from costmodel.sessions import (
    MACHINE_CODE,
    MIN_COMPARED,
    MIN_SHARED,
    candidate_ids,
    noise_floor,
    of_present_kernels,
    session_codes,
    usable,
)
from profiles.errors import DataError
from tests.costmodel.synthetic import NOISE, profile

LATER = "2026-01-02T00:00:00+00:00"
_TIMES = ["latency_us", "p20_us", "p80_us"]


@pytest.fixture(scope="module")
def once() -> pd.DataFrame:
    return profile(seed=1, models=("alpha",), mixes=0)


@pytest.fixture(scope="module")
def again() -> pd.DataFrame:
    return profile(seed=2, models=("alpha",), mixes=0).assign(timestamp=LATER)


def _both(*parts: pd.DataFrame) -> pd.DataFrame:
    return pd.concat(parts, ignore_index=True)


def _slower(rows: pd.DataFrame, factor: float) -> pd.DataFrame:
    return rows.assign(**{name: rows[name] * factor for name in _TIMES})


def test_noise_floor_of_two_sessions(once: pd.DataFrame, again: pd.DataFrame) -> None:
    noise = noise_floor(_both(once, again))
    assert noise.num_repeats == len(once)
    assert noise.within_run == pytest.approx(0.01)
    # |difference| of two normals of this deviation has the mean 2 / sqrt(pi) of it.
    assert noise.between_runs_mean == pytest.approx(2 / np.sqrt(np.pi) * NOISE, rel=0.25)
    found = (noise.between_runs_median, noise.between_runs_mean, noise.between_runs_p90)
    assert None not in found
    assert list(found) == sorted(found)  # type: ignore[type-var]
    regret = (0.0, noise.between_runs_regret_mean, noise.between_runs_regret_p99)
    assert list(regret) == sorted(regret)  # type: ignore[type-var]
    assert noise_floor(once).between_runs_mean is None
    assert noise_floor(once).num_repeats == 0


def test_repeats_become_one_row_of_their_mean(once: pd.DataFrame, again: pd.DataFrame) -> None:
    merged = usable(_both(once, again))
    assert len(merged) == len(once)
    assert len(np.unique(candidate_ids(merged))) == len(merged)
    between = np.sqrt(once["latency_us"] * again["latency_us"])
    np.testing.assert_allclose(merged["latency_us"], between, rtol=2e-3)
    assert (merged["p20_us"] < merged["latency_us"]).all()


def test_a_sessions_clock_is_set_by_what_it_shares(once: pd.DataFrame, again: pd.DataFrame) -> None:
    """A second session 10% slower, half of whose launches the first has not: all of them are set right."""
    shared = once.iloc[::2]
    merged = usable(_both(shared, _slower(again, 1.1)))
    true = pd.Series(once["latency_us"].to_numpy(), index=candidate_ids(once))
    ratios = merged["latency_us"].to_numpy() / true.reindex(candidate_ids(_both(once, merged))[len(once) :]).to_numpy()
    # Neither clock is known to be right: both move to the middle, and agree.
    np.testing.assert_allclose(np.median(ratios), np.sqrt(1.1), rtol=0.01)
    assert np.std(np.log(ratios)) < 2 * NOISE
    few = once.iloc[: MIN_SHARED - 1]
    alone = usable(_both(few, _slower(again, 1.1)))
    assert alone["latency_us"].max() == pytest.approx(1.1 * again["latency_us"].max(), rel=0.06)


def test_rows_of_slower_sources_are_dropped_and_equal_ones_kept(once: pd.DataFrame, again: pd.DataFrame) -> None:
    old, new = _slower(once, 1.2), again.assign(kernel_fingerprint="changed").iloc[:60]
    kept = of_present_kernels(_both(old, new))
    assert set(kept["kernel_fingerprint"]) == {"changed"}
    same = of_present_kernels(_both(once, new))
    assert len(same) == len(once) + len(new)
    few = of_present_kernels(_both(once, new.iloc[: MIN_COMPARED - 1]))
    assert len(few) == MIN_COMPARED - 1, "too few to tell: what exists now counts"


def test_other_sources_with_the_same_machine_code_drop_nothing(once: pd.DataFrame, again: pd.DataFrame) -> None:
    def coded(rows: pd.DataFrame, code: str) -> pd.DataFrame:
        return rows.assign(versions=[{MACHINE_CODE: code}] * len(rows))

    new = coded(again.assign(kernel_fingerprint="changed").iloc[: MIN_COMPARED - 1], "same")
    assert len(of_present_kernels(_both(coded(once, "same"), new))) == len(once) + len(new)
    assert len(of_present_kernels(_both(coded(once, "other"), new))) == len(new)


def test_one_session_that_measures_a_kernel_twice_counts_as_repeats(once: pd.DataFrame) -> None:
    minute_later = once.assign(timestamp="2026-01-01T00:01:00+00:00", latency_us=once["latency_us"] * 1.02)
    noise = noise_floor(_both(once, minute_later))
    assert noise.num_repeats == len(once)
    assert noise.between_runs_median == pytest.approx(0.02)


def test_all_of_the_session_with_the_new_sources_stays(once: pd.DataFrame, again: pd.DataFrame) -> None:
    """Also what it measured first, of kernels that no session before had."""
    new = again.assign(kernel_fingerprint="changed")
    unheard_of = new.iloc[:20].assign(config="mma_128x8_w8x1x1_s5_k1_at_o1")
    kept = of_present_kernels(_both(_slower(once, 1.2), unheard_of, new))
    assert len(kept) == len(unheard_of) + len(new)


def test_of_three_generations_only_the_last_stays(once: pd.DataFrame, again: pd.DataFrame) -> None:
    """Also where the last did not measure a kernel again that the second had measured."""
    half = len(once) // 2
    first, second = _slower(once, 1.5), _slower(again, 1.2).assign(kernel_fingerprint="second")
    third = once.iloc[:half].assign(kernel_fingerprint="third", timestamp="2026-01-03T00:00:00+00:00")
    kept = of_present_kernels(_both(first, second, third))
    assert set(kept["kernel_fingerprint"]) == {"third"}
    assert len(kept) == half


def test_two_builds_of_one_session_replace_nothing(once: pd.DataFrame) -> None:
    builds = once.assign(kernel_fingerprint=["for 64 experts", "for 256 experts"] * (len(once) // 2))
    assert len(of_present_kernels(builds)) == len(builds)


def test_another_familys_change_drops_nothing(once: pd.DataFrame, again: pd.DataFrame) -> None:
    def of_wgmma(rows: pd.DataFrame) -> pd.DataFrame:
        return rows.assign(config=rows["config"].str.replace("mma_", "wgmma_", regex=False))

    rows = _both(once, of_wgmma(_slower(once, 1.2)), of_wgmma(again.assign(kernel_fingerprint="changed")))
    kept = of_present_kernels(rows)
    assert (kept["config"].str.startswith("mma_")).sum() == len(once)
    assert len(kept) == len(once) + len(again)


def test_sessions_are_told_apart_by_pauses(once: pd.DataFrame, again: pd.DataFrame) -> None:
    assert session_codes(_both(once, again)).tolist() == [0] * len(once) + [1] * len(again)


def test_nothing_finished_or_several_gpus_are_refused(once: pd.DataFrame) -> None:
    with pytest.raises(DataError, match="no finished row"):
        usable(once.assign(status="crashed"))
    with pytest.raises(DataError, match=r"several GPUs \(h200, rtx4090\)"):
        usable(_both(once, once.assign(gpu="rtx4090")))
