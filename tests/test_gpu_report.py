"""The report of the GPU tests, fed with what pytest would feed it, and the rules that skip."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import pytest_collection_modifyitems
from tests.gpu_report import GpuReport, slug

DEVICE = {"name": "NVIDIA Test 9000", "compute_capability": "9.9"}


def phase(
    nodeid: str, outcome: Any, when: Any = "call", kernel: str | None = None, marker: str = "gpu"
) -> pytest.TestReport:
    return pytest.TestReport(
        nodeid=nodeid,
        location=("tests/x.py", 1, nodeid),
        keywords={marker: 1},
        outcome=outcome,
        longrepr=None,
        when=when,
        user_properties=[("kernel", kernel)] if kernel else [],
        duration=0.5,
    )


def written(folder: Path, phases: list[pytest.TestReport]) -> dict[str, Any]:
    report = GpuReport(folder, DEVICE)
    for one in phases:
        report.pytest_runtest_logreport(one)
    report.pytest_sessionfinish()
    document: dict[str, Any] = json.loads((folder / "nvidia-test-9000.json").read_text())
    return document


def test_totals_kernels_and_outcomes(tmp_path: Path) -> None:
    document = written(
        tmp_path,
        [
            phase("a", "passed", "setup"),
            phase("a", "passed", kernel="mma_x 12"),
            phase("a", "failed", "teardown"),
            phase("b", "passed", kernel="mma_x 12"),
            phase("c", "skipped", "setup"),
            phase("d", "failed", kernel="mma_y 34"),
            phase("cpu only", "failed", marker="other"),
        ],
    )
    assert document["totals"] == {"passed": 1, "failed": 2, "skipped": 1}
    assert document["kernels"] == ["mma_x 12", "mma_y 34"]
    assert {name: row["outcome"] for name, row in document["tests"].items()} == {
        "a": "failed",
        "b": "passed",
        "c": "skipped",
        "d": "failed",
    }
    assert document["tests"]["a"]["seconds"] == 1.5
    assert document["device"] == DEVICE


def test_no_gpu_test_ran_no_report(tmp_path: Path) -> None:
    GpuReport(tmp_path, DEVICE).pytest_sessionfinish()
    assert list(tmp_path.iterdir()) == []


def test_the_report_replaces_the_old_one_whole(tmp_path: Path) -> None:
    written(tmp_path, [phase("a", "failed")])
    assert list(written(tmp_path, [phase("b", "passed")])["tests"]) == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["nvidia-test-9000.json"]


def test_slug() -> None:
    assert slug("NVIDIA GeForce RTX 4090") == "nvidia-geforce-rtx-4090"


@pytest.mark.parametrize(
    ("expression", "slow_option", "skipped"),
    [
        ("", False, True),
        ("", True, False),
        ("slow", False, False),
        ("not slow", False, True),
        ("not gpu and slow", False, False),
    ],
)
def test_slow_tests_run_when_asked_for(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, expression: str, slow_option: bool, skipped: bool
) -> None:
    config = request.config
    monkeypatch.setattr(config.option, "markexpr", expression)
    monkeypatch.setattr(config.option, "slow", slow_option)
    item = pytest.Function.from_parent(request.node.parent, name="test_slug", callobj=test_slug)
    item.add_marker(pytest.mark.slow)
    pytest_collection_modifyitems(config, [item])
    assert (item.get_closest_marker("skip") is not None) is skipped
