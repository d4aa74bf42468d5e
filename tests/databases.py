"""The databases that tests run against: SQLite always, PostgreSQL where a server answers."""

from __future__ import annotations

import functools
import getpass
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy

from evomerge.storage import connect
from evomerge.storage_url import hide_passwords, normal

POSTGRES = pytest.param("postgres", marks=pytest.mark.postgres)
BOTH = ("sqlite", POSTGRES)
_count = itertools.count()


def postgres_url() -> str:
    """The server's URL: EVOMERGE_TEST_POSTGRES, else this machine's own (libpq's PGHOST, PGPORT, PGUSER, PGDATABASE).

    Without a server the test is skipped with the reason; EVOMERGE_REQUIRE=postgres makes that a failure.
    """
    given = os.environ.get("EVOMERGE_TEST_POSTGRES")
    url = given or (
        f"postgresql://{os.environ.get('PGUSER', getpass.getuser())}@{os.environ.get('PGHOST', '127.0.0.1')}"
        f":{os.environ.get('PGPORT', '5432')}/{os.environ.get('PGDATABASE', 'test')}"
    )
    why = _unreachable(url)
    if why is None:
        return url
    said = "EVOMERGE_TEST_POSTGRES" if given else "this machine's default; set EVOMERGE_TEST_POSTGRES to another"
    message = hide_passwords(f"no PostgreSQL at {url} ({said}): {why}")
    if "postgres" in os.environ.get("EVOMERGE_REQUIRE", "").replace(",", " ").split():
        pytest.fail(message)
    pytest.skip(message)


@functools.cache
def _unreachable(url: str) -> str | None:
    """Why no server answers there, or None."""
    try:
        engine = sqlalchemy.create_engine(normal(url), connect_args={"connect_timeout": 5})
        with engine.connect():
            engine.dispose()
            return None
    except (ImportError, sqlalchemy.exc.SQLAlchemyError) as error:
        return str(getattr(error, "orig", error)).strip().splitlines()[0]


@contextmanager
def database(kind: str, folder: Path) -> Iterator[tuple[str, str]]:
    """(URL, a study's name that nothing else has): a file in `folder`, or the server; the study is deleted after."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'runs' / 'x' / 'ledger.db'}", "x"
        return
    url, name = postgres_url(), f"test-{os.getpid()}-{next(_count)}"
    drop(url, name)
    try:
        yield url, name
    finally:
        drop(url, name)


def drop(url: str, name: str) -> None:
    """Delete a study, if there is one."""
    storage = connect(url, create=True)
    try:
        study_id = {s.study_name: s._study_id for s in storage.get_all_studies()}.get(name)
        if study_id is not None:
            storage.delete_study(study_id)
    finally:
        storage.engine.dispose()
