"""The database under a study: connections, durability, transactions that are tried again, packed arrays.

With study.py the only file that names Optuna's storage. SQLite runs with a write-ahead log and
synchronous=FULL: a commit is on the disk when it returns.
"""

from __future__ import annotations

import base64
import random
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import optuna
import sqlalchemy
from optuna.storages import RDBStorage
from optuna.storages._rdb import models as tables

from evomerge.errors import StorageError
from evomerge.storage_url import hide_passwords, mask, normal, sqlite_file, storage_problem

__all__ = [
    "Transactions", "connect", "hide_passwords", "is_empty", "mask", "pack", "sqlite_file", "storage_errors",
    "storage_problem", "unpack",
]  # fmt: skip

SCHEMA_VERSION = 12  # of Optuna's tables: the one that study.py's statements are tested with
BUSY_S = 60.0  # how long a statement waits for another's lock
PATIENCE_S = 1800.0  # how long a search waits for a database that does not answer
PAUSES_S = (0.2, 15.0)  # between two attempts, from the first on, doubled each time
T = TypeVar("T")


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


class Transactions:
    """Transactions on a study's database; while it does not answer, they are tried again for a bounded time.

    Attributes:
        patient: try again. For those who hold the study; a person who only looks is told at once.
        patience_s: for how long.
        on_note: told once when the database stops answering, and once when it answers again.
    """

    def __init__(self, storage: RDBStorage) -> None:
        self.storage = storage
        self.patient = False
        self.patience_s = PATIENCE_S
        self.on_note: Callable[[str], None] = lambda note: None

    @contextmanager
    def session(self) -> Iterator[Any]:
        """One transaction, tried once.

        Raises:
            StorageError: the database failed; nothing was changed, unless the connection broke during the commit.
        """
        sessions = self.storage.scoped_session
        with storage_errors(self.storage.url):
            try:
                with sessions() as session, session.begin():
                    yield session
            finally:
                sessions.remove()

    def once(self, work: Callable[[Any], T]) -> T:
        """What `work` returns for a session with a transaction of its own."""
        with self.session() as session:
            return work(session)

    def run(self, work: Callable[[Any], T]) -> T:
        """`once`, again and again while the database does not answer; `work` may run several times.

        Raises:
            StorageError: it has not answered for `patience_s`, or the failure is of a kind that waiting does not mend.
        """
        started = time.monotonic()
        pause, longest = PAUSES_S
        told = False
        while True:
            try:
                result = self.once(work)
            except StorageError as error:
                waited = time.monotonic() - started
                if not self.patient or not _may_pass(error) or waited + pause > self.patience_s:
                    raise
                if not told:
                    told = True
                    self.on_note(f"{error.message}; trying again for up to {self.patience_s / 60:.3g} minutes")
                time.sleep(pause * random.uniform(0.5, 1.0))  # controllers do not come back all at once
                pause = min(2 * pause, longest)
                continue
            if told:
                self.on_note(f"the study's database answers again, after {time.monotonic() - started:.0f} s")
            return result


def _may_pass(error: StorageError) -> bool:
    """Whether the failure may be over soon: locked, restarted, cut off, full, read-only for a while."""
    cause = error.__cause__
    if isinstance(cause, optuna.exceptions.StorageInternalError):
        cause = cause.__cause__
    passing = (
        sqlalchemy.exc.OperationalError,
        sqlalchemy.exc.InterfaceError,
        sqlalchemy.exc.InternalError,  # a server that only reads while it is being replaced
        sqlalchemy.exc.TimeoutError,  # no connection came free
    )
    return isinstance(cause, passing) or (
        isinstance(cause, sqlalchemy.exc.DBAPIError) and bool(cause.connection_invalidated)
    )


def pack(items: np.ndarray) -> str:
    """float64 values, compressed, with their shape in front: exact to the bit."""
    data = np.ascontiguousarray(items, dtype="<f8")
    shape = "x".join(str(n) for n in data.shape)
    return f"{shape}:" + base64.b64encode(zlib.compress(data.tobytes(), 6)).decode()


def unpack(text: str) -> np.ndarray:
    shape, _, body = text.partition(":")
    data = np.frombuffer(zlib.decompress(base64.b64decode(body)), dtype="<f8")
    return data.reshape([int(n) for n in shape.split("x")])
