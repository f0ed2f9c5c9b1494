"""A measured comparison on a device that is none: real weights, tokens, checks and torch's kernels, on the CPU."""

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from bench.kernel_sets import Standing
from bench.peers.__main__ import main
from bench.peers.published import Peer
from bench.peers.recorded import read_launches
from bench.peers.roofline import PEER_LAUNCH_FLOOR_US, PeerClass
from bench.peers.routing import Draw
from profiles import kernels
from profiles.errors import DataError, UnsupportedError
from profiles.models import Linear, MoeShape
from profiles.schemes import parse
from tests.bench.test_peers import CONFIG, MODEL, OTHER, profile, record

TINY = MoeShape(
    name=MODEL,
    hidden_size=128,
    intermediate_size=64,
    num_experts=4,
    top_k=2,
    num_shared_experts=0,
    shared_intermediate_size=0,
    num_moe_layers=1,
)


class FakeClock:
    """Times that follow from the order of calls: 10 us, 11 us, ..."""

    def __init__(self) -> None:
        self.timed: list[int] = []

    def time_launches(self, launches: Sequence[Callable[[], None]], rule: Any) -> Any:
        from kernel_gen.timing import Timing

        for launch in launches:
            launch()
        self.timed.append(len(launches))
        median = 9.0 + len(self.timed)
        return Timing(
            median_us=median, p20_us=median, p80_us=median, num_samples=10, sm_clock_mhz=1980.0, reference_ratio=1.0
        )

    def time_single(self, launch: Callable[[], None], samples: int = 30) -> float:
        launch()
        return 100.0 + len(self.timed)


class FakeKernels:
    """Our kernels, computed on the CPU; they misbehave as told, by configuration."""

    def __init__(self, behaviour: dict[str, str]) -> None:
        self.behaviour = behaviour

    def kernel(self, config: Any, schemes: tuple[Any, ...], max_experts: int = 256) -> Any:
        what = self.behaviour.get(config.name, "")
        if what == "refused":
            raise UnsupportedError(config.name, ["the bundle lacks it"])
        return FakeKernel(what, schemes)


class FakeKernel:
    def __init__(self, what: str, schemes: tuple[Any, ...]) -> None:
        self.what, self.spec = what, SimpleNamespace(schemes=schemes)

    def __call__(self, x: Any, experts: Any, offsets: Any, out: Any) -> None:
        from kernel_gen.formats import dequantize, unpack
        from kernel_gen.measure import LaunchError

        if self.what == "lost":
            raise LaunchError("an illegal memory access")
        tokens = x.tensors[0][:, : x.k].float()
        if len(x.tensors) > 1:
            tokens = tokens * x.tensors[1]
        floats = dequantize(unpack(experts.stacks[0]))
        for entry, expert in enumerate(experts.members[0]):
            rows = slice(int(offsets[expert]), int(offsets[expert + 1]))
            out[rows] = tokens[rows] @ floats[entry].T + (1.0 if self.what == "wrong" else 0.0)


def device(behaviour: dict[str, str]) -> Any:
    from bench.peers.measuring import Device
    from profiles.gpus import gpu

    return Device(
        gpu=gpu("h200"),
        torch_device="cpu",
        clock=FakeClock(),
        kernels=FakeKernels(behaviour),
        synchronize=lambda: None,
        release=lambda: None,
        l2_bytes=1 << 16,
        versions={"torch": "2"},
    )


def cell(scheme: str) -> Any:
    from bench.peers.cells import Cell

    return Cell(model=MODEL, linear=Linear.GATE_UP, tokens=16, draw=Draw.PEERS, what=parse(scheme))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    import bench.peers.cells as cells

    monkeypatch.setattr(cells, "model", lambda name: TINY)


CONFIGS = tuple(map(kernels.parse, (CONFIG, OTHER, "mma_64x8_w4x1x1_s5_k1_at_o4")))


def measured(scheme: str, behaviour: dict[str, str]) -> tuple[list[dict[str, Any]], Any]:
    from bench.peers.measuring import Shelf, measure_cell

    fake = device(behaviour)
    return measure_cell(cell(scheme), CONFIGS, fake, Shelf(fake), rounds=3), fake


@pytest.mark.usefixtures("tiny")
def test_contenders_take_turns_and_failures_are_rows() -> None:
    rows, fake = measured("w16a16", {OTHER: "wrong", CONFIGS[2].name: "refused"})
    by = {(row["contender"], row["config"]): row for row in rows}
    assert by["bitile", OTHER]["status"] == "wrong"
    assert "expected" in by["bitile", OTHER]["error"]
    assert by["bitile", CONFIGS[2].name]["error"].endswith("the bundle lacks it")
    ours, theirs = by["bitile", CONFIG], by["torch._grouped_mm", ""]
    assert (ours["status"], theirs["status"]) == ("ok", "ok")
    assert [ours["least_us"], ours["latency_us"], ours["most_us"]] == [10, 12, 14]  # turns: 10, 12, 14 and 11, 13, 15
    assert theirs["latency_us"] == 13
    assert ours["single_us"] > 100  # one launch alone, after the rounds
    assert ours["fraction"] == pytest.approx(ours["roofline_us"] / 12)
    assert min(fake.clock.timed) > 1  # several sets of weights, so that L2 is cold
    if importlib.util.find_spec("triton") is None:
        assert by["triton", ""]["error"].endswith("triton is not installed")


@pytest.mark.usefixtures("tiny")
def test_of_our_configurations_the_fastest_alone_go_on() -> None:
    from bench.peers.measuring import FINALISTS, _finalists

    class Slow(FakeClock):
        def time_single(self, launch: Callable[[], None], samples: int = 30) -> float:
            launch()
            return self.next.pop(0)

    slow, ran = Slow(), []
    slow.next = [5.0, 3.0, 9.0, 4.0]
    ready = [
        (SimpleNamespace(name=name, config=name), SimpleNamespace(launches=[lambda name=name: ran.append(name)]))
        for name in ("torch", "a", "b", "c", "d")
    ]
    for pair in ready[1:]:
        pair[0].name = "bitile"
    found = [contender.config for contender, _ in _finalists(ready, slow)]
    assert ran == ["a", "b", "c", "d"]
    assert found == ["b", "d", "torch"]
    assert len(found) == FINALISTS + 1


def test_configurations_come_from_the_model_and_from_recordings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.peers.cells import our_configs
    from profiles.gpus import gpu

    recorded = read_launches([profile(tmp_path / "p.parquet", [record(["w16a16"], 9.0)])])
    names = [config.name for config in our_configs(cell("w16a16"), gpu("h200"), recorded, 4)]
    assert names[1] == CONFIG
    assert len(set(names)) == 4
    other = [config.name for config in our_configs(cell("w4a16_g128_sym"), gpu("h200"), recorded, 4)]
    assert len(set(other)) == 4
    known = dict.fromkeys(other[1:3], Standing.MAY_RUN)
    monkeypatch.setattr("bench.peers.cells.standing", lambda spec, gpu: known.get(spec.config.name, Standing.REFUSED))
    built = our_configs(cell("w4a16_g128_sym"), gpu("h200"), recorded, 4, built_only=True)
    assert {config.name for config in built} == set(other[1:3])


@pytest.mark.usefixtures("tiny")
def test_after_a_lost_context_nothing_more_runs() -> None:
    rows, fake = measured("w8a8_g-1_sym_e4m3", {OTHER: "lost"})
    assert fake.clock.timed == []
    assert {row["config"]: row["status"] for row in rows} == {
        CONFIG: "crashed",
        OTHER: "launch_error",
        CONFIGS[2].name: "crashed",
        "rowwise": "crashed",
    }
    assert all(row["context_lost"] for row in rows)
    assert f"the CUDA context was lost by bitile {OTHER}" in rows[-1]["error"]


@pytest.mark.usefixtures("tiny")
def test_fp8_runs_against_torch_where_torch_can() -> None:
    rows, _ = measured("w8a8_g-1_sym_e4m3", {})
    by = {(row["contender"], row["config"]): row for row in rows}
    assert by["bitile", CONFIG]["status"] == "ok"
    assert by["torch._scaled_grouped_mm", "rowwise"]["error"].startswith("NotImplementedError")  # of the CPU


def test_torch_takes_the_layouts_that_it_is_given() -> None:
    import torch

    from bench.peers.contenders import grouped_fp8

    def empty(*shape: int, dtype: Any = torch.float32) -> Any:
        return torch.empty(*shape, dtype=dtype, device="meta")

    y = grouped_fp8(
        empty(40, 128, dtype=torch.float8_e4m3fn),
        empty(40),
        empty(4, 64, 128, dtype=torch.float8_e4m3fn),
        empty(4, 64),
        empty(4, dtype=torch.int32),
    )
    assert (y.shape, y.dtype) == ((40, 64), torch.bfloat16)


def test_without_a_gpu_a_measured_run_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    path = profile(tmp_path / "p.parquet", [record(["w16a16"], 9.0)])
    assert main([str(path), "--build", "--tokens", "0"]) == 2
    assert "--tokens 0: expected whole numbers" in capsys.readouterr().err
    assert main([str(path), "--measure", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("--measure: torch sees no GPU; leave it out to report")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("tiny")
def test_a_second_run_goes_on_where_the_first_ended(tmp_path: Path) -> None:
    from bench.peers.cells import our_configs
    from bench.peers.measured_report import against_published, best, measured_markdown, of_roofline
    from bench.peers.measuring import measure, read_measured
    from profiles.gpus import gpu

    recorded = read_launches([profile(tmp_path / "p.parquet", [record(["w16a16"], 9.0)])])
    path, cells = tmp_path / "measured.parquet", [cell("w16a16"), cell("w4a16_g128_sym")]
    tried = {one: our_configs(one, gpu("h200"), recorded) for one in cells}
    first = [one.what.name for one, _ in measure({cells[0]: tried[cells[0]]}, device({}), path, rounds=1)]
    second = [one.what.name for one, _ in measure(tried, device({}), path, rounds=1)]
    assert (first, second) == (["w16a16"], ["w4a16_g128_sym"])
    found = read_measured(path)
    assert CONFIG in set(found[found["scheme"] == "w16a16"]["config"])  # the recorded winner, beside the model's choice
    fastest = best(found).set_index("scheme")
    assert fastest.loc["w16a16", "other"] == "torch._grouped_mm"
    assert math.isnan(fastest.loc["w4a16_g128_sym", "ratio"])
    peer = Peer(name="X", latency_us=1.0, fraction=0.5)
    cells = against_published(found, {(MODEL, "gate_up", 16, PeerClass.W4A16): peer})
    own = found[(found["scheme"] == "w4a16_g128_sym") & (found["contender"] == "bitile")]
    assert list(cells["ratio_raw"]) == pytest.approx([own["roofline_us"].iloc[0] / own["single_us"].min() / 0.5])
    fastest_alone = own.nsmallest(1, "single_us").iloc[0]
    as_theirs = fastest_alone["single_us"] - fastest_alone["floor_us"] + PEER_LAUNCH_FLOOR_US
    assert list(cells["ratio"]) == pytest.approx([fastest_alone["roofline_us"] / as_theirs / 0.5])
    assert list(cells["ratio_in_a_row"]) == pytest.approx([own["roofline_us"].iloc[0] / own["latency_us"].min() / 0.5])
    bars = of_roofline(found).set_index("scheme")
    assert set(bars.index) == {"w16a16", "w4a16_g128_sym"}
    assert bars["fraction_with_floor"]["w4a16_g128_sym"] == pytest.approx(own["roofline_us"].iloc[0] / as_theirs)
    assert set(bars["roofline_bar"]) == {0.7}
    text = measured_markdown(found, {}, command="it")
    assert "| w16a16 | memory | 0.70 |" in text
    assert f"theirs over ours {fastest.loc['w16a16', 'ratio']:.2f}" in text
    path.write_bytes(b"no Parquet")
    with pytest.raises(DataError, match="remove it"):
        list(measure(tried, device({}), path))


def test_what_peers_published_comes_first_and_the_rest_by_lot() -> None:
    from bench.peers.cells import Cell, Turn, _turn, in_order

    every = [
        Cell(model=MODEL, linear=linear, tokens=tokens, draw=draw, what=parse(scheme))
        for linear in Linear
        for scheme in ("w16a16", "w4a16_g128_sym", "w4a16_g-1_asym")
        for tokens in (16, 64, 512)
        for draw in Draw
    ]
    ordered = in_order(every)
    assert sorted(map(str, ordered)) == sorted(map(str, every))
    assert ordered == in_order(every)  # drawn once
    turns = [_turn(cell) for cell in ordered]
    assert turns == sorted(turns)
    first = [cell for cell in ordered if _turn(cell) is Turn.PUBLISHED]
    assert {(cell.tokens, cell.what.name) for cell in first} == {
        (tokens, name) for tokens in (16, 512) for name in ("w16a16", "w4a16_g128_sym")
    }
    lot = [cell.workload for cell in ordered if _turn(cell) is Turn.BY_LOT]
    assert len(set(lot[:6])) == 6  # one of each linear and scheme before a second of any


@pytest.mark.usefixtures("tiny")
def test_a_mixed_launch_is_compared_with_its_schemes_alone() -> None:
    from bench.layer.allocations import allocation
    from bench.peers.cells import CELL
    from bench.peers.mixed_report import mixed_markdown
    from bench.peers.mixes import excesses, mixes_and_parts

    cells = mixes_and_parts([MODEL], [16])
    mix = next(one for one in cells if one.what == allocation("w4a8/w4a16 fp8"))
    assert {one.what for one in cells if not one.is_mix} >= set(mix.schemes)
    assert all(len(set(one.schemes)) > 1 for one in cells if one.is_mix)
    common = {"status": "ok", "contender": "bitile", "config": CONFIG, "reference_ratio": 1.0, "gpu": "h200"}
    rows = [
        {
            **dict(zip(CELL, one.key, strict=True)),
            **common,
            "is_mix": one.is_mix,
            "latency_us": latency,
            "fraction": fraction,
            "error": "",
            "timestamp": "2026-11-24T00:00:00",
        }
        for one in (*(each for each in cells if not each.is_mix), mix)
        for latency, fraction in ((200.0, 0.25), (100.0, 0.5))
        if not one.is_mix or latency == 100.0
    ]
    found = excesses(pd.DataFrame(rows))
    parts_us = sum(part.us for part in mix.parts.values()) / 0.5
    assert list(found["parts_us"]) == pytest.approx([parts_us])
    assert list(found["excess"]) == pytest.approx([100.0 / parts_us - 1])
    assert f"{found['excess'][0]:+.1%}" in mixed_markdown(pd.DataFrame(rows), command="it")
    assert "1 of 1 launches are over the bar" in mixed_markdown(pd.DataFrame(rows), command="it")
    for some in (pd.DataFrame([row for row in rows if not row["is_mix"]]), pd.DataFrame(rows).assign(status="wrong")):
        assert "No mixed launch and all of its parts were measured." in mixed_markdown(some, command="it")
    lacking = excesses(pd.DataFrame([row for row in rows if row["scheme"] != mix.schemes[0].name]))
    assert math.isnan(lacking["excess"][0])


@pytest.mark.usefixtures("tiny")
def test_a_mixed_cell_runs_ours_only() -> None:
    from bench.layer.allocations import allocation
    from bench.peers.cells import Cell
    from bench.peers.measuring import Shelf, measure_cell

    fake = device({name.name: "refused" for name in CONFIGS})
    mix = Cell(model=MODEL, linear=Linear.DOWN, tokens=16, draw=Draw.PEERS, what=allocation("w2/w4/w8 a16"))
    rows = measure_cell(mix, CONFIGS, fake, Shelf(fake), rounds=1)
    assert [row["contender"] for row in rows] == ["bitile"] * 3
    assert all(row["is_mix"] and math.isnan(row["bar"]) for row in rows)


def test_nothing_measured_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--report", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"{tmp_path / 'measured.parquet'} is not there: --measure writes it\n"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_triton_kernel_is_right_under_its_interpreter() -> None:
    """float16: the interpreter does not multiply bfloat16."""
    code = """
import torch
from bench.peers.triton_grouped import grouped_gemm
from bench.peers.triton_tiles import TILES
for counts, n, k in (((3, 0, 17, 1, 9), 80, 136), ((0, 0, 40), 64, 64)):
    x, w = torch.randn(sum(counts), k).half(), torch.randn(len(counts), n, k).half()
    ends = torch.tensor([0, *counts]).cumsum(0).int()
    expected = torch.cat([x[a:b].float() @ one.float().T for a, b, one in zip(ends, ends[1:], w)])
    for tile in TILES:
        y = torch.full((len(x), n), torch.nan).half()
        grouped_gemm(x, w, ends, y, tile)
        assert (y.float() - expected).abs().max() < 0.03
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=Path(__file__).parents[2])
