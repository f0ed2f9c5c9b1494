"""Ctrl-C in every command, by SIGINT to real processes: while it imports, and while it works."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("allocator", "bench", "costmodel", "kernel_gen", "profiles")
COMMANDS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
    if "sys.exit(interruptible(main))" in path.read_text()
]
HEAVY = ("matplotlib", "numpy", "optuna", "pandas", "rich", "scipy", "sklearn", "torch")


def started(*command: str, path: Path | None = None) -> subprocess.Popen[str]:
    """A process that prints "ready" when it may be interrupted. SIGINT as a terminal's programs have it."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={"PYTHONPATH": f"{path}:{ROOT}"} if path else {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def interrupted(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and stderr of a process that gets SIGINT once it is ready."""
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    return process.returncode, errors


@pytest.fixture(scope="module")
def slow_imports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose modules take for ever to import, under the names of what every command needs one of."""
    folder = tmp_path_factory.mktemp("slow")
    for name in HEAVY:
        (folder / f"{name}.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    return folder


def test_every_command_is_here() -> None:
    mains = [
        path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if '__name__ == "__main__"' in path.read_text()
    ]
    assert len(COMMANDS) > 25
    assert [path.name for path in mains if "sys.exit(interruptible(main))" not in path.read_text()] == [
        "matmul_heuristics_child.py"  # a worker, which its parent ends
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_while_importing_it_just_ends(command: str, slow_imports: Path) -> None:
    assert interrupted(started("-m", command, path=slow_imports)) == (-signal.SIGINT, "")


def test_while_working_it_says_so() -> None:
    code = """
import sys, time
from profiles.interrupt import end_at_once, interruptible
sys.argv[0], sys.orig_argv[:] = "-m", ["python", "-m", "kernel_gen.sweep"]  # as while kernel_gen is imported
end_at_once("kernel_gen")
def main():
    print("ready", flush=True)
    time.sleep(60)
sys.exit(interruptible(main))
"""
    assert interrupted(started("-c", code)) == (130, "interrupted\n")


def test_who_imports_a_package_keeps_his_signals() -> None:
    code = "import signal, kernel_gen, costmodel; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    process = started("-c", code)
    assert process.communicate(timeout=30)[0] == "True\n"
