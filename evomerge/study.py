"""The durable record of a search: an Optuna study in a relational database.

Optuna's own tables hold everything, so optuna-dashboard and Optuna's plots work on it. A candidate is
written twice, each time in one transaction: when it is proposed (RUNNING) and when it is finished (COMPLETE),
stopped early (PRUNED) or failed (FAIL). `_study_rows` says what the rows hold.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
import sqlalchemy
from optuna.storages import RDBStorage
from optuna.storages._rdb import models as tables
from optuna.study import StudyDirection
from optuna.trial import TrialState

from evomerge._study_rows import (
    ITEMS,
    Candidate,
    Header,
    add_rows,
    candidate_of,
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
from evomerge.objectives import Scores
from evomerge.recipe import Recipe
from evomerge.space import Natural
from evomerge.storage import LEASE, Lease, connect, is_empty, mask, storage_errors

if TYPE_CHECKING:
    import pandas as pd

optuna.logging.set_verbosity(optuna.logging.WARNING)

HEADER = "evomerge:header"

__all__ = ["Candidate", "Header", "Study", "study_names"]


class Study:
    """Open or create with `Study.create` and `Study.load`; one controller writes at a time."""

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
        self.lease = Lease(self._session, self._id, name)

    @classmethod
    def create(cls, url: str, name: str, header: Header) -> Study:
        """Make a new study; the folder of a SQLite file is made too.

        Raises:
            StorageError: the database cannot be reached or written.
            StudyConflict: a study of that name exists.
        """
        storage = connect(url, create=True)
        up, down = StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE
        system = {
            "study:metric_names": list(header.objectives),  # Optuna's own key, which the dashboard reads
            HEADER: json.dumps(vars(header)),
            LEASE: "",
        }
        user = {"study_file": header.study_file.get("text", "")}
        user |= {f"version.{key}": value for key, value in header.versions.items()}
        # One transaction: a study of ours always has its header, however its creation was interrupted.
        with storage_errors(url), storage.scoped_session() as session, session.begin():
            directions = [
                tables.StudyDirectionModel(objective=i, direction=up if maximize else down)
                for i, maximize in enumerate(header.objectives.values())
            ]
            row = tables.StudyModel(study_name=name, directions=directions)
            session.add(row)
            try:
                session.flush()
            except sqlalchemy.exc.IntegrityError as error:
                # The name is a unique key: asking for it first would leave a moment in which another process makes it.
                raise StudyConflict(f"the database already holds a study named {name!r}") from error
            for table, attrs in (
                (tables.StudyUserAttributeModel, user),
                (tables.StudySystemAttributeModel, system),
            ):
                for key, value in attrs.items():
                    session.add(table(study_id=row.study_id, key=key, value_json=json.dumps(value)))
        storage.scoped_session.remove()
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
        differing = _differing(stored, wanted)
        if differing:
            parts = "; ".join(f"{k}: stored {_short(a)}, now {_short(b)}" for k, (a, b) in differing.items())
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
    ) -> int:
        """Record a candidate as RUNNING in one transaction and return its number.

        Args:
            label: of a known recipe.
            source: why a candidate is scored in full, whatever its scores are: who recommended it.
            params: gene -> natural value; None for a recipe outside the space.
            domains: gene -> (low, high, log), ints for whole numbers, or the list of its choices.
        """
        distributions = {name: distribution(domain) for name, domain in domains.items()}
        attrs: dict[str, Any] = {"recipe": recipe.to_yaml(), "recipe_id": recipe.fingerprint}
        if label is not None:
            attrs["label"] = label
        if source is not None:
            attrs["source"] = source
        trial = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=dict(params or {}),
            distributions=distributions if params is not None else {},
            user_attrs=attrs,
        )
        with self._session() as session:
            self.lease.require(session)
        with storage_errors(self._storage.url):
            made = self._storage._create_new_trial(self._id, trial)
        return int(made.number)

    def finish(
        self,
        number: int,
        scores: Mapping[str, Mapping[str, Scores]],
        arrival: int,
        attrs: Mapping[str, Any],
    ) -> bool:
        """Record a candidate as done, with all its scores, in one transaction.

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
        self, number: int, scores: Mapping[str, Scores], stopped: Stopped, arrival: int, attrs: Mapping[str, Any]
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
        self, number: int, reason: str, message: str, arrival: int, attrs: Mapping[str, Any] | None = None
    ) -> bool:
        """Record a candidate as failed with its reason; False if it was finished already."""
        rows = {"arrival": arrival, "reason": reason, "message": message[-20_000:], **(attrs or {})}
        return self._close(number, TrialState.FAIL, rows, {}, [])

    def add_scores(self, number: int, split: str, scores: Mapping[str, Scores]) -> bool:
        """Store a finished candidate's scores on a further split, once; False if they exist."""
        key = f"value.{split}.{next(iter(scores))}"
        rows = score_rows({split: scores})
        with self._session() as session:
            trial = self._row(session, number)
            # Writing first takes the lock, so that of two writers the second sees the first's scores.
            session.execute(
                sqlalchemy.update(tables.TrialModel)
                .where(tables.TrialModel.trial_id == trial.trial_id)
                .values(number=number)
            )
            table = tables.TrialUserAttributeModel
            held = session.query(table).filter_by(trial_id=trial.trial_id, key=key).first()
            if held is not None:
                return False
            add_rows(session, table, trial.trial_id, rows)
            add_rows(session, tables.TrialSystemAttributeModel, trial.trial_id,
                 item_rows({split: scores}))  # fmt: skip
        return True

    def _close(
        self,
        number: int,
        state: TrialState,
        user: Mapping[str, Any],
        system: Mapping[str, Any],
        values: Sequence[float],
    ) -> bool:
        table = tables.TrialModel
        with self._session() as session:
            # The conditional update takes the write lock first: of two writers, one wins.
            changed = session.execute(
                sqlalchemy.update(table)
                .where(
                    table.study_id == self._id,
                    table.number == number,
                    table.state == TrialState.RUNNING,
                )
                .values(state=state)
            )
            if changed.rowcount != 1:
                return False
            self.lease.require(session)
            trial = self._row(session, number)
            trial.datetime_complete = datetime.datetime.now()
            for index, value in enumerate(values):
                stored, kind = tables.TrialValueModel.value_to_stored_repr(value)
                session.add(
                    tables.TrialValueModel(trial_id=trial.trial_id, objective=index, value=stored, value_type=kind)
                )
            add_rows(session, tables.TrialUserAttributeModel, trial.trial_id, user)
            add_rows(session, tables.TrialSystemAttributeModel, trial.trial_id, system)
        return True

    # ---------------------------------------------------------------- reading

    def candidates(self) -> list[Candidate]:
        """All candidates in the order of their numbers."""
        with storage_errors(self._storage.url):
            trials = self._storage.get_all_trials(self._id, deepcopy=False)
        return [self._candidate(t) for t in sorted(trials, key=lambda t: t.number)]

    def candidate(self, number: int) -> Candidate:
        """One candidate, as it is in the database."""
        with storage_errors(self._storage.url):
            trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._id, number)
            return self._candidate(self._storage.get_trial(trial_id))

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

    def _candidate(self, trial: optuna.trial.FrozenTrial) -> Candidate:
        return candidate_of(trial, list(self.header.objectives))

    def acquire(self) -> None:
        """Take the study for this process alone; see `Lease`.

        Raises:
            StudyConflict: another living process holds it.
        """
        self.lease.acquire()

    def release(self) -> None:
        """Give the study back."""
        self.lease.release()

    def _both_attrs(self, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """A candidate's user and system attributes."""
        with self._session() as session:
            trial_id = self._row(session, number).trial_id
            user = read_rows(session, tables.TrialUserAttributeModel, trial_id)
            return user, read_rows(session, tables.TrialSystemAttributeModel, trial_id)

    @contextmanager
    def _session(self) -> Iterator[Any]:
        sessions = self._storage.scoped_session
        with storage_errors(self._storage.url), sessions() as session, session.begin():
            yield session
        sessions.remove()

    def _row(self, session: Any, number: int) -> Any:
        row = session.query(tables.TrialModel).filter_by(study_id=self._id, number=number).one_or_none()
        if row is None:
            raise StorageError(f"the study {self.name!r} has no candidate {number}")
        return row


def study_names(storage: RDBStorage) -> list[str]:
    """Names of all studies in the database, in order of creation."""
    return [s.study_name for s in storage.get_all_studies()]


def _differing(stored: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """What differs between two nested mappings, by dotted key: (in the first, in the second)."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**stored, **wanted}:
        a, b = stored.get(key), wanted.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= _differing(a, b, f"{prefix}{key}.")
        elif a != b:
            found[prefix + key] = (a, b)
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 60 else text[:57] + "..."
