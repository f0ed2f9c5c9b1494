"""The report: its numbers follow from the allocation, its page is whole, and a browser shows it without an error."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from allocator import Allocation, Budget, allocate
from allocator.report import main, write_report
from allocator.report_data import collect
from tests.allocator.tables import MODEL, a_cost_table, a_sensitivity

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def made() -> Allocation:
    return allocate(a_sensitivity(), a_cost_table(), Budget(avg_weight_bits=3.5, max_latency_us={"decode": 500.0}))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, made: Allocation) -> Path:
    folder = tmp_path_factory.mktemp("report")
    made.write(folder / "allocation.json")
    a_sensitivity().write(folder / "losses.parquet")
    a_cost_table().write(folder / "cost.parquet")
    return folder


def arguments(files: Path, *more: str) -> list[str]:
    return [
        "--allocation", str(files / "allocation.json"), "--sensitivity", str(files / "losses.parquet"),
        "--cost", str(files / "cost.parquet"), "--points", "5", "--out", str(files / "report.html"), *more,
    ]  # fmt: skip


def test_numbers_follow_from_the_allocation(made: Allocation) -> None:
    allocation = made
    data = collect(allocation, MODEL, sensitivity=a_sensitivity(), cost_table=a_cost_table(), num_points=6)
    assert sum(data.linears_per_scheme.values()) == len(allocation.assignment)
    for scenario, us in allocation.predicted_latency_us.items():
        assert sum(s.latency_us for s in data.time if s.scenario == scenario) == pytest.approx(us)
    for before, after in zip(data.front, data.front[1:], strict=False):
        assert before.avg_weight_bits < after.avg_weight_bits
        assert before.loss > after.loss
    assert any(point.loss == pytest.approx(allocation.predicted_loss, rel=1e-6) for point in data.front)
    for uniform in allocation.uniform:  # the front is at least as good at every uniform scheme's size
        at = [p.loss for p in data.front if p.avg_weight_bits <= uniform.avg_weight_bits + 1e-9]
        richest_below = min(at, default=float("inf"))
        bound = min(p.bound for p in data.front if p.avg_weight_bits >= uniform.avg_weight_bits - 1e-9)
        assert uniform.loss >= bound - 1e-9 or uniform.loss >= richest_below
    step = data.next_bits
    assert step is not None
    assert step.loss_by_price is not None
    assert 0.5 * step.loss_by_price < step.loss_saved < 1.1 * step.loss_by_price
    assert sum(step.changed.values()) > 0


def test_page_is_self_contained(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(files, "--json")) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["latency_source"] == "predicted"
    text = (files / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', text)
    assert len(sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "w3a16_g128_asym" in text
    for name in ("front", "bits", "time"):
        assert (files / f"report.{name}.png").read_bytes().startswith(b"\x89PNG")

    class Balance(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open_tags: list[str] = []

        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "img"):
                self.open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open_tags.pop() == tag

    balance = Balance()
    balance.feed(text)
    assert balance.open_tags == []


def test_without_losses_and_costs(tmp_path: Path) -> None:
    allocation = allocate(a_sensitivity(), None, Budget(avg_weight_bits=4.25))
    data = collect(allocation, MODEL)
    assert (data.front, data.next_bits, data.time) == ((), None, ())
    write_report(data, MODEL, tmp_path / "bare.html")
    assert "No cost table was given" in (tmp_path / "bare.html").read_text()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_opens_in_a_browser(files: Path, tmp_path: Path) -> None:
    assert main(arguments(files)) == 0
    assert BROWSER is not None
    probe = files / "probe.html"
    script = (
        "<script>addEventListener('load', () => { const i = [...document.images];"
        "document.title = i.length + ' images, ' + i.filter(x => x.naturalWidth > 500).length + ' wide, overflow '"
        "+ (document.documentElement.scrollWidth > innerWidth) })</script>"
    )
    probe.write_text((files / "report.html").read_text().replace("</body>", f"{script}</body>"))
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", str(probe)],
        capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    assert "<title>3 images, 3 wide, overflow false</title>" in done.stdout


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--out": "report.txt"}, "name it FILE.html"),
        ({"--allocation": "nowhere.json"}, "nowhere.json: no such file"),
        ({"--points": "1"}, "a front has at least 2"),
        ({"--model": "mixtral-8x7b"}, "the model's shape is of mixtral-8x7b, the allocation of olmoe-1b-7b"),
        ({"--schemes": "w9"}, "w9"),
    ],
)
def test_mistakes_are_one_sentence(
    files: Path, change: dict[str, str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(files), *(text for pair in change.items() for text in pair)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
