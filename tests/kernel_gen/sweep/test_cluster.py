"""A Ray cluster on localhost does what one machine does, and one that is not there is a sentence."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from profiles.records import Source, Status
from profiles.store import ProfileStore
from tests.kernel_gen.sweep.test_isolation import ROOT, ROWS, command, statuses

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the ray extra"),
    pytest.mark.slow,  # starting a cluster takes up to half a minute
    pytest.mark.timeout(300),
]
START_S = 90.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray = Path(sys.executable).with_name("ray")
    options = ["--head", "--block", f"--port={port}", "--num-cpus=2", "--num-gpus=0", "--include-dashboard=false"]
    # Ray puts sockets there, whose paths may have 107 characters: pytest's folders are too deep
    folder = Path(tmp_path_factory.getbasetemp().parents[1], f"ray{port}")
    running = subprocess.Popen(
        [ray, "start", *options, f"--temp-dir={folder}"],
        cwd=ROOT,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + START_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert running.poll() is None, "ray start ended"
        assert time.monotonic() < deadline, "the cluster did not start"
        time.sleep(0.2)
    time.sleep(2.0)  # the port opens before the node has registered
    yield f"127.0.0.1:{port}"
    running.send_signal(signal.SIGTERM)  # ray start --block takes its cluster down with it
    running.wait(timeout=60)


def run(words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", **environment}
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)


def predicting(out: Path, *more: str) -> list[str]:
    words = [sys.executable, "-m", "kernel_gen.sweep", "--gpu", "rtx4090", "--backend", "predict", "--tokens", "1,64"]
    return [*words, "--schemes", "w16a16,w4a16_g128_sym", "--out", str(out), *more]


def test_predictions_are_those_of_one_machine(cluster: str, tmp_path: Path) -> None:
    far = run(predicting(tmp_path / "far.parquet", "--ray", cluster))
    assert far.returncode == 0, far.stderr
    here = run(predicting(tmp_path / "here.parquet"))
    assert here.returncode == 0, here.stderr
    columns = ["linear", "schemes", "config", "latency_us", "kernel_fingerprint"]
    both = [
        ProfileStore(tmp_path / name).records(source=Source.PREDICTED)[columns]
        for name in ("far.parquet", "here.parquet")
    ]
    rows = [sorted(map(str, frame.to_dict("records"))) for frame in both]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 2 * 2 * 2 * 4


def test_measuring_is_isolated_on_every_machine(cluster: str, tmp_path: Path) -> None:
    done = run(command(tmp_path, {"3": "segfault"}), REPLAY_RAY=cluster, REPLAY_GPUS="2")
    assert done.returncode == 0, done.stderr
    counts = statuses(tmp_path)
    assert counts[Status.OK.value] + counts.get(Status.CRASHED.value, 0) == ROWS
    frame = ProfileStore(tmp_path / "profile.parquet").records(status=Status.OK)
    assert len({versions["worker"] for versions in frame["versions"]}) >= 2


def test_a_lost_machine_costs_one_row(cluster: str, tmp_path: Path) -> None:
    done = run(command(tmp_path, {"3": "lose machine"}), REPLAY_RAY=cluster, REPLAY_GPUS="2")
    assert done.returncode == 0, done.stderr
    counts = statuses(tmp_path)
    lost = ProfileStore(tmp_path / "profile.parquet").records(status=Status.CRASHED)
    assert counts == {Status.OK.value: ROWS - len(lost), Status.CRASHED.value: len(lost)}
    assert len(lost) == 1
    assert "its machine was lost" in lost["error"].iloc[0]


def test_no_gpu_in_the_cluster(cluster: str, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "kernel_gen.sweep", "--gpu", "h200", "--backend", "cuda", "--ray", cluster]
    done = run([*words, "--out", str(tmp_path / "h200.parquet")])
    assert done.returncode == 2
    assert "no GPU in the Ray cluster" in done.stderr


def test_no_cluster_is_a_sentence(tmp_path: Path) -> None:
    done = run(predicting(tmp_path / "out.parquet", "--ray", "127.0.0.1:1"))
    assert done.returncode == 2
    assert "no Ray cluster answers at 127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr
