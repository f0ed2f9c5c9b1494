"""Whatever a candidate or the machine does, no finished row is lost: the real command over the replay bench."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from profiles.records import Status
from profiles.store import ProfileStore

ARGUMENTS = [
    "--gpu",
    "rtx4090",
    "--model",
    "olmoe-1b-7b",
    "--linear",
    "gate_up",
    "--tokens",
    "1,64",
    "--schemes",
    "w16a16,w4a16_g128_sym,w8a8_g-1_sym",
]
ROOT = Path(__file__).parents[3]
ROWS = 3 * 2 * 4  # schemes x loads x configurations tried
SPEED = 30  # seconds within which anything here must happen on a busy machine


def command(folder: Path, behaviour: dict[str, str], *more: str) -> list[str]:
    run = [sys.executable, "-m", "tests.kernel_gen.sweep.replay", str(folder), json.dumps(behaviour), "--"]
    return [*run, *ARGUMENTS, "--out", str(folder / "profile.parquet"), *more]


def sweep(folder: Path, behaviour: dict[str, str], *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, behaviour, *more), cwd=ROOT, capture_output=True, text=True, timeout=SPEED * 2, check=False
    )


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def wait_for(folder: Path, finished: int) -> None:
    deadline = time.monotonic() + SPEED
    while len(lines(folder / "finished")) < finished:
        assert time.monotonic() < deadline, lines(folder / "started")
        time.sleep(0.02)


def statuses(folder: Path) -> dict[str, int]:
    counts = ProfileStore(folder / "profile.parquet").records()["status"].value_counts()
    return {str(name): int(count) for name, count in counts.items()}


def test_a_sweep_measures_everything_once(tmp_path: Path) -> None:
    done = sweep(tmp_path, {})
    assert done.returncode == 0, done.stderr
    assert statuses(tmp_path) == {"ok": ROWS}
    assert len(lines(tmp_path / "finished")) == len(set(lines(tmp_path / "finished"))) == ROWS
    assert "measured on rtx4090" in done.stdout
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
    again = sweep(tmp_path, {})
    assert again.returncode == 0
    assert len(lines(tmp_path / "started")) == ROWS
    assert f"{ROWS} rows ({ROWS} ok; 0 new)" in again.stdout
    assert again.stdout.splitlines()[:-2] == done.stdout.splitlines()[:-2]


@pytest.mark.parametrize(
    ("what", "status", "text"),
    [
        ("hang", Status.TIMEOUT, "no answer within 5 s"),
        ("exit", Status.CRASHED, "exit code 7"),
        ("segfault", Status.CRASHED, "SIGSEGV"),
        ("lose context", Status.LAUNCH_ERROR, "illegal memory access"),
        ("out of bounds", Status.WRONG, "it wrote out of bounds: 0 elements before Y and 1 after it"),
    ],
)
def test_a_bad_candidate_costs_its_own_row(tmp_path: Path, what: str, status: Status, text: str) -> None:
    done = sweep(tmp_path, {"3": what})
    assert done.returncode == 0, done.stderr
    assert statuses(tmp_path) == {"ok": ROWS - 1, status.value: 1}
    bad = ProfileStore(tmp_path / "profile.parquet").records(status=status)
    assert text in bad["error"].iloc[0]
    assert lines(tmp_path / "started")[2].endswith(bad["config"].iloc[0])
    assert len(lines(tmp_path / "started")) == ROWS


def test_a_programming_error_ends_the_sweep_loudly_and_keeps_rows(tmp_path: Path) -> None:
    done = sweep(tmp_path, {"5": "bug"})
    assert done.returncode == 1
    assert "ValueError: a programming error" in done.stderr
    assert statuses(tmp_path) == {"ok": 4}


def test_kill_9_in_mid_sweep_loses_no_finished_row(tmp_path: Path) -> None:
    running = subprocess.Popen(
        command(tmp_path, {"*": "slow"}), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(tmp_path, 6)
    running.kill()
    running.wait()
    survived = statuses(tmp_path)["ok"]
    assert 5 <= survived <= len(lines(tmp_path / "finished"))  # at most the row in flight is missing
    time.sleep(0.5)  # the orphaned worker ends by itself
    started = len(lines(tmp_path / "started"))
    done = sweep(tmp_path, {})
    assert done.returncode == 0, done.stderr
    assert statuses(tmp_path) == {"ok": ROWS}
    assert len(lines(tmp_path / "started")) == started + ROWS - survived


def test_ctrl_c_keeps_rows_and_the_same_command_continues(tmp_path: Path) -> None:
    running = subprocess.Popen(
        command(tmp_path, {"*": "slow"}),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(tmp_path, 4)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: the command and its workers
    _, errors = running.communicate(timeout=SPEED)
    assert running.returncode == 130
    assert errors.splitlines()[-1] == "sweep: interrupted; finished rows are kept, the same command continues"
    assert "Traceback" not in errors
    survived = statuses(tmp_path)["ok"]
    assert survived >= 3
    assert sweep(tmp_path, {}).returncode == 0
    assert statuses(tmp_path) == {"ok": ROWS}


def test_a_second_sweep_into_the_same_file_is_refused(tmp_path: Path) -> None:
    first = subprocess.Popen(
        command(tmp_path, {"*": "slow"}), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_for(tmp_path, 2)
    second = sweep(tmp_path, {})
    assert second.returncode == 2
    assert "is writing this profile" in second.stderr
    assert "Traceback" not in second.stderr
    _, errors = first.communicate(timeout=SPEED)
    assert first.returncode == 0, errors
    assert statuses(tmp_path) == {"ok": ROWS}
    assert len(lines(tmp_path / "started")) == ROWS


def test_a_full_disk_keeps_the_rows_before_it(tmp_path: Path) -> None:
    def small_files() -> None:
        signal.signal(
            signal.SIGXFSZ, signal.SIG_IGN
        )  # a write past the limit then fails with EFBIG, as one on a full disk does with ENOSPC
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    done = subprocess.run(
        command(tmp_path, {}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SPEED * 2,
        check=False,
        preexec_fn=small_files,
    )
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    survived = statuses(tmp_path)["ok"]
    assert survived >= 3
    assert sweep(tmp_path, {}).returncode == 0
    assert statuses(tmp_path) == {"ok": ROWS}
    assert len(lines(tmp_path / "finished")) <= ROWS + 1  # the row that did not fit was measured again, no other


def test_several_gpus_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPLAY_GPUS", "2")
    done = sweep(tmp_path, {"*": "slow"})
    assert done.returncode == 0, done.stderr
    assert statuses(tmp_path) == {"ok": ROWS}
    workers = [versions["worker"] for versions in ProfileStore(tmp_path / "profile.parquet").records()["versions"]]
    assert sorted(workers.count(worker) for worker in set(workers)) == [8, 16]  # three workloads over two workers
