"""Where a study may be kept, what is refused and why, and passwords that nobody sees."""

from __future__ import annotations

import json
import traceback
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge import storage_url
from evomerge.cli import main
from evomerge.config import parse_study
from evomerge.errors import EvomergeError, StorageError
from evomerge.prepare import prepare
from evomerge.storage import connect, is_empty
from evomerge.storage_url import hide_passwords, mask, normal, remote_kind, remote_kind_in, storage_problem
from tests.databases import BOTH, database, postgres_url

HINT = "use sqlite:///runs/NAME/ledger.db on a local disk, or postgresql://USER@HOST/DATABASE"


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("journal.log", "one torn record"),
        ("./runs/x.journal", "one torn record"),
        ("journal:///x", "one torn record"),
        ("redis://localhost", "one torn record"),
        ("mysql://me@host/db", "MySQL and MariaDB are not among them"),
        ("mariadb+mariadbconnector://me@host/db", "MySQL and MariaDB are not among them"),
        ("mssql://me@host/db", "kind 'mssql'"),
        ("notes.txt", "not a database URL"),
        ("", "not a database URL"),
        ("postgresql://me@host:door/db", "not a database URL"),
        ("sqlite://", "in-memory"),
        ("sqlite:///:memory:", "in-memory"),
        ("sqlite:///file:x?mode=memory&uri=true", "file:"),
    ],
)
def test_what_cannot_keep_a_study_is_refused_with_the_two_that_can(url: str, why: str) -> None:
    problem = storage_problem(url)
    assert problem is not None and why in problem and HINT in problem
    with pytest.raises(StorageError):
        connect(url, create=True)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("postgresql+psycopg2://me@host/db", "only psycopg 3"),
        ("postgresql+asyncpg://me@host/db", "only psycopg 3"),
        ("sqlite+aiosqlite:///x.db", "aiosqlite"),
        ("postgresql://me:p@ss@host/db", "%40"),
    ],
)
def test_other_drivers_are_refused(url: str, why: str) -> None:
    problem = storage_problem(url)
    assert problem is not None and why in problem and "p@ss" not in problem


@pytest.mark.parametrize("url", ["postgresql://me@host/db", "postgres://me@host/db", "postgresql+psycopg://me@host/db"])
def test_postgresql_means_psycopg_3(url: str) -> None:
    assert normal(url) == "postgresql+psycopg://me@host/db"
    assert storage_problem(url) is None


MOUNTS = r"""
/dev/sda1 / ext4 rw 0 0
home.example:/home /home nfs4 rw 0 0
/dev/sdb /home/me/local xfs rw 0 0
//files/share /mnt/my\040files cifs rw 0 0
me@host:/ /mnt/far fuse.sshfs rw 0 0
/dev/sdc1 /mnt/usb fuseblk rw 0 0
secret /mnt/locked fuse.gocryptfs rw 0 0
C:\134 /mnt/c 9p rw 0 0
scratch@tcp:/s /scratch lustre rw 0 0
/dev/sdd /over ext4 rw 0 0
nas:/x /over nfs rw 0 0
""".strip().splitlines()


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/var/x", None),
        ("/home/me/runs", "nfs4"),
        ("/homes/me", None),
        ("/home/me/local/runs", None),
        ("/mnt/my files/runs", "cifs"),
        ("/mnt/far", "fuse.sshfs"),
        ("/mnt/usb/x", None),
        ("/mnt/locked/x", None),
        ("/mnt/c/Users", "9p"),
        ("/scratch/me", "lustre"),
        ("/over/x", "nfs"),
    ],
)
def test_network_file_systems_are_known_by_their_mounts(folder: str, kind: str | None) -> None:
    assert remote_kind_in(MOUNTS, Path(folder)) == kind


def test_a_sandboxs_own_root_is_not_a_network_share() -> None:
    assert remote_kind_in(["none / 9p rw 0 0"], Path("/tmp")) is None
    assert remote_kind_in(["server:/root / nfs rw 0 0"], Path("/tmp")) == "nfs"


def test_sqlite_on_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = tmp_path / "link"
    (tmp_path / "share").mkdir()
    link.symlink_to(tmp_path / "share")
    assert remote_kind(link / "not" / "yet" / "ledger.db") is None
    share = tmp_path.resolve() / "share"
    mounts = ["/dev/sda1 / ext4 rw 0 0", f"nas:/x {share} nfs4 rw 0 0"]
    monkeypatch.setattr(storage_url, "_mounts", lambda: mounts)
    problem = storage_problem(f"sqlite:///{link / 'not' / 'yet' / 'ledger.db'}")
    assert problem is not None and "nfs4" in problem and "shared memory of one host" in problem and HINT in problem
    assert storage_problem(f"sqlite:///{tmp_path / 'ledger.db'}") is None


SECRETS = st.text(st.sampled_from("aZ9!$&'()*+,;=:/?#[]{}%@~"), min_size=3, max_size=12)


@given(SECRETS)
def test_no_password_is_shown(secret: str) -> None:
    whole = f"qq{secret}zz"
    for url in (f"postgresql://me:{whole}@host/db", f"mysql://me:{whole}@host/db", f"nothing://me:{whole}@"):
        shown = [mask(url), hide_passwords(f"could not open {url} today"), storage_problem(url) or ""]
        assert not [text for text in shown if whole in text or f"{secret}zz" in text or f"qq{secret[:2]}" in text]


def test_passwords_in_the_query_are_hidden() -> None:
    shown = mask("postgresql://host/db?user=me&password=hunter2&sslpassword=hunter3&sslmode=require")
    assert "hunter" not in shown and "sslmode=require" in shown and "user=me" in shown


def run(args: list[str], capsys: pytest.CaptureFixture[str], *, debug: bool = False) -> tuple[int, str]:
    """A command in this process: its exit code, and all that it shows, a traceback included."""
    code = 0
    try:
        main(["--debug", *args] if debug else args)
    except SystemExit as ended:
        code = int(ended.code or 0)
    except EvomergeError:
        traceback.print_exc()
        code = 1
    shown = capsys.readouterr()
    return code, shown.out + shown.err


@pytest.mark.parametrize("command", ["check", "search"])
def test_no_command_shows_a_password(
    work: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing listens there: the error has every part of the URL to tell, and a traceback below it."""
    url = "postgresql://me:hunter2@127.0.0.1:1/db?sslpassword=hunter3"
    code, shown = run([command, "study.yaml", "-o", f"storage={url}"], capsys)
    assert code == 3 and "me:***@127.0.0.1:1" in shown and "hunter" not in shown
    code, shown = run([command, "study.yaml", "-o", "storage=mysql://me:hunter2@host/db"], capsys)
    assert code == 2 and "me:***@host" in shown and "hunter" not in shown
    monkeypatch.setenv("EVOMERGE_DEBUG", "1")
    code, shown = run(["status", url], capsys, debug=True)
    assert code == 1 and "Traceback" in shown and "hunter" not in shown


def test_a_folder_with_braces_is_a_folder(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/{{a}} b/ledger.db"
    connect(url, create=True).engine.dispose()
    assert [p.name for p in tmp_path.iterdir()] == ["{a} b"]
    assert not is_empty(url)


@pytest.mark.parametrize("kind", BOTH)
def test_a_database_is_opened_by_the_url_that_a_person_writes(kind: str, tmp_path: Path) -> None:
    with database(kind, tmp_path) as (url, _):
        plain = url.replace("+psycopg", "")
        storage = connect(plain, create=True)
        assert storage.engine.dialect.driver == ("psycopg" if kind == "postgres" else "pysqlite")
        assert not is_empty(plain)
        storage.engine.dispose()


@pytest.mark.postgres
def test_a_wrong_password_or_database_is_one_clear_error(tmp_path: Path) -> None:
    url = postgres_url()
    with pytest.raises(StorageError) as raised:
        connect(url.rpartition("/")[0] + "/no-such-database", create=True)
    assert "no-such-database" in str(raised.value) and raised.value.exit_code == 3


def test_a_missing_server_is_a_failure_where_it_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOMERGE_TEST_POSTGRES", "postgresql://me:hunter2@127.0.0.1:1/db")
    monkeypatch.setenv("EVOMERGE_REQUIRE", "ray,postgres")
    with pytest.raises(pytest.fail.Exception, match=r"no PostgreSQL at .*127\.0\.0\.1:1/db .*refused") as failed:
        postgres_url()
    monkeypatch.delenv("EVOMERGE_REQUIRE")
    with pytest.raises(pytest.skip.Exception, match="no PostgreSQL at") as skipped:
        postgres_url()
    assert "hunter2" not in str(failed.value) + str(skipped.value)


def test_the_header_of_a_study_holds_no_password(work: Path) -> None:
    text = (work / "study.yaml").read_text() + "\n# was: postgresql://me:hunter2@host/db?password=hunter3\n"
    overrides = ("storage=postgresql://me:hunter4@host/db",)
    prepared = prepare(parse_study(text, "study.yaml", overrides), overrides)
    assert "hunter" not in json.dumps(vars(prepared.header)) + json.dumps(prepared.summary)
