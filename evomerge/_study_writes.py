"""What is written to a study, as statements on Optuna's own tables; each function runs inside a transaction.

Every writing transaction begins with `lock_study`: the writes of one study come one after another, in the order of
their commits. So numbers and arrivals have no gaps, and no two writers wait for each other's rows.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import optuna
import sqlalchemy
from optuna.storages._rdb import models as tables
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from evomerge.errors import StorageError, StudyConflict

CLAIM = "evomerge:claim"  # of a candidate: the controllers that had it, and what tells its proposal from all others
ARRIVALS = "evomerge:arrivals"  # of a study: how many candidates have ended
LOCK_WAIT_MS = 60_000
_STUDIES = tables.StudyModel.__table__
_ATTRS = tables.StudySystemAttributeModel.__table__
_TRIALS = tables.TrialModel.__table__
_PARAMS = tables.TrialParamModel.__table__
_VALUES = tables.TrialValueModel.__table__
_USER = tables.TrialUserAttributeModel.__table__
_SYSTEM = tables.TrialSystemAttributeModel.__table__
_DURABLE = sqlalchemy.text(
    "select set_config('lock_timeout', :wait, true), set_config('synchronous_commit', "
    "case current_setting('synchronous_commit') when 'off' then 'on' else current_setting('synchronous_commit') end, "
    "true)"
)


def lock_study(session: Any, study_id: int) -> None:
    """Wait for the writers before this one, and hold back those after it until the transaction ends.

    Raises:
        StorageError: the study has been deleted.
    """
    own = _STUDIES.c.study_id == study_id
    if session.get_bind().dialect.name == "sqlite":
        # A write comes first: a transaction that reads first may be refused its first write.
        statement = sqlalchemy.update(_STUDIES).where(own).values(study_name=_STUDIES.c.study_name)
        found = session.execute(statement).rowcount
    else:
        session.execute(_DURABLE, {"wait": str(LOCK_WAIT_MS)})
        found = session.execute(sqlalchemy.select(_STUDIES.c.study_id).where(own).with_for_update()).first()
    if not found:
        raise StorageError("the study has been deleted from its database")


def now_s(session: Any) -> float:
    """The database's clock, in seconds since 1970; not the transaction's start, which may lie before a long wait."""
    if session.get_bind().dialect.name == "sqlite":
        text = "select (julianday('now') - 2440587.5) * 86400.0"
    else:
        text = "select extract(epoch from clock_timestamp())"
    return float(session.execute(sqlalchemy.text(text)).scalar_one())


# -------------------------------------------------------------------- attributes of the study


def study_attrs(session: Any, study_id: int, key: str, *, prefix: bool = False) -> dict[str, Any]:
    """The system attribute `key`, or all that begin with it; without those that do not exist."""
    which = _ATTRS.c.key.startswith(key, autoescape=True) if prefix else _ATTRS.c.key == key
    rows = session.execute(
        sqlalchemy.select(_ATTRS.c.key, _ATTRS.c.value_json).where(_ATTRS.c.study_id == study_id, which)
    )
    return {name: json.loads(text) for name, text in rows}


def update_study_attr(session: Any, study_id: int, key: str, value: Any) -> bool:
    """Change a system attribute; False if there is none."""
    done = session.execute(
        sqlalchemy.update(_ATTRS)
        .where(_ATTRS.c.study_id == study_id, _ATTRS.c.key == key)
        .values(value_json=json.dumps(value))
    )
    return bool(done.rowcount == 1)


def set_study_attr(session: Any, study_id: int, key: str, value: Any) -> None:
    if not update_study_attr(session, study_id, key, value):
        session.execute(sqlalchemy.insert(_ATTRS).values(study_id=study_id, key=key, value_json=json.dumps(value)))


def delete_study_attr(session: Any, study_id: int, key: str) -> None:
    session.execute(sqlalchemy.delete(_ATTRS).where(_ATTRS.c.study_id == study_id, _ATTRS.c.key == key))


# -------------------------------------------------------------------- studies and candidates


def insert_study(
    session: Any, name: str, maximize: Sequence[bool], user: Mapping[str, Any], system: Mapping[str, Any]
) -> None:
    """Add a study with its attributes.

    Raises:
        StudyConflict: there is one of that name.
    """
    try:
        made = session.execute(sqlalchemy.insert(_STUDIES).values(study_name=name))
    except sqlalchemy.exc.IntegrityError as error:
        # The name is a unique key: asking for it first would leave a moment in which another process makes it.
        raise StudyConflict(f"the database already holds a study named {name!r}") from error
    study_id = made.inserted_primary_key[0]
    for index, up in enumerate(maximize):
        direction = StudyDirection.MAXIMIZE if up else StudyDirection.MINIMIZE
        table = tables.StudyDirectionModel.__table__
        session.execute(sqlalchemy.insert(table).values(study_id=study_id, objective=index, direction=direction))
    for attrs, rows in ((tables.StudyUserAttributeModel.__table__, user), (_ATTRS, system)):
        for key, value in rows.items():
            session.execute(sqlalchemy.insert(attrs).values(study_id=study_id, key=key, value_json=json.dumps(value)))


def next_number(session: Any, study_id: int) -> int:
    """The number of the next candidate."""
    last = sqlalchemy.select(_TRIALS.c.number).where(_TRIALS.c.study_id == study_id)
    number = session.execute(last.order_by(_TRIALS.c.trial_id.desc()).limit(1)).scalar_one_or_none()
    return 0 if number is None else int(number) + 1


def insert_candidate(session: Any, study_id: int, number: int, trial: FrozenTrial, claim: Mapping[str, Any]) -> None:
    """Add a RUNNING candidate with all that is known of it."""
    made = session.execute(
        sqlalchemy.insert(_TRIALS).values(
            number=number, study_id=study_id, state=TrialState.RUNNING, datetime_start=utc_now()
        )
    )
    trial_id = made.inserted_primary_key[0]
    params = [
        {
            "trial_id": trial_id,
            "param_name": name,
            "param_value": trial.distributions[name].to_internal_repr(value),
            "distribution_json": optuna.distributions.distribution_to_json(trial.distributions[name]),
        }
        for name, value in trial.params.items()
    ]
    if params:
        session.execute(sqlalchemy.insert(_PARAMS), params)
    insert_attrs(session, _USER, trial_id, trial.user_attrs)
    insert_attrs(session, _SYSTEM, trial_id, {CLAIM: claim})


def claimed(session: Any, study_id: int, token: str) -> int | None:
    """The number of the running candidate that was proposed with this token, if there is one."""
    rows = session.execute(
        sqlalchemy.select(_TRIALS.c.number, _SYSTEM.c.value_json)
        .join(_SYSTEM, _SYSTEM.c.trial_id == _TRIALS.c.trial_id)
        .where(_TRIALS.c.study_id == study_id, _TRIALS.c.state == TrialState.RUNNING, _SYSTEM.c.key == CLAIM)
    )
    return next((int(number) for number, text in rows if json.loads(text).get("token") == token), None)


def close_candidate(session: Any, study_id: int, record: Mapping[str, Any]) -> bool:
    """End a running candidate; False if it has ended already, by another's hand.

    Args:
        record: number, state, ended (when), values, user and system attributes: plain data, as the spool keeps it.
    """
    number, ended = record["number"], datetime.datetime.fromisoformat(record["ended"])
    changed = session.execute(
        sqlalchemy.update(_TRIALS)
        .where(_TRIALS.c.study_id == study_id, _TRIALS.c.number == number, _TRIALS.c.state == TrialState.RUNNING)
        .values(state=TrialState[record["state"]], datetime_complete=ended)
    )
    found = sqlalchemy.select(_TRIALS.c.trial_id, _TRIALS.c.datetime_complete)
    row = session.execute(found.where(_TRIALS.c.study_id == study_id, _TRIALS.c.number == number)).one_or_none()
    if row is None:
        raise StorageError(f"the study has no candidate {number}")
    trial_id, stored = row
    if changed.rowcount != 1:
        return bool(stored == ended)  # this very record, committed before the connection broke
    user = {**record["user"], "arrival": _arrival(session, study_id, record["user"].get("arrival"))}
    values = [tables.TrialValueModel.value_to_stored_repr(value) for value in record["values"]]
    if values:
        session.execute(
            sqlalchemy.insert(_VALUES),
            [
                {"trial_id": trial_id, "objective": index, "value": value, "value_type": kind}
                for index, (value, kind) in enumerate(values)
            ],
        )
    insert_attrs(session, _USER, trial_id, user)
    insert_attrs(session, _SYSTEM, trial_id, record["system"])
    return True


def _arrival(session: Any, study_id: int, given: int | None) -> int:
    """How many candidates ended before this one, unless it is given; the study counts on from it."""
    count = study_attrs(session, study_id, ARRIVALS).get(ARRIVALS)
    if count is None:
        ended = _TRIALS.c.state.in_([TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL])
        statement = sqlalchemy.select(sqlalchemy.func.count()).where(_TRIALS.c.study_id == study_id, ended)
        count = int(session.execute(statement).scalar_one()) - 1  # the one that ends now is among them
    arrival = count if given is None else given
    set_study_attr(session, study_id, ARRIVALS, max(count, arrival + 1))
    return arrival


def insert_attrs(session: Any, table: Any, trial_id: int, rows: Mapping[str, Any]) -> None:
    if rows:
        session.execute(
            sqlalchemy.insert(table),
            [{"trial_id": trial_id, "key": key, "value_json": json.dumps(value)} for key, value in rows.items()],
        )


def adopt(session: Any, study_id: int, fence: int | None, living: Collection[int]) -> list[int]:
    """Give controller `fence` the running candidates that none of the `living` has; their numbers.

    Candidates of studies from before controllers had numbers have no owner: they are among them.
    """
    running = session.execute(
        sqlalchemy.select(_TRIALS.c.trial_id, _TRIALS.c.number, _SYSTEM.c.value_json)
        .outerjoin(_SYSTEM, sqlalchemy.and_(_SYSTEM.c.trial_id == _TRIALS.c.trial_id, _SYSTEM.c.key == CLAIM))
        .where(_TRIALS.c.study_id == study_id, _TRIALS.c.state == TrialState.RUNNING)
        .order_by(_TRIALS.c.number)
    ).all()
    taken = []
    for trial_id, number, text in running:
        claim = json.loads(text) if text else {"owners": []}
        if claim["owners"] and claim["owners"][-1] in {fence, *living}:
            continue
        claim["owners"].append(fence)
        if text is None:
            insert_attrs(session, _SYSTEM, trial_id, {CLAIM: claim})
        else:
            own = sqlalchemy.and_(_SYSTEM.c.trial_id == trial_id, _SYSTEM.c.key == CLAIM)
            session.execute(sqlalchemy.update(_SYSTEM).where(own).values(value_json=json.dumps(claim)))
        taken.append(int(number))
    return taken


def utc_now() -> datetime.datetime:
    """Now, as Optuna's tables have it: UTC without saying so."""
    return datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
