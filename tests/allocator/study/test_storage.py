"""Workers of one study: on a real PostgreSQL server, and through a real gRPC proxy."""

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import optuna
import pytest

from allocator.study import run
from allocator.study.objective import WARM_START, Goal
from allocator.study.storage import open_storage
from profiles.errors import SpecError
from tests.allocator.study.small import an_evaluator

optuna.logging.set_verbosity(optuna.logging.WARNING)
TRIALS = 16
WORKER = f"""
import sys
import optuna
optuna.logging.set_verbosity(optuna.logging.WARNING)
from allocator.study import run
from allocator.study.objective import Goal
from allocator.study.storage import open_storage
from tests.allocator.study.small import an_evaluator
settings = run.Settings(goal=Goal(), num_trials={TRIALS}, seed=int(sys.argv[2]))
with open_storage(sys.argv[1]) as storage:
    run.run(an_evaluator(), settings, storage)
"""
PROXY = """
import sys, warnings
import optuna
from allocator.study.storage import open_storage
warnings.simplefilter("ignore")
with open_storage(sys.argv[1]) as storage:
    optuna.storages.run_grpc_proxy_server(storage, host="127.0.0.1", port=int(sys.argv[2]))
"""


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def postgres_tool(name):
    """Debian keeps them out of the path."""
    found = shutil.which(name) or next(map(str, sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))[-1:]), None)
    if found is None:
        pytest.skip(f"no {name} on this machine: PostgreSQL's server is not installed (apt-get install postgresql)")
    return found


@pytest.fixture(scope="module")
def postgres():
    """A private cluster on a free port, run as an unprivileged user (the server refuses to be root)."""
    initdb, pg_ctl = postgres_tool("initdb"), postgres_tool("pg_ctl")
    folder = Path(tempfile.mkdtemp(prefix="bitile-pg-"))
    user = pwd.getpwnam("nobody") if os.getuid() == 0 else pwd.getpwuid(os.getuid())
    os.chown(folder, user.pw_uid, user.pw_gid)
    as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if os.getuid() == 0 else {}
    port, data = free_port(), folder / "data"

    def tool(*command):
        with (folder / "log").open("a") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, cwd=folder, timeout=60, **as_user)

    try:
        tool(initdb, "-D", str(data), "-U", "study", "--auth=trust", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        tool(pg_ctl, "-D", str(data), "-o", options, "-l", str(folder / "server.log"), "-w", "start")
        yield f"postgresql://study@127.0.0.1:{port}/postgres"
    finally:
        if (data / "postmaster.pid").exists():
            tool(pg_ctl, "-D", str(data), "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def proxy(tmp_path):
    """A gRPC proxy in its own process, before SQLite."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", PROXY, f"sqlite:///{tmp_path / 'study.db'}", str(port)])
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=10)


def check_two_workers(url):
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, url, str(seed)]) for seed in (1, 2)]
    assert [worker.wait(timeout=100) for worker in workers] == [0, 0]
    evaluator = an_evaluator()
    with open_storage(url) as storage:
        study = run.open_study(evaluator.problem, Goal(), storage)
        assert TRIALS <= run.num_done(study) <= TRIALS + 1  # both may begin a last one
        best = run.best_trials(study)[0]
        assert best.user_attrs["gap"] <= 1e-3
        assert best.constraints["avg_bits"] <= 0
        assert any(WARM_START in trial.user_attrs for trial in study.trials)
        again = run.run(evaluator, run.Settings(goal=Goal(), num_trials=TRIALS), storage)
        assert run.num_done(again) == run.num_done(study)


def test_two_workers_share_a_postgresql_server(postgres):
    check_two_workers(postgres)


def test_two_workers_share_a_grpc_proxy(proxy):
    check_two_workers(proxy)


def test_a_proxy_that_is_not_there_is_one_sentence(monkeypatch):
    monkeypatch.setattr("allocator.study.storage.PROXY_SECONDS", 0.2)
    with (
        pytest.raises(SpecError, match=r"no proxy answers within 0\.2 s"),
        open_storage(f"grpc://127.0.0.1:{free_port()}"),
    ):
        pass
