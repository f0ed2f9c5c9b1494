"""Where trials are kept: `sqlite:///FILE`, `postgresql://USER@HOST/DB`, or `grpc://HOST:PORT` of an Optuna proxy that
many workers share (`optuna storage` beside one database).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, GrpcStorageProxy, RDBStorage, get_storage
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import (
    ArgumentError,
    IntegrityError,
    NoSuchModuleError,
    OperationalError,
    ProgrammingError,
    SQLAlchemyError,
)

from profiles.errors import SpecError

HEARTBEAT_SECONDS = 30
"""A worker that was killed stops beating; after four beats another worker marks its trial as failed."""
PROXY_SECONDS = 15
MOST_ATTEMPTS = 5
_POSTGRES_DRIVER = "postgresql+psycopg"


@contextmanager
def open_storage(url: str) -> Iterator[BaseStorage]:
    """An Optuna storage, closed in the end. SpecError, in one sentence: a URL of another kind, or nothing answers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats and the proxy are Optuna's to rename
        opened = _proxy(url) if url.startswith("grpc://") else _database(url)
    try:
        yield get_storage(opened)
    finally:
        if isinstance(opened, RDBStorage):
            opened.remove_session()
            opened.engine.dispose()
        else:
            opened.close()


def _database(url: str) -> RDBStorage:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise SpecError(f"--storage {url}: expected sqlite:///FILE, postgresql://... or grpc://HOST:PORT") from None
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername=_POSTGRES_DRIVER)
    name = parsed.render_as_string(hide_password=True)
    if parsed.drivername.startswith("sqlite") and parsed.database in (None, "", ":memory:"):
        raise SpecError(f"--storage {name}: trials in memory are lost; name a file, sqlite:///FILE")
    try:
        storage = _tables(parsed.render_as_string(hide_password=False))
    except (ImportError, NoSuchModuleError) as error:
        raise SpecError(f"--storage {name}: no driver for it is installed ({error})") from error
    except (SQLAlchemyError, RuntimeError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise SpecError(f"--storage {name}: cannot be opened ({reason})") from error
    if parsed.drivername.startswith("sqlite"):
        event.listen(storage.engine, "connect", _without_waiting)
        storage.engine.dispose()
    return storage


def _tables(url: str) -> RDBStorage:
    """Optuna's tables, made where they are not there. Of two workers that make them at once one is told that they
    exist, and looks again.
    """
    attempt = 0
    while True:
        try:
            return RDBStorage(url, heartbeat_interval=HEARTBEAT_SECONDS, grace_period=4 * HEARTBEAT_SECONDS)
        except (IntegrityError, ProgrammingError, OperationalError):
            attempt += 1
            if attempt == MOST_ATTEMPTS:
                raise
            time.sleep(0.1 * attempt)


def _without_waiting(connection: Any, _: object) -> None:
    """A trial is some forty commits. With a write-ahead log none waits for the disk; a killed worker loses nothing, a
    power cut the last moments.
    """
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")


def _proxy(url: str) -> GrpcStorageProxy:
    host, colon, port = url.removeprefix("grpc://").rstrip("/").rpartition(":")
    if not colon or not host or not port.isdecimal():
        raise SpecError(f"--storage {url}: expected grpc://HOST:PORT")
    try:
        proxy = GrpcStorageProxy(host=host, port=int(port))
        proxy.wait_server_ready(timeout=PROXY_SECONDS)
    except ImportError as error:
        raise SpecError(f"--storage {url}: grpcio is not installed ({error})") from error
    except ConnectionError as error:
        raise SpecError(f"--storage {url}: no proxy answers within {PROXY_SECONDS} s") from error
    return proxy
