"""Who may write a study: leases with a fencing number that only grows, on the database's own clock.

Each controller has one row that names its process and when it was last seen; each running candidate names its
controller's number. A controller whose row is gone cannot write any more, whatever it believes: every write renews
the row inside its own transaction. So a process that was stopped for too long harms nothing when it wakes up.

Clocks of hosts are not compared. A lease that looks too old, or comes from the future since the database's clock was
set, is watched for a while on a clock that cannot be set: only one that does not move is dead.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from evomerge._study_writes import (
    adopt,
    delete_study_attr,
    lock_study,
    now_s,
    set_study_attr,
    study_attrs,
    update_study_attr,
)
from evomerge.errors import StorageError, StudyConflict
from evomerge.storage import Transactions

BEAT_S = 20.0
LEASE_S = 120.0  # a lease that has not been renewed for so long, on the database's clock, is doubtful ...
WATCH_S = 30.0  # ... and dead if it is not renewed while somebody watches it
FENCE = "evomerge:fence"
LEASES = "evomerge:lease:"  # followed by the fencing number
OLD_LEASE = "evomerge:lease"  # of studies from before leases had numbers: one row, on the host's clock


@dataclass(frozen=True)
class Controller:
    """A process that searches a study.

    Attributes:
        fence: grows with each controller that takes up the study.
        started, boot, namespace: tell whether a process number still means the same process.
        beat: when it was last seen, in seconds of the database's clock.
        joined: beside others.
        note: what it says of itself, for people.
    """

    fence: int
    host: str
    pid: int
    started: str | None
    boot: str = ""
    namespace: str = ""
    beat: float = 0.0
    joined: bool = False
    note: str = ""

    @property
    def is_gone(self) -> bool:
        """Whether its process has certainly ended. False says nothing: it may be on another host."""
        same = self.boot == boot_id() and self.namespace == pid_namespace() and self.host == socket.gethostname()
        return same and (self.started is None or process_start(self.pid) != self.started)

    @property
    def is_me(self) -> bool:
        return (self.pid, self.boot, self.namespace) == (os.getpid(), boot_id(), pid_namespace()) and not self.is_gone

    def said(self, age_s: float) -> str:
        return f"process {self.pid} on {self.host} (seen {max(0.0, age_s):.0f} s ago)"


class Lease:
    """This process's right to write a study, kept alive by one thread for all of its candidates.

    Args:
        transactions: of the study's database.
        one_host: all processes that use the database run on this machine (SQLite).

    Attributes:
        note: what other machines are told of this search, renewed with each heartbeat.
    """

    def __init__(self, transactions: Transactions, study_id: int, name: str, *, one_host: bool) -> None:
        self._transactions = transactions
        self._study_id = study_id
        self._name = name
        self._one_host = one_host
        self._mine: Controller | None = None
        self._suspects: dict[tuple[int, float], float] = {}  # (number, beat) -> since when it is watched
        self._done = threading.Event()
        self._heart: threading.Thread | None = None
        self.note = ""

    @property
    def fence(self) -> int | None:
        """This process's fencing number; None without the lease."""
        return None if self._mine is None else self._mine.fence

    def acquire(self, *, join: bool = False) -> list[int]:
        """Take the lease, and the running candidates that no living controller has.

        Args:
            join: beside the controllers that hold one already.

        Returns:
            The numbers of those candidates.

        Raises:
            StudyConflict: another living process searches the study, and this one does not join.
        """
        told = False
        while True:
            mine, taken, doubtful = self._transactions.run(lambda session: self._take(session, join))
            if mine is not None:
                break
            if not told:
                told = True
                whom = "; ".join(c.said(0.0).partition(" (")[0] for c in doubtful)
                self._transactions.on_note(
                    f"{whom} has not been heard of for long; watching for {WATCH_S:.0f} s whether it lives"
                )
            time.sleep(min(WATCH_S, BEAT_S) / 8)
        self._mine = mine
        self._transactions.patient = True
        done = self._done = threading.Event()
        self._heart = threading.Thread(target=self._beat, args=(done,), daemon=True)
        self._heart.start()
        return taken

    def release(self) -> None:
        """Give it back, if this process still holds it."""
        if self._mine is not None and self._heart is not None:
            self._done.set()
            self._heart.join()
            key = f"{LEASES}{self._mine.fence}"
            self._transactions.patient = False
            self._transactions.run(lambda session: delete_study_attr(session, self._study_id, key))
            self._mine = self._heart = None

    def renew(self, session: Any) -> None:
        """Inside a write, after `lock_study`: say that this process lives; without a lease, nothing.

        Raises:
            StudyConflict: another process has taken over.
        """
        if self._mine is not None and not self._renewed(session):
            others = self._controllers(session)
            latest = max(others, key=lambda c: c.fence, default=None)
            if latest is None:
                raise StudyConflict(f"the study {self._name!r} was released by another process")
            holder = latest.said(now_s(session) - latest.beat)
            message = f"the study {self._name!r} is being searched by {holder}"
            raise StudyConflict(message, hint="this process has lost the study to it")

    def adopt(self) -> list[int]:
        """Take up running candidates whose controllers are dead; call it now and then beside other controllers."""

        def work(session: Any) -> list[int]:
            lock_study(session, self._study_id)
            self.renew(session)
            living, doubtful = self._bury(session, join=True)
            return adopt(session, self._study_id, self.fence, {c.fence for c in (*living, *doubtful)})

        return self._transactions.run(work)

    def controllers(self) -> list[tuple[Controller, float]]:
        """Those who hold a lease, each with the seconds since it was last seen; some may be dead."""

        def work(session: Any) -> list[tuple[Controller, float]]:
            now = now_s(session)
            return [(c, now - c.beat) for c in self._controllers(session)]

        return self._transactions.run(work)

    # ---------------------------------------------------------------- inside a transaction

    def _take(self, session: Any, join: bool) -> tuple[Controller | None, list[int], list[Controller]]:
        """The new lease with the candidates that come with it, or None and whom to wait for."""
        lock_study(session, self._study_id)
        living, doubtful = self._bury(session, join=join)
        now = now_s(session)
        if living and not join:
            first = min(living, key=lambda c: c.fence)
            raise StudyConflict(
                f"the study {self._name!r} is being searched by {first.said(now - first.beat)}",
                hint="wait for it, stop it, or search beside it with --join",
            )
        if doubtful:
            return None, [], doubtful
        attrs = study_attrs(session, self._study_id, FENCE)
        fence = int(attrs.get(FENCE, 0)) + 1
        set_study_attr(session, self._study_id, FENCE, fence)
        mine = Controller(
            fence=fence,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=process_start(os.getpid()),
            boot=boot_id(),
            namespace=pid_namespace(),
            beat=now,
            joined=join,
            note=self.note,
        )
        set_study_attr(session, self._study_id, f"{LEASES}{fence}", json.dumps(asdict(mine)))
        return mine, adopt(session, self._study_id, fence, {c.fence for c in living}), []

    def _bury(self, session: Any, *, join: bool) -> tuple[list[Controller], list[Controller]]:
        """Delete the leases of the dead; the controllers that live, and those that are watched."""
        now = now_s(session)
        living: list[Controller] = []
        doubtful: list[Controller] = []
        for controller in self._controllers(session):
            if controller.fence == self.fence or self._lives(controller, now, join):
                living.append(controller)
            elif not self._is_dead(controller, join):
                doubtful.append(controller)
            elif controller.fence:
                delete_study_attr(session, self._study_id, f"{LEASES}{controller.fence}")
            else:
                set_study_attr(session, self._study_id, OLD_LEASE, "")
        return living, doubtful

    def _lives(self, controller: Controller, now: float, join: bool) -> bool:
        fresh = -1.0 <= now - controller.beat < LEASE_S
        return fresh and not self._has_ended(controller, join)

    def _is_dead(self, controller: Controller, join: bool) -> bool:
        """Whether a controller that was not seen of late has ended, or was watched for long enough."""
        if self._has_ended(controller, join):
            return True
        since = self._suspects.setdefault((controller.fence, controller.beat), time.monotonic())
        return time.monotonic() - since >= WATCH_S

    def _has_ended(self, controller: Controller, join: bool) -> bool:
        rebooted = self._one_host and controller.boot not in ("", boot_id())
        # A search that broke off in this very process left its lease behind.
        return rebooted or controller.is_gone or (controller.is_me and not join)

    def _controllers(self, session: Any) -> list[Controller]:
        known = {f.name for f in fields(Controller)}
        found = []
        for key, text in study_attrs(session, self._study_id, OLD_LEASE, prefix=True).items():
            if key == OLD_LEASE and text:
                old = json.loads(text)
                same = old["host"] == socket.gethostname()
                boot, namespace = (boot_id(), pid_namespace()) if same else ("", "")
                found.append(Controller(0, old["host"], old["pid"], old["started"], boot, namespace, beat=old["beat"]))
            elif key.startswith(LEASES):
                found.append(Controller(**{k: v for k, v in json.loads(text).items() if k in known}))
        return sorted(found, key=lambda c: c.fence)

    def _renewed(self, session: Any) -> bool:
        assert self._mine is not None
        beat = replace(self._mine, beat=now_s(session), note=self.note)
        return update_study_attr(session, self._study_id, f"{LEASES}{beat.fence}", json.dumps(asdict(beat)))

    def _beat(self, done: threading.Event) -> None:
        while not done.wait(BEAT_S):
            # A failure here is no news: the next write fails too, with its own message.
            with contextlib.suppress(StorageError):
                if not self._transactions.once(self._renewed):
                    return  # lost; the next write says so


def boot_id() -> str:
    """What tells this start of this machine from all others, containers on it included; "" where unknown."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def pid_namespace() -> str:
    """The set of processes in which a process number has its meaning; "" where unknown."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def process_start(pid: int) -> str | None:
    """When the process started, so that a reused number is not mistaken for it; None if it is gone."""
    try:
        fields_after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        try:
            os.kill(pid, 0)
        except PermissionError:
            return "unknown"  # another user's
        except OSError:
            return None
        return "unknown"
    return None if fields_after_name[0] == "Z" else fields_after_name[19]
