"""Run every kernel under compute-sanitizer and write what it said: python -m tests.run_sanitizer [--out DIR].

memcheck looks for accesses outside allocations, racecheck for shared-memory hazards. Only this project's kernels are watched. Needs a GPU, the DSL and
the CUDA toolkit's compute-sanitizer on PATH. Exit code 0 if both tools found nothing, 1 if either found something, 2 if they cannot run.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.gpu_report import describe_device, slug

TOOLS = ("memcheck", "racecheck")
TESTS = "tests/kernel_gen/test_sanitized_gpu.py"
SUMMARY = re.compile(r"=+ (?:ERROR SUMMARY|RACECHECK SUMMARY): (.*)")
CLEAN = re.compile(r"0 (?:errors|hazards displayed)")


def start(tool: str, folder: Path) -> subprocess.Popen[bytes]:
    """Start the tests under one tool; its log and the tests' report go into `folder`."""
    command = [
        "compute-sanitizer",
        "--tool",
        tool,
        "--kernel-name",
        "kns=cutlass",
        "--log-file",
        str(folder / f"{tool}.log"),
    ]
    tests = [sys.executable, "-m", "pytest", TESTS, "-q", "-m", "gpu", "-p", "no:cacheprovider", "--timeout", "600"]
    with Path(folder, f"{tool}.out").open("wb") as out:
        return subprocess.Popen(
            [*command, *tests, "--gpu-report", str(folder / f"{tool}.json")], stdout=out, stderr=out
        )


def finding(tool: str, folder: Path, exit_code: int) -> dict[str, Any]:
    """What one tool found. A run that ended without a summary, or whose tests failed, is not clean."""
    log = Path(folder, f"{tool}.log")
    summaries = SUMMARY.findall(log.read_text()) if log.exists() else []
    report_path = Path(folder, f"{tool}.json")
    report = (
        json.loads(report_path.read_text()) if report_path.exists() else {"totals": {}, "kernels": [], "versions": {}}
    )
    clean = exit_code == 0 and bool(summaries) and all(CLEAN.match(summary) for summary in summaries)
    return {
        "clean": clean and bool(report["kernels"]),
        "summaries": summaries,
        "tests": report["totals"],
        "kernels": report["kernels"],
        "versions": report["versions"],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.run_sanitizer", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tests/reports"), help="folder of the report [%(default)s]")
    arguments = parser.parse_args(argv)
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not on PATH: it comes with the CUDA toolkit", file=sys.stderr)
        return 2
    device = describe_device()
    with tempfile.TemporaryDirectory(prefix="bitile-sanitizer-") as name:
        folder = Path(name)
        running = {tool: start(tool, folder) for tool in TOOLS}
        found = {tool: finding(tool, folder, process.wait()) for tool, process in running.items()}
        for tool, result in found.items():
            if not result["clean"]:
                print(
                    f"{tool}:", *Path(folder, f"{tool}.out").read_text().splitlines()[-15:], sep="\n  ", file=sys.stderr
                )
    arguments.out.mkdir(parents=True, exist_ok=True)
    target = arguments.out / f"{slug(device['name'])}-sanitizer.json"
    target.write_text(json.dumps({"device": device, "tools": found}, indent=1) + "\n")
    for tool, result in found.items():
        print(
            f"{tool}: {'clean' if result['clean'] else 'NOT CLEAN'}, {len(result['kernels'])} kernels, {result['summaries']}"
        )
    print(f"report: {target}")
    return 0 if all(result["clean"] for result in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
