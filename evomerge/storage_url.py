"""Where a study may be kept: SQLite on a local disk, or PostgreSQL. Everything else is refused with its reason.

Passwords never leave this process: every URL that is shown goes through `mask` or `hide_passwords`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import sqlalchemy

POSTGRES = "postgresql+psycopg"  # psycopg 3
BOTH = "use sqlite:///runs/NAME/ledger.db on a local disk, or postgresql://USER@HOST/DATABASE"
# A write-ahead log is shared memory between processes of one host; these are shared between hosts.
REMOTE_TYPES = frozenset(
    (
        "9p", "acfs", "afs", "beegfs", "ceph", "cifs", "coda", "dfs", "efs", "gfs", "gfs2", "glusterfs", "gpfs",
        "lustre", "ncpfs", "nfs", "nfs3", "nfs4", "ocfs2", "orangefs", "panfs", "pvfs2", "smb2", "smb3", "smbfs",
        "vboxsf", "wekafs",
    )
)  # fmt: skip
REMOTE_FUSE = frozenset(
    (
        "afp-fuse", "beegfs", "blobfuse", "blobfuse2", "ceph", "ceph-fuse", "cephfs", "curlftpfs", "cvmfs2", "davfs",
        "davfs2", "gcsfuse", "glusterfs", "goofys", "google-drive-ocamlfuse", "gvfsd-fuse", "hdfs", "juicefs",
        "lizardfs", "mfs", "moosefs", "mount-s3", "mountpoint-s3", "ossfs", "rclone", "s3fs", "s3ql", "saunafs",
        "seaweedfs", "smbnetfs", "sshfs",
    )
)  # fmt: skip
_PASSWORD = re.compile(r"(://[^/\s:@]*:)\S*@")  # to the last @: passwords hold @ and / where people forget to quote
_IN_QUERY = re.compile(r"([?&;\s](?:ssl)?pass(?:word|wd|phrase)?=)[^&\s'\"]*", re.IGNORECASE)


def mask(url: str) -> str:
    """The URL without its password."""
    return hide_passwords(normal(url))


def hide_passwords(text: str) -> str:
    """Text in which the password of every URL is three asterisks."""
    return _IN_QUERY.sub(r"\1***", _PASSWORD.sub(r"\1***@", text))


def normal(url: str) -> str:
    """The URL with the driver that evomerge uses: `postgresql://`, and libpq's `postgres://`, mean psycopg 3."""
    return re.sub(r"^postgres(ql)?(\+psycopg)?://", f"{POSTGRES}://", url.strip())


def is_sqlite(url: str) -> bool:
    return sqlalchemy.engine.make_url(normal(url)).get_backend_name() == "sqlite"


def sqlite_file(url: str) -> Path | None:
    """The file of a SQLite URL; None for a database server."""
    parsed = sqlalchemy.engine.make_url(normal(url))
    return Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None


def storage_problem(url: str) -> str | None:
    """Why this URL cannot hold a study, or None. Looks at the file system, not at the database."""
    shown = mask(url)
    try:
        parsed = sqlalchemy.engine.make_url(normal(url))
    except (sqlalchemy.exc.ArgumentError, ValueError):  # ValueError: a port that is no number
        if re.search(r"journal|\.log$", url, re.IGNORECASE):
            return _journal(shown)
        return f"not a database URL: {shown!r}; {BOTH}"
    backend, _, driver = parsed.drivername.partition("+")
    if backend == "sqlite":
        return _sqlite_problem(parsed, driver)
    if backend == "postgresql":
        if driver == "psycopg":
            if "@" in (parsed.host or ""):
                return f"{shown}: a user or password holds an @ that is not written %40"
            return None
        return f"{shown}: the driver {driver!r} is not supported, only psycopg 3: write postgresql://"
    if backend in ("mysql", "mariadb"):
        why = "leases, fencing and replays are proven on two databases, and MySQL and MariaDB are not among them"
        return f"{shown}: {why}; {BOTH}"
    if backend in ("journal", "redis", "rediss", "file"):
        return _journal(shown)
    return f"databases of kind {backend!r} are not supported; {BOTH}"


def _journal(shown: str) -> str:
    why = "one torn record, after a full disk, makes a journal unreadable for ever"
    return f"{shown}: Optuna's journals are not supported: {why}; {BOTH}"


def _sqlite_problem(parsed: sqlalchemy.engine.URL, driver: str) -> str | None:
    if driver not in ("", "pysqlite"):
        return f"the SQLite driver {driver!r} is not supported; write sqlite:///FILE"
    name = parsed.database
    if name in (None, "", ":memory:"):
        return f"an in-memory database cannot be resumed; {BOTH}"
    if "uri" in parsed.query or str(name).startswith("file:"):
        return f"SQLite's own `file:` URIs are not supported, they can name memory or skip locks; {BOTH}"
    kind = remote_kind(Path(str(name)))
    if kind:
        return (
            f"{name} is on a network file system ({kind}): SQLite's write-ahead log is shared memory of one host, and "
            f"its locks are not safe there; {BOTH}"
        )
    return None


def remote_kind(path: Path) -> str | None:
    """The type of the network file system that a file is on, or would be on; None for a local one, or if not known."""
    folder = Path(os.path.realpath(path)).parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return remote_kind_in(_mounts(), folder)


def _mounts() -> list[str]:
    try:
        return Path("/proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return []


def remote_kind_in(mounts: Iterable[str], folder: Path) -> str | None:
    """`remote_kind` of a folder under the lines of /proc/mounts: the last of the deepest mount points counts."""
    kind, depth = "", -1
    for line in mounts:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = Path(re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[1]))
        if len(point.parts) >= depth and folder.is_relative_to(point):
            kind, depth = fields[2], len(point.parts)
    if kind == "9p" and depth == 1:
        return None  # a sandbox's own root: nothing else mounts it
    family, _, fuse = kind.partition(".")
    remote = family in REMOTE_TYPES or (family == "fuse" and fuse in REMOTE_FUSE) or kind in REMOTE_FUSE
    return kind if remote else None
