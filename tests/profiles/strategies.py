"""Hypothesis strategies of the vocabulary, and small builders of records."""

from typing import Any

from hypothesis import strategies as st

from profiles import kernels, schemes
from profiles.gpus import GPUS
from profiles.kernels import Family, KernelConfig, Raster, TileShape, WarpLayout
from profiles.loads import TokenLoad
from profiles.records import ProfileRecord, Source, Status
from profiles.schemes import KERNEL_SCHEMES

small = st.integers(1, 512)
configs = st.builds(
    KernelConfig,
    family=st.sampled_from(Family),
    tile=st.builds(TileShape, m=small, n=small),
    warps=st.builds(WarpLayout, m=small, n=small, k=small),
    num_stages=small,
    split_k=small,
    raster=st.sampled_from(Raster),
    min_ctas_per_sm=small,
    cluster=st.integers(1, 16),
    tail=st.integers(0, 512),
)
microseconds = st.floats(1e-3, 1e7)


@st.composite
def records(draw: st.DrawFn) -> ProfileRecord:
    counts = tuple(draw(st.lists(st.integers(0, 10_000), min_size=1, max_size=8)))
    per_expert = draw(st.lists(st.sampled_from(KERNEL_SCHEMES), min_size=len(counts), max_size=len(counts)))
    outcome: dict[str, Any]
    if draw(st.booleans()):
        p20, latency, p80 = sorted(draw(st.tuples(microseconds, microseconds, microseconds)))
        outcome = {"status": Status.OK, "latency_us": latency, "p20_us": p20, "p80_us": p80, "num_samples": 30}
    else:
        failures = [status for status in Status if status is not Status.OK]
        outcome = {"status": draw(st.sampled_from(failures)), "error": draw(st.text(min_size=1, max_size=20))}
    return ProfileRecord(
        gpu=draw(st.sampled_from(list(GPUS))),
        model=draw(st.text(max_size=8)),
        linear=draw(st.sampled_from(["gate_up", "down", "shared_down"])),
        n=draw(small),
        k=draw(small),
        load=TokenLoad(tokens_per_expert=counts, source=draw(st.text(max_size=8))),
        schemes=tuple(per_expert[:1]) if len(set(per_expert)) == 1 else tuple(per_expert),
        config=draw(configs),
        source=draw(st.sampled_from(Source)),
        sm_clock_mhz=draw(st.none() | st.floats(100, 4000)),
        kernel_fingerprint=draw(st.text(alphabet="0123456789abcdef", max_size=8)),
        versions=draw(st.dictionaries(st.text(min_size=1, max_size=5), st.text(max_size=5), max_size=3)),
        **outcome,
    )


def record(number: int = 0, **changes: Any) -> ProfileRecord:
    """A finished measurement; different numbers are different candidates."""
    fields: dict[str, Any] = {
        "gpu": "rtx4090",
        "model": "qwen1.5-moe-a2.7b",
        "linear": "down",
        "n": 2048 + number,
        "k": 1408,
        "load": TokenLoad(tokens_per_expert=(3, 0, 5, 1), source="test"),
        "schemes": (schemes.parse("w4a16_g128_asym"),),
        "config": kernels.parse("mma_128x16_w8x1x1_s4_k1_at_o2"),
        "status": Status.OK,
        "source": Source.MEASURED,
        "latency_us": 41.25 + number,
        "p20_us": 41.0 + number,
        "p80_us": 42.0 + number,
        "num_samples": 30,
        "sm_clock_mhz": 2520.0,
        "kernel_fingerprint": "c0ffee",
        "versions": {"torch": "2.13.0", "driver": "580.95"},
        "timestamp": "2026-11-23T08:15:00+00:00",
    }
    return ProfileRecord(**(fields | changes))
