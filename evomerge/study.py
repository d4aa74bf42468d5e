"""The durable record of a search: an Optuna study in a relational database.

Optuna's own tables hold everything, so optuna-dashboard and Optuna's plots work on it. A candidate is
written twice, each time in one transaction: when it is proposed (RUNNING) and when it is finished (COMPLETE),
stopped early (PRUNED) or failed (FAIL). `_study_rows` says what the rows hold.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import optuna
from optuna.storages import RDBStorage
from optuna.storages._rdb import models as tables
from optuna.trial import TrialState

from evomerge import _study_writes as writes
from evomerge._study_reads import count_states, ended_numbers, read_candidates, recipe_text
from evomerge._study_rows import (
    ITEMS,
    Candidate,
    Header,
    add_rows,
    differences,
    distribution,
    frame_row,
    item_rows,
    read_array,
    read_rows,
    read_stopped,
    score_rows,
    stopped_rows,
)
from evomerge.errors import StorageError, StudyConflict
from evomerge.fidelity import Stopped
from evomerge.leases import Lease
from evomerge.objectives import Scores
from evomerge.recipe import Recipe
from evomerge.space import Natural
from evomerge.spool import Spool, spool_folder
from evomerge.storage import Transactions, connect, is_empty, mask, sqlite_file, storage_errors

if TYPE_CHECKING:
    import pandas as pd

optuna.logging.set_verbosity(optuna.logging.WARNING)

HEADER = "evomerge:header"
UID = "evomerge:uid"  # tells a study from a later one of the same name
T = TypeVar("T")

__all__ = ["Candidate", "Header", "NumberTaken", "Study", "study_names"]


class NumberTaken(StudyConflict):
    """Another controller has proposed a candidate of that number in the meantime: look at it, and ask again."""


class Study:
    """Open or create with `Study.create` and `Study.load`; who writes candidates acquires it first.

    Attributes:
        header: what makes the study this study.
        lease: this process's right to write it.
        transactions: on its database: how long they are tried, and who is told.
    """

    def __init__(self, storage: RDBStorage, name: str) -> None:
        self.name = name
        self._storage = storage
        self._id = storage.get_study_id_from_name(name)
        text = storage.get_study_system_attrs(self._id).get(HEADER)
        if text is None:
            raise StudyConflict(
                f"the study {name!r} in this database was not made by evomerge",
                hint="choose another `name:` or `storage:`",
            )
        try:
            self.header = Header(**json.loads(text))
        except TypeError as error:  # fields that are unknown here, or missing
            raise StudyConflict(
                f"the study {name!r} was written by another version of evomerge ({error})",
                hint="open it with that version, or choose another `name:`",
            ) from None
        self.transactions = Transactions(storage)
        one_host = sqlite_file(storage.url) is not None
        self.lease = Lease(self.transactions, self._id, name, one_host=one_host)
        self._spool: Spool | None = None
        self._seen = 0  # candidates below this number are known to have ended, but for ...
        self._open: list[int] = []  # ... these

    @classmethod
    def create(cls, url: str, name: str, header: Header) -> Study:
        """Make a new study; the folder of a SQLite file is made too.

        Raises:
            StorageError: the database cannot be reached or written.
            StudyConflict: a study of that name exists.
        """
        storage = connect(url, create=True)
        system = {
            "study:metric_names": list(header.objectives),  # Optuna's own key, which the dashboard reads
            HEADER: json.dumps(vars(header)),
            UID: uuid.uuid4().hex,
        }
        user = {"study_file": header.study_file.get("text", "")}
        user |= {f"version.{key}": value for key, value in header.versions.items()}
        # One transaction: a study of ours always has its header, however its creation was interrupted.
        Transactions(storage).once(
            lambda s: writes.insert_study(s, name, list(header.objectives.values()), user, system)
        )
        return cls(storage, name)

    @classmethod
    def load(cls, url: str, name: str) -> Study:
        """Open an existing study.

        Raises:
            StorageError: the database cannot be reached, or holds no such study.
            StudyConflict: the study is not evomerge's.
        """
        storage = connect(url, create=False)
        with storage_errors(url):
            names = study_names(storage)
            if name not in names:
                raise StorageError(
                    f"no study {name!r} in {mask(url)}",
                    hint=f"it holds {', '.join(names) or 'no study'}",
                )
            return cls(storage, name)

    @classmethod
    def exists(cls, url: str, name: str) -> bool:
        """Whether the database holds a study of that name, ours or not. Writes nothing."""
        if is_empty(url):
            return False
        storage = connect(url, create=False)
        with storage_errors(url):
            return name in study_names(storage)

    def require_identity(self, identity: Mapping[str, Any]) -> None:
        """Raise StudyConflict naming every part in which the stored study differs."""
        stored = self.header.identity
        wanted = json.loads(json.dumps(identity))
        differing = differences(stored, wanted)
        if differing:
            parts = "; ".join(differing)
            raise StudyConflict(
                f"the study {self.name!r} was started with other settings ({parts})",
                hint="undo the change to continue it, or choose another `name:`",
            )

    # ---------------------------------------------------------------- writing

    def propose(
        self,
        recipe: Recipe,
        params: Mapping[str, Natural] | None,
        domains: Mapping[str, Sequence[Natural] | tuple[float, float, bool]],
        label: str | None = None,
        source: str | None = None,
        number: int | None = None,
    ) -> int:
        """Record a candidate as RUNNING, with its controller and a heartbeat, in one transaction; its number.

        Args:
            params: gene -> natural value; None for a recipe outside the space.
            domains: gene -> (low, high, log), ints for whole numbers, or the list of its choices.
            label: of a known recipe.
            source: why a candidate is scored in full, whatever its scores are: who recommended it.
            number: the one that it was asked for; None takes the next.

        Raises:
            NumberTaken: it has another number; nothing is recorded.
        """
        attrs: dict[str, Any] = {"recipe": recipe.to_yaml(), "recipe_id": recipe.fingerprint}
        if label is not None:
            attrs["label"] = label
        if source is not None:
            attrs["source"] = source
        used = domains if params is not None else {}
        trial = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=dict(params or {}),
            distributions={name: distribution(domain) for name, domain in used.items()},
            user_attrs=attrs,
        )
        fence = self.lease.fence
        token = uuid.uuid4().hex
        claim = {"owners": [] if fence is None else [fence], "token": token}
        attempts = 0

        def work(session: Any) -> int:
            nonlocal attempts
            attempts += 1
            if attempts > 1 and (held := writes.claimed(session, self._id, token)) is not None:
                return held  # committed before the connection broke
            made = writes.next_number(session, self._id)
            if number is not None and made != number:
                raise NumberTaken(f"candidate {number} of the study {self.name!r} has been proposed by another process")
            writes.insert_candidate(session, self._id, made, trial, claim)
            return made

        return self._write(work)

    def finish(
        self,
        number: int,
        scores: Mapping[str, Mapping[str, Scores]],
        arrival: int | None,
        attrs: Mapping[str, Any],
    ) -> bool:
        """Record a candidate as done, with all its scores, in one transaction.

        Args:
            arrival: how many ended before it; None lets the database count.

        Returns:
            False if another writer finished it first; nothing is changed then.
        """
        search = scores["search"]
        values = [search[name].value for name in self.header.objectives]
        if not np.isfinite(values).all():
            raise ValueError(f"candidate {number}: values must be finite, not {values}")
        rows = {"arrival": arrival, **attrs, **score_rows(scores)}
        return self._close(number, TrialState.COMPLETE, rows, item_rows(scores), values)

    def stop(
        self, number: int, scores: Mapping[str, Scores], stopped: Stopped, arrival: int | None, attrs: Mapping[str, Any]
    ) -> bool:
        """Record a candidate as stopped early, with its estimates and the items that were scored.

        Args:
            scores: objective -> estimate with its standard error, and the seen items.

        Returns:
            False if another writer finished it first; nothing is changed then.
        """
        estimates = [scores[name].value for name in self.header.objectives]
        if not np.isfinite(estimates).all():
            raise ValueError(f"candidate {number}: estimates must be finite, not {estimates}")
        user, system = stopped_rows(scores, stopped)
        return self._close(number, TrialState.PRUNED, {"arrival": arrival, **attrs, **user}, system, [])

    def fail(
        self, number: int, reason: str, message: str, arrival: int | None, attrs: Mapping[str, Any] | None = None
    ) -> bool:
        """Record a candidate as failed with its reason; False if it was finished already."""
        rows = {"arrival": arrival, "reason": reason, "message": message[-20_000:], **(attrs or {})}
        return self._close(number, TrialState.FAIL, rows, {}, [])

    def add_scores(self, number: int, split: str, scores: Mapping[str, Scores]) -> bool:
        """Store a finished candidate's scores on a further split, once; False if they exist."""
        key = f"value.{split}.{next(iter(scores))}"
        rows = score_rows({split: scores})
        packed = item_rows({split: scores})

        def work(session: Any) -> bool:
            trial_id = self._row(session, number).trial_id
            table = tables.TrialUserAttributeModel
            if session.query(table).filter_by(trial_id=trial_id, key=key).first() is not None:
                return False
            add_rows(session, table, trial_id, rows)
            add_rows(session, tables.TrialSystemAttributeModel, trial_id, packed)
            return True

        return self._write(work)

    def _close(
        self,
        number: int,
        state: TrialState,
        user: Mapping[str, Any],
        system: Mapping[str, Any],
        values: Sequence[float],
    ) -> bool:
        """Spool an outcome, record it, and forget the spooled one."""
        record = {
            "number": number,
            "state": state.name,
            "ended": writes.utc_now().isoformat(),
            "values": [float(value) for value in values],
            "user": dict(user),
            "system": dict(system),
        }
        spooled = None
        if self._spool is not None:
            try:
                spooled = self._spool.put(record)
            except OSError as error:
                self.transactions.on_note(f"outcomes are not spooled: {error}")
        closed = self._record(record)
        if self._spool is not None and spooled is not None:
            self._spool.drop(spooled)
        return closed

    def _record(self, record: Mapping[str, Any]) -> bool:
        return self._write(lambda session: writes.close_candidate(session, self._id, record))

    def _write(self, work: Callable[[Any], T]) -> T:
        """A transaction of the study's only writer at this moment, which says too that this process lives."""

        def locked(session: Any) -> T:
            writes.lock_study(session, self._id)
            self.lease.renew(session)
            return work(session)

        return self.transactions.run(locked)

    # ---------------------------------------------------------------- reading

    def candidates(self, numbers: Sequence[int] | None = None) -> list[Candidate]:
        """All candidates, or those of these numbers, in the order of their numbers."""
        return self._candidates(numbers)

    def counts(self) -> dict[str, int]:
        """How many candidates are done, stopped, failed and running; no candidate is read."""
        return self.look(count_states)

    def look(self, reader: Callable[[Any, int], T]) -> T:
        """What a function of `_study_reads` finds in this study: it is given a session and the study's id."""
        return self.transactions.run(lambda session: reader(session, self._id))

    def candidate(self, number: int) -> Candidate:
        """One candidate, as it is in the database."""
        found = self._candidates([number])
        if not found:
            raise StorageError(f"the study {self.name!r} has no candidate {number}")
        return found[0]

    def running(self) -> list[Candidate]:
        """The candidates that have not ended; `owner` says whose they are (see `lease.fence`)."""
        _, running = self.transactions.run(lambda s: ended_numbers(s, self._id, self._open, self._seen))
        return self._candidates(running)

    def ended_since(self, arrival: int) -> list[Candidate]:
        """Candidates that ended as the `arrival`-th or later, whoever ran them, in the order of their ends.

        Arrivals are given under a lock that is held until the commit: nothing can come in before what was returned.
        A study remembers which candidates it has seen ended: later calls look at the others alone. 0 begins anew.
        """
        if arrival == 0:
            self._seen, self._open = 0, []
        ended, running = self.transactions.run(lambda s: ended_numbers(s, self._id, self._open, self._seen))
        found = sorted(self._candidates(ended), key=lambda c: c.arrival or 0)
        fresh = [c for c in found if c.arrival is not None and c.arrival >= arrival]
        self._seen = max([self._seen, *(n + 1 for n in (*ended, *running))])
        self._open = running
        return fresh

    def _candidates(self, numbers: Sequence[int] | None) -> list[Candidate]:
        names, text = list(self.header.objectives), self._recipe_text
        return self.look(lambda session, own: list(read_candidates(session, own, names, text, numbers)))

    def _recipe_text(self, number: int) -> str:
        return self.transactions.run(lambda session: recipe_text(session, self._id, number))

    def scores(self, number: int, split: str) -> dict[str, Scores] | None:
        """A candidate's stored scores with their items, or None if that split was not scored."""
        user, system = self._both_attrs(number)
        found = {}
        for name in self.header.objectives:
            if f"value.{split}.{name}" not in user:
                return None
            found[name] = Scores(
                value=user[f"value.{split}.{name}"],
                stderr=user[f"stderr.{split}.{name}"],
                items=read_array(system, f"{ITEMS}:{split}:{name}"),
            )
        return found

    def items(self, number: int) -> list[np.ndarray]:
        """A done candidate's items on the search split, one array per objective."""
        scores = self.scores(number, "search")
        if scores is None:
            raise StorageError(f"the study {self.name!r} has no search items of candidate {number}")
        return [scores[name].items for name in self.header.objectives]

    def partial_scores(self, number: int) -> tuple[dict[str, Scores], Stopped]:
        """A stopped candidate's estimates and seen items by objective, and where and why it was stopped."""
        user, system = self._both_attrs(number)
        return read_stopped(list(self.header.objectives), user, system)

    def frame(self) -> pd.DataFrame:
        """All candidates as a pandas frame: number, state, label, values, standard errors, genes, attributes."""
        import pandas as pd

        names = list(self.header.objectives)
        return pd.DataFrame([frame_row(c, names) for c in self.candidates()])

    def acquire(self, *, join: bool = False) -> None:
        """Take the study for this process, with the running candidates of controllers that are dead.

        Outcomes that a controller of this folder could not record are recorded now.

        Args:
            join: beside other controllers, as a further source of work; else for this process alone.

        Raises:
            StudyConflict: another living process searches it, and this one does not join.
        """
        taken = self.lease.acquire(join=join)
        self._spool = Spool(spool_folder(sqlite_file(self._storage.url), self.name), self._write(self._uid))
        running = {c.number for c in self.running()}
        self._spool.replay(set(taken), running, self._record, self.transactions.on_note)

    def adopt(self) -> list[Candidate]:
        """Take up the running candidates of controllers that have died; call it now and then beside others."""
        return self._candidates(self.lease.adopt())

    def release(self) -> None:
        """Give the study back."""
        self.lease.release()
        self._spool = None

    def _uid(self, session: Any) -> str:
        held = writes.study_attrs(session, self._id, UID).get(UID)
        if held is None:  # a study from before spools
            held = uuid.uuid4().hex
            writes.set_study_attr(session, self._id, UID, held)
        return str(held)

    def _both_attrs(self, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """A candidate's user and system attributes."""

        def work(session: Any) -> tuple[dict[str, Any], dict[str, Any]]:
            trial_id = self._row(session, number).trial_id
            user = read_rows(session, tables.TrialUserAttributeModel, trial_id)
            return user, read_rows(session, tables.TrialSystemAttributeModel, trial_id)

        return self.transactions.run(work)

    def _session(self) -> AbstractContextManager[Any]:
        return self.transactions.session()

    def _row(self, session: Any, number: int) -> Any:
        row = session.query(tables.TrialModel).filter_by(study_id=self._id, number=number).one_or_none()
        if row is None:
            raise StorageError(f"the study {self.name!r} has no candidate {number}")
        return row


def study_names(storage: RDBStorage) -> list[str]:
    """Names of all studies in the database, in order of creation."""
    return [s.study_name for s in storage.get_all_studies()]
