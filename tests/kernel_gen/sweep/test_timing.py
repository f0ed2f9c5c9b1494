"""The sampling rule, and which GPUs are taken for which."""

import random

import pytest

from kernel_gen.sweeping.detect import InstalledGpu, _visible, describe, matching_gpus
from kernel_gen.timing import MIN_REPLAY_US, SampleRule, launches_per_graph, percentiles_us
from profiles.gpus import GPUS, gpu


def test_quiet_samples_end_at_the_minimum() -> None:
    rule = SampleRule()
    quiet = [100.0 + 0.1 * (index % 3) for index in range(rule.min_samples)]
    assert rule.enough(quiet)
    assert not rule.enough(quiet[:-1])


def test_noisy_samples_go_on_until_the_median_is_known() -> None:
    rule, draw = SampleRule(max_samples=10_000), random.Random(1)
    samples: list[float] = []
    while not rule.enough(samples):
        samples += [draw.gauss(100.0, 6.0) for _ in range(rule.batch)]
    # 1.2533 * 6 / sqrt(n) <= 0.5 gives n = 226
    assert 120 <= len(samples) <= 400
    assert percentiles_us(samples)[1] == pytest.approx(100.0, abs=1.5)


def test_hopeless_samples_end_at_the_maximum() -> None:
    rule = SampleRule()
    assert rule.enough([1.0, 1000.0] * (rule.max_samples // 2))


def test_a_few_disturbed_samples_change_neither_median_nor_length() -> None:
    rule = SampleRule()
    samples = [100.0] * 18 + [900.0, 1500.0]
    assert rule.enough(samples)
    assert percentiles_us(samples) == (100.0, 100.0, 100.0)


@pytest.mark.parametrize(("launch_us", "rotations"), [(5.0, 1), (5.0, 7), (5000.0, 3), (0.0, 1), (30.0, 300)])
def test_a_graph_holds_whole_turns_and_lasts(launch_us: float, rotations: int) -> None:
    count = launches_per_graph(launch_us, rotations)
    assert count % rotations == 0
    assert count >= rotations
    if launch_us >= 5:
        assert count * launch_us >= MIN_REPLAY_US or count >= 128
    assert (count - rotations) * launch_us < MIN_REPLAY_US


def card(name: str, capability: tuple[int, int], uuid: str = "GPU-0") -> InstalledGpu:
    return InstalledGpu(name=name, uuid=uuid, compute_capability=capability, driver="580.65")


@pytest.mark.parametrize(
    ("name", "capability", "known"),
    [
        ("NVIDIA GeForce RTX 4090", (8, 9), "rtx4090"),
        ("NVIDIA GeForce RTX 5090", (12, 0), "rtx5090"),
        ("NVIDIA L40S", (8, 9), "l40s"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), "a100"),
        ("NVIDIA A100 80GB PCIe", (8, 0), "a100"),
        ("NVIDIA H100 80GB HBM3", (9, 0), "h100"),
        ("NVIDIA H100 PCIe", (9, 0), "h100"),
        ("NVIDIA H200", (9, 0), "h200"),
        ("NVIDIA B200", (10, 0), "b200"),
        ("NVIDIA GeForce RTX 4090 D", (8, 9), None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", (8, 9), None),
        ("NVIDIA L40", (8, 9), None),
        ("NVIDIA GH200 480GB", (9, 0), None),
        ("NVIDIA A1000", (8, 6), None),
    ],
)
def test_a_card_is_taken_for_what_it_is(name: str, capability: tuple[int, int], known: str | None) -> None:
    assert [spec.name for spec in GPUS.values() if matching_gpus(spec, [card(name, capability)])] == (
        [known] if known else []
    )


def test_every_card_of_the_kind_is_used() -> None:
    cards = [
        card("NVIDIA H200", (9, 0), "GPU-1"),
        card("NVIDIA A40", (8, 6), "GPU-2"),
        card("NVIDIA H200", (9, 0), "GPU-3"),
    ]
    assert [found.uuid for found in matching_gpus(gpu("h200"), cards)] == ["GPU-1", "GPU-3"]
    assert describe(cards) == "NVIDIA H200, NVIDIA A40, NVIDIA H200"
    assert describe([]) == "no NVIDIA GPU"


@pytest.mark.parametrize(
    ("listed", "uuids"),
    [
        (None, ["GPU-a1", "GPU-b2", "GPU-c3"]),
        ("", []),
        ("2,0", ["GPU-c3", "GPU-a1"]),
        ("GPU-b", ["GPU-b2"]),
        ("1,7,0", ["GPU-b2"]),
        ("-1", []),
        ("GPU-", []),
    ],
)
def test_visible_devices_as_cuda_reads_them(listed: str | None, uuids: list[str]) -> None:
    cards = tuple(card("NVIDIA H200", (9, 0), uuid) for uuid in ("GPU-a1", "GPU-b2", "GPU-c3"))
    assert [found.uuid for found in _visible(cards, listed)] == uuids
