"""Sweeps that die, and sweeps that meet: each in a process of its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from profiles.errors import DataError
from profiles.store import ProfileStore
from tests.profiles.strategies import record

ROOT = Path(__file__).parents[2]
WRITER = """
import sys
from profiles.store import ProfileStore
from tests.profiles.strategies import record
store = ProfileStore(sys.argv[1])
number = 0
"""


def start(script: str, path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER + script, str(path)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_kill_9_loses_no_finished_row(tmp_path: Path) -> None:
    path = tmp_path / "profile.parquet"
    script = "while True:\n    store.append(record(number)); number += 1; print(number, flush=True)"
    total = 0
    for _ in range(2):
        with start(script if not total else f"number = {total}\n{script}", path) as process:
            finished = total
            while finished < total + 20:
                finished = int(line(process))
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read().split() if process.stdout else []
            finished = int(rest[-1]) if rest else finished
        assert process.returncode == -signal.SIGKILL
        frame = ProfileStore(path).records()
        assert list(frame["n"]) == [2048 + number for number in range(len(frame))]
        assert finished <= len(frame) <= finished + 1
        total = len(frame)
    with ProfileStore(path) as store:
        store.append(record(total))
    assert len(ProfileStore(path).records()) == total + 1
    assert [file.name for file in tmp_path.iterdir()] == ["profile.parquet"]


def test_a_second_sweep_into_one_file_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "profile.parquet"
    script = "store.append(record(0)); print('ready', flush=True); input(); store.append(record(1)); store.close()"
    command = [sys.executable, "-c", WRITER + script, str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        assert line(process) == "ready"
        with pytest.raises(
            DataError, match=f"profile.parquet: process {process.pid} on .* is writing this profile; wait"
        ):
            ProfileStore(path).open()
        assert len(ProfileStore(path).records()) == 1
        process.communicate("\n")
    assert process.returncode == 0
    with ProfileStore(path) as store:
        store.append(record(2))
    assert len(ProfileStore(path).records()) == 3


def test_two_stores_of_one_process_do_not_both_write(tmp_path: Path) -> None:
    path = tmp_path / "profile.parquet"
    with ProfileStore(path) as first:
        first.append(record(0))
        with pytest.raises(DataError, match=f"process {os.getpid()} on"):
            ProfileStore(path).append(record(1))
    assert len(ProfileStore(path).records()) == 1


def test_a_worker_that_outlives_its_sweep_does_not_hold_the_file(tmp_path: Path) -> None:
    path = tmp_path / "profile.parquet"
    script = """
import os, time
store.append(record(0))
worker = os.fork()
if worker == 0:
    print(os.getpid(), flush=True)  # by now the fork's handlers have let the lock go
    os.close(1)
time.sleep(60)
"""
    with start(script, path) as process:
        worker = int(line(process))
        process.kill()
        process.wait()
        try:
            os.kill(worker, 0)  # it lives
            with ProfileStore(path) as store:
                store.append(record(1))
        finally:
            os.kill(worker, signal.SIGKILL)
    assert len(ProfileStore(path).records()) == 2


def test_a_forked_worker_that_unwinds_leaves_the_profile_alone(tmp_path: Path) -> None:
    path = tmp_path / "profile.parquet"
    script = """
import os
try:
    with store:
        store.append(record(0))
        worker = os.fork()
        if worker == 0:
            raise SystemExit
        os.waitpid(worker, 0)
        print(os.path.exists(sys.argv[1]), flush=True)
        store.append(record(1))
except SystemExit:
    os._exit(0)
"""
    with start(script, path) as process:
        assert line(process) == "False"
    assert process.returncode == 0
    assert len(ProfileStore(path).records()) == 2


def test_a_file_size_limit_keeps_the_earlier_rows(tmp_path: Path) -> None:
    """The operating system itself refuses to write on."""
    path = tmp_path / "profile.parquet"
    script = """
import resource, signal
from profiles.errors import DataError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    while True:
        store.append(record(number)); number += 1
except DataError as error:
    print(number, error, flush=True)
"""
    with start(script, path) as process:
        number, _, said = line(process).partition(" ")
    assert "the row cannot be written (File too large); earlier rows are kept" in said
    assert list(ProfileStore(path).records()["n"]) == [2048 + row for row in range(int(number))]
    assert int(number) >= 4
