"""Run every kernel under compute-sanitizer and write what it said: python -m tests.run_sanitizer [--out DIR].

memcheck looks for accesses outside allocations, racecheck for shared-memory hazards. Only this project's kernels are
watched. The control (tests/kernel_gen/bulk_pipeline.py) is right by construction and orders bulk copies by mbarriers as
the wgmma family does: where racecheck finds hazards in it too, its findings on that family are called inconclusive.
Needs a GPU, the DSL and the CUDA toolkit's compute-sanitizer on PATH. Exit code 0 if nothing was found, 1 if something
was, 2 if the tools cannot run.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.gpu_report import describe_device, slug

TOOLS = ("memcheck", "racecheck")
TESTS = "tests/kernel_gen/sanitized_gpu.py"
SUMMARY = re.compile(r"=+ (?:ERROR SUMMARY|RACECHECK SUMMARY): (.*)")
CLEAN = re.compile(r"0 (?:errors|hazards displayed)")


def start(tool: str, family: str, folder: Path) -> subprocess.Popen[bytes]:
    """Start one family's tests under one tool; its log and the tests' report go into `folder`.

    torch's caching allocator is off: with it, a small step outside a tensor is still inside the allocator's block.
    """
    name = f"{tool}-{family}"
    log = ["--log-file", str(folder / f"{name}.log")]
    # cuda-bindings asks the driver for entry points that an older one lacks and handles the answer: no finding here.
    quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
    watch = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kns=cutlass", *quiet, *log]
    options = ["-q", "-m", "gpu", "-k", f"[{family}_", "-p", "no:cacheprovider", "--timeout", "600"]
    with Path(folder, f"{name}.out").open("wb") as out:
        return subprocess.Popen(
            [*watch, sys.executable, "-m", "pytest", TESTS, *options, "--gpu-report", str(folder / f"{name}.json")],
            stdout=out,
            stderr=out,
            env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )


def finding(name: str, folder: Path, exit_code: int) -> dict[str, Any]:
    """What one run found. A run that ended without a summary, or whose tests failed, is not clean."""
    log = Path(folder, f"{name}.log")
    summaries = SUMMARY.findall(log.read_text()) if log.exists() else []
    report_path = Path(folder, f"{name}.json")
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
    parser.add_argument(
        "--families",
        nargs="+",
        default=["mma", "wgmma", "steps", "control"],
        help="kernel families, a layer's steps, and the control [%(default)s]",
    )
    parser.add_argument("--logs", type=Path, default=Path("build/sanitizer"), help="folder of the logs [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("tests/reports"), help="folder of the report [%(default)s]")
    arguments = parser.parse_args(argv)
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not on PATH: it comes with the CUDA toolkit", file=sys.stderr)
        return 2
    device = describe_device()
    arguments.logs.mkdir(parents=True, exist_ok=True)
    running = {
        f"{tool}-{family}": start(tool, family, arguments.logs) for tool in TOOLS for family in arguments.families
    }
    found = {name: finding(name, arguments.logs, process.wait()) for name, process in running.items()}
    control, judged = found.get("racecheck-control"), found.get("racecheck-wgmma")
    if control and judged and control["summaries"] and not control["clean"] and not judged["clean"]:
        judged["inconclusive"] = "racecheck reports the control too"
    arguments.out.mkdir(parents=True, exist_ok=True)
    target = arguments.out / f"{slug(device['name'])}-sanitizer.json"
    target.write_text(json.dumps({"device": device, "runs": found}, indent=1) + "\n")
    for name, result in found.items():
        verdict = "clean" if result["clean"] else "INCONCLUSIVE" if "inconclusive" in result else "NOT CLEAN"
        print(f"{name}: {verdict}, {len(result['kernels'])} kernels, {result['summaries']}")
    print(f"report: {target}; logs: {arguments.logs}")
    kernels = {name: result for name, result in found.items() if not name.endswith("-control")}
    return 0 if all(result["clean"] or "inconclusive" in result for result in kernels.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
