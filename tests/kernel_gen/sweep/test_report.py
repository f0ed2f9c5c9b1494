"""Crossovers, the closing table, and the picture."""

import io
from pathlib import Path

import pytest
from matplotlib import image
from rich.console import Console

from kernel_gen.sweeping import heatmap, progress
from kernel_gen.sweeping.report import Cell, crossovers, kind, print_report
from profiles.records import Source


def cell(
    scheme: str, tokens: int, latency_us: float, *, model: str = "m", load: str = "uniform", is_built: bool = True
) -> Cell:
    return Cell(
        model=model,
        linear="gate_up",
        load=load,
        tokens=tokens,
        tokens_per_expert=tokens / 8,
        scheme=scheme,
        latency_us=latency_us,
        config="mma_128x16_w8x1x1_s4_k1_at_o2",
        source=Source.PREDICTED,
        is_built=is_built,
    )


def test_kinds() -> None:
    assert [kind(name) for name in ("w16a16", "w4a16_g128_asym", "w8a8_g-1_sym", "w8a8_g-1_sym_e4m3")] == [
        "w16a16",
        "w4a16",
        "w8a8",
        "w8a8_e4m3",
    ]
    assert kind("w4a16_g128_sym:0.5+w8a8_g-1_sym:0.5") not in ("w4a16", "w8a8")  # a mix is no variant of either


def test_a_crossover_lies_where_the_lines_cross() -> None:
    cells = [cell("w4a16_g128_sym", tokens, 10 + tokens) for tokens in (8, 80, 800)]
    cells += [cell("w4a16_g-1_sym", tokens, 10.0 + tokens) for tokens in (8, 80, 800)]
    cells += [cell("w8a8_g-1_sym", tokens, 2 * (10 + tokens) * (80 / tokens) ** 0.5) for tokens in (8, 80, 800)]
    (found,) = crossovers(cells)
    # ratio = 0.5 * sqrt(tokens / 80) is 1 at 320 tokens, and the interpolation in logs is exact for a power law
    assert found.tokens_per_expert == pytest.approx(40.0)
    assert str(found) == "m gate_up, uniform load: w4a16 beats w8a8 below 40 tokens an expert"


@pytest.mark.parametrize(("factor", "winner"), [(0.5, "w2a16"), (2.0, "w4a4")])
def test_one_that_wins_throughout(factor: float, winner: str) -> None:
    cells = [cell("w2a16_g128_asym", tokens, factor * tokens) for tokens in (8, 80)]
    cells += [cell("w4a4_g-1_sym", tokens, tokens) for tokens in (8, 80)]
    (found,) = crossovers(cells)
    assert (found.tokens_per_expert, found.winner) == (None, winner)
    assert str(found).endswith("at every load swept")


def test_loads_and_models_are_apart() -> None:
    cells = [
        cell(scheme, 8, 1.0 + len(scheme), model=m, load=kind_)
        for scheme in ("w4a16_g128_sym", "w8a8_g-1_sym")
        for m in "ab"
        for kind_ in ("uniform", "zipf")
    ]
    assert {(found.model, found.load) for found in crossovers(cells)} == {
        ("a", "uniform"),
        ("a", "zipf"),
        ("b", "uniform"),
        ("b", "zipf"),
    }


def test_the_table_says_predicted_units_and_estimates() -> None:
    out = io.StringIO()
    cells = [cell("w16a16", 8, 100.0), cell("w4a16_g128_sym", 8, 40.0, is_built=False)]
    print_report(
        cells, crossovers(cells), title="predicted on rtx4090, 2026-11-24", console=Console(file=out, width=140)
    )
    text = out.getvalue()
    assert "best of each scheme, predicted on rtx4090, 2026-11-24" in text
    assert "latency, us" in text
    assert "2.50x" in text
    assert "(estimated facts)" in text


@pytest.mark.parametrize(
    "names", [("w16a16", "w4a16_g128_sym"), ("w4a16_g128_sym", "w4a16_g128_sym:0.5+w8a8_g-1_sym:0.5")]
)
@pytest.mark.parametrize("num_models", [1, 3, 20])
def test_the_picture_is_drawn_whatever_was_swept(tmp_path: Path, names: tuple[str, ...], num_models: int) -> None:
    cells = [
        cell(name, tokens, 5.0 + tokens / len(name), model=f"m{m}")
        for m in range(num_models)
        for name in names
        for tokens in (1, 512)
    ]
    heatmap.draw(cells, title="predicted on rtx4090", path=tmp_path / "map.png")
    pixels = image.imread(tmp_path / "map.png")
    assert pixels.shape[0] > 200
    assert pixels.shape[1] > 400
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]


def test_plain_progress_says_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    out, clock = io.StringIO(), iter(range(0, 1000, 6))
    monkeypatch.setattr(progress, "monotonic_s", lambda: float(next(clock)))
    with progress.phase("measured", 4, live=True, stream=out) as bar:
        for _ in range(4):
            bar.step("this one")
    assert out.getvalue().splitlines() == [
        "measured: 2/4, 12 s, 12 s left (this one)",
        "measured: 4/4, 24 s, 0 s left",
    ]
