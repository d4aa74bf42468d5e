"""The database under a study: connections, durability, errors with a cause, leases, packed arrays.

With study.py the only file that names Optuna's storage. SQLite runs with a write-ahead log and
synchronous=FULL: a commit is on the disk when it returns.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import sqlalchemy
from optuna.storages import RDBStorage
from optuna.storages._rdb import models as tables

from evomerge.errors import StorageError, StudyConflict
from evomerge.storage_url import hide_passwords, mask, normal, sqlite_file, storage_problem

__all__ = [
    "alive", "connect", "hide_passwords", "is_empty", "mask", "pack", "process_start", "sqlite_file",
    "storage_errors", "storage_problem", "unpack",
]  # fmt: skip

SCHEMA_VERSION = 12  # of Optuna's tables: the one that study.py's statements are tested with
LEASE = "evomerge:lease"
BUSY_S = 60.0  # how long a statement waits for another's lock
BEAT_S = 20.0
LEASE_S = 120.0  # a lease on another host that has not been renewed for so long is dead


def connect(url: str, *, create: bool) -> RDBStorage:
    """Open the database, or make it if `create`.

    Raises:
        StorageError: it cannot be opened, or is not a study database.
    """
    problem = storage_problem(url)
    if problem:
        raise StorageError(problem)
    file = sqlite_file(url)
    if file is not None:
        if not create and not file.exists():
            raise StorageError(f"no study database at {file}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make the folder {file.parent}: {error}") from None
    with storage_errors(url):
        if not create:
            _require_optuna(url)
        storage = _open_tables(url)
        if file is not None:
            _make_durable(storage.engine)
    version = storage._version_manager
    if tables.SCHEMA_VERSION != SCHEMA_VERSION:
        raise StorageError(
            f"optuna's tables have version {tables.SCHEMA_VERSION}; evomerge knows {SCHEMA_VERSION}",
            hint=f"install the optuna of constraints.txt ({version.get_current_version()})",
        )
    return storage


def _open_tables(url: str) -> RDBStorage:
    """Optuna's storage, its tables made where they are missing; two makers at once do not harm each other."""
    template = normal(url).replace("{", "{{").replace("}", "}}")  # Optuna takes a URL for a template
    for _ in range(4):
        try:
            return RDBStorage(template, engine_kwargs=_engine_options(url))
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.OperationalError, sqlalchemy.exc.ProgrammingError) as e:
            if getattr(e.orig, "sqlstate", None) is None and sqlite_file(url) is None:
                raise  # no server answered: there is no other maker
            time.sleep(0.5)  # the other maker is between two tables
    return RDBStorage(template, engine_kwargs=_engine_options(url))


def _engine_options(url: str) -> dict[str, Any]:
    """How connections are made: waits are bounded, and a server that is cut off is noticed."""
    if sqlite_file(url) is not None:
        return {"connect_args": {"timeout": BUSY_S}}
    wanted = {
        "connect_timeout": 10,
        "keepalives_idle": 20,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 60_000,  # ms without an answer to what was sent
    }
    own = sqlalchemy.engine.make_url(normal(url)).query
    return {"pool_pre_ping": True, "connect_args": {k: v for k, v in wanted.items() if k not in own}}


def is_empty(url: str) -> bool:
    """Whether the database holds no table at all: a new one, or one whose making was interrupted at once."""
    file = sqlite_file(url)
    if file is not None and (not file.exists() or file.stat().st_size == 0):
        return True
    with storage_errors(url):
        engine = sqlalchemy.create_engine(normal(url), **_engine_options(url))
        try:
            return not sqlalchemy.inspect(engine).get_table_names()
        finally:
            engine.dispose()


def _require_optuna(url: str) -> None:
    """Refuse a database that has no studies table, so that reading never creates one in it."""
    engine = sqlalchemy.create_engine(normal(url), **_engine_options(url))
    try:
        if not sqlalchemy.inspect(engine).has_table("studies"):
            raise StorageError(f"{mask(url)} is not a study database")
    finally:
        engine.dispose()


def _make_durable(engine: sqlalchemy.Engine) -> None:
    """SQLite: write-ahead log, and every commit on the disk before it returns."""

    def pragmas(connection: Any, record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    sqlalchemy.event.listen(engine, "connect", pragmas)
    engine.dispose()  # connections made while the tables were checked have other settings


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn whatever the database layers raise into StorageError with the cause in one line."""
    try:
        yield
    except ImportError as error:
        raise StorageError(f"no driver for {mask(url)}: {error}", hint="pip install 'evomerge[postgres]'") from error
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause = error.__cause__ if error.__cause__ is not None else error
        lines = str(getattr(cause, "orig", cause)).strip().splitlines() or [type(cause).__name__]
        raise StorageError(f"the study's database {mask(url)} failed: {hide_passwords(lines[0])}") from error
    except RuntimeError as error:
        if "optuna" not in str(error):
            raise
        raise StorageError(hide_passwords(f"{mask(url)}: {error}")) from error


def pack(items: np.ndarray) -> str:
    """float64 values, compressed, with their shape in front: exact to the bit."""
    data = np.ascontiguousarray(items, dtype="<f8")
    shape = "x".join(str(n) for n in data.shape)
    return f"{shape}:" + base64.b64encode(zlib.compress(data.tobytes(), 6)).decode()


def unpack(text: str) -> np.ndarray:
    shape, _, body = text.partition(":")
    data = np.frombuffer(zlib.decompress(base64.b64decode(body)), dtype="<f8")
    return data.reshape([int(n) for n in shape.split("x")])


def alive(lease: Mapping[str, Any]) -> bool:
    """Whether the lease's holder may still write."""
    if lease["host"] != socket.gethostname():
        return bool(time.time() - lease["beat"] < LEASE_S)
    if lease["pid"] == os.getpid():
        return False
    return lease["started"] is not None and process_start(lease["pid"]) == lease["started"]


class Lease:
    """The right to write a study: one process has it at a time, and a thread of it says that it lives.

    Every write checks the token inside its own transaction, so a process that was stopped for too long
    and has lost the study cannot write any more.

    Args:
        session: opens a transaction on the study's database.
    """

    def __init__(self, session: Callable[[], AbstractContextManager[Any]], study_id: int, name: str) -> None:
        self._session = session
        self._study_id = study_id
        self._name = name
        self._held: str | None = None  # the text in the database while we hold it
        self._token: str | None = None
        self._done = threading.Event()
        self._heart: threading.Thread | None = None

    def acquire(self) -> None:
        """Take it.

        Raises:
            StudyConflict: another living process holds it.
        """
        seen = self._read()
        token = uuid.uuid4().hex
        mine = new_lease(token)
        if (seen and alive(json.loads(seen))) or not self.swap(seen, mine):
            raise StudyConflict(self._holder(self._read()), hint="wait for it, or stop it")
        self._held, self._token = mine, token
        self._done.clear()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    def release(self) -> None:
        """Give it back, if this process still holds it."""
        if self._held is not None and self._heart is not None:
            self._done.set()
            self._heart.join()
            self.swap(self._held, "")
            self._held = self._token = self._heart = None

    def require(self, session: Any) -> None:
        """Inside a write: raise StudyConflict if another process has taken over."""
        if self._token is not None:
            held = self._row_text(session)
            if not held or json.loads(held)["token"] != self._token:
                raise StudyConflict(self._holder(held), hint="this process has lost the study to it")

    def swap(self, seen: str, wanted: str) -> bool:
        """Replace the lease in one statement if it is still what was seen: of two takers, one wins."""
        table = tables.StudySystemAttributeModel
        with self._session() as session:
            changed = session.execute(
                sqlalchemy.update(table)
                .where(table.study_id == self._study_id, table.key == LEASE, table.value_json == json.dumps(seen))
                .values(value_json=json.dumps(wanted))
            )
            return bool(changed.rowcount == 1)

    def _beat(self) -> None:
        while not self._done.wait(BEAT_S):
            # A failure here is no news: the next write fails too, with its own message.
            with contextlib.suppress(StorageError):
                renewed = new_lease(str(self._token))
                if self._held is not None and self.swap(self._held, renewed):
                    self._held = renewed

    def _read(self) -> str:
        with self._session() as session:
            return self._row_text(session)

    def _row_text(self, session: Any) -> str:
        table = tables.StudySystemAttributeModel
        row = session.query(table).filter_by(study_id=self._study_id, key=LEASE).one()
        return str(json.loads(row.value_json))

    def _holder(self, held: str) -> str:
        if not held:
            return f"the study {self._name!r} was released by another process"
        lease = json.loads(held)
        age = time.time() - lease["beat"]
        return (
            f"the study {self._name!r} is being searched by process {lease['pid']} on {lease['host']} "
            f"(seen {age:.0f} s ago)"
        )


def new_lease(token: str) -> str:
    """This process's claim on a study, as JSON."""
    mine = {
        "token": token,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": process_start(os.getpid()),
        "beat": time.time(),
    }
    return json.dumps(mine)


def process_start(pid: int) -> str | None:
    """When the process started, so that a reused number is not mistaken for it; None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        try:
            os.kill(pid, 0)
        except OSError:
            return None
        return "unknown"
    return None if fields[0] == "Z" else fields[19]
