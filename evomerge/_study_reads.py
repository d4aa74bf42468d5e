"""How candidates are read: the columns that are needed, in bounded parts, without Optuna's objects.

Recipes are the longest part of a candidate, and few are looked at: each is read when it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain
from sys import intern
from typing import Any

import numpy as np
import sqlalchemy
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.storages._rdb import models as tables
from optuna.trial import TrialState

from evomerge._study_rows import STATES, Candidate, candidate_of
from evomerge._study_writes import _PARAMS, _SYSTEM, _TRIALS, _USER, _VALUES, CLAIM

PART = 2_000  # candidates that are read at once
# What json.loads does after it has looked for blanks, which attributes lack.
_SCAN: Callable[[str, int], tuple[Any, int]] = vars(json.JSONDecoder())["scan_once"]
RECIPE = "recipe"


def read_candidates(
    session: Any,
    study_id: int,
    names: Sequence[str],
    recipe_of: Callable[[int], str],
    numbers: Collection[int] | None = None,
) -> Iterator[Candidate]:
    """Candidates in the order of their numbers.

    Args:
        names: of the objectives.
        recipe_of: the text of the recipe of a candidate, by number.
        numbers: which; None for all.
    """
    wanted = _TRIALS.c.study_id == study_id
    statement = sqlalchemy.select(_TRIALS.c.trial_id, _TRIALS.c.number, _TRIALS.c.state).order_by(_TRIALS.c.trial_id)
    if numbers is None:
        found = session.execute(statement.where(wanted)).all()
    else:
        asked = sorted(numbers)
        parts = (asked[i : i + 500] for i in range(0, len(asked), 500))
        found = [r for part in parts for r in session.execute(statement.where(wanted, _TRIALS.c.number.in_(part)))]
    found.sort(key=lambda row: row.number)
    reader = _Reader(session, names, recipe_of)
    for start in range(0, len(found), PART):
        yield from reader.part(found[start : start + PART])


def ended_numbers(session: Any, study_id: int, among: Collection[int], beyond: int) -> tuple[list[int], list[int]]:
    """(ended, running) of the candidates in `among` and those with numbers from `beyond` on."""
    ended: list[int] = []
    running: list[int] = []
    statement = sqlalchemy.select(_TRIALS.c.number, _TRIALS.c.state).where(
        _TRIALS.c.study_id == study_id,
        sqlalchemy.or_(_TRIALS.c.number >= beyond, _TRIALS.c.number.in_(list(among))),
    )
    for number, state in session.execute(statement):
        (ended if state in STATES else running).append(int(number))
    return sorted(ended), sorted(running)


class _Reader:
    """Reads parts of a study; distributions are read once for all candidates."""

    def __init__(self, session: Any, names: Sequence[str], recipe_of: Callable[[int], str]) -> None:
        self._session = session
        self._names = names
        self._recipe_of = recipe_of
        self._distributions: dict[str, BaseDistribution] = {}

    def part(self, rows: Sequence[Any]) -> Iterator[Candidate]:
        """Candidates of these (trial_id, number, state)."""
        ids = [row.trial_id for row in rows]
        attrs: dict[int, dict[str, Any]] = {i: {} for i in ids}
        params: dict[int, dict[str, Any]] = {i: {} for i in ids}
        values: dict[int, list[float]] = {i: [] for i in ids}
        owners: dict[int, int | None] = {}
        user = sqlalchemy.select(_USER.c.trial_id, _USER.c.key, _USER.c.value_json)
        for trial_id, key, text in self._rows(user.where(_among(_USER, ids), _USER.c.key != RECIPE)):
            if trial_id in attrs:
                attrs[trial_id][intern(key)] = _SCAN(text, 0)[0]
        for trial_id, name, value, text in self._rows(
            sqlalchemy.select(
                _PARAMS.c.trial_id, _PARAMS.c.param_name, _PARAMS.c.param_value, _PARAMS.c.distribution_json
            ).where(_among(_PARAMS, ids))
        ):
            if trial_id in params:
                params[trial_id][intern(name)] = self._distribution(text).to_external_repr(value)
        scored = sqlalchemy.select(_VALUES.c.trial_id, _VALUES.c.value, _VALUES.c.value_type).where(
            _among(_VALUES, ids)
        )
        for trial_id, value, kind in self._rows(scored.order_by(_VALUES.c.trial_id, _VALUES.c.objective)):
            if trial_id in values:
                values[trial_id].append(tables.TrialValueModel.stored_repr_to_value(value, kind))
        running = [row.trial_id for row in rows if row.state == TrialState.RUNNING]
        if running:
            claims = sqlalchemy.select(_SYSTEM.c.trial_id, _SYSTEM.c.value_json)
            for trial_id, text in self._rows(claims.where(_among(_SYSTEM, running), _SYSTEM.c.key == CLAIM)):
                owners[trial_id] = (json.loads(text)["owners"] or [None])[-1]
        for i, row in zip(ids, rows, strict=True):
            yield candidate_of(
                row.number,
                row.state,
                self._names,
                params[i],
                values[i],
                attrs[i],
                owner=owners.get(i),
                recipe_of=self._recipe_of,
            )

    def _rows(self, statement: Any) -> Sequence[Any]:
        return self._session.execute(statement).all()  # type: ignore[no-any-return]  # much faster than one by one

    def _distribution(self, text: str) -> BaseDistribution:
        found = self._distributions.get(text)
        if found is None:
            found = self._distributions[text] = json_to_distribution(text)
        return found


def _among(table: Any, ids: Sequence[int]) -> Any:
    """Rows of these candidates, and perhaps of others between them, whom the caller skips."""
    if len(ids) == 1:
        return table.c.trial_id == ids[0]
    return table.c.trial_id.between(min(ids), max(ids))


def count_states(session: Any, study_id: int) -> dict[str, int]:
    """How many candidates are done, stopped, failed and running; no candidate is read."""
    statement = sqlalchemy.select(_TRIALS.c.state, sqlalchemy.func.count()).where(_TRIALS.c.study_id == study_id)
    counts = dict.fromkeys((*STATES.values(), "running"), 0)
    for state, count in session.execute(statement.group_by(_TRIALS.c.state)):
        counts[STATES.get(state, "running")] += int(count)
    return counts


def count_reasons(session: Any, study_id: int) -> dict[str, int]:
    """How many candidates failed for which reason; no candidate is read."""
    statement = (
        sqlalchemy.select(_USER.c.value_json, sqlalchemy.func.count())
        .join(_TRIALS, _TRIALS.c.trial_id == _USER.c.trial_id)
        .where(_TRIALS.c.study_id == study_id, _TRIALS.c.state == TrialState.FAIL, _USER.c.key == "reason")
        .group_by(_USER.c.value_json)
    )
    return {str(json.loads(text)): int(count) for text, count in session.execute(statement)}


def done_values(session: Any, study_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (N,) and values (N, M) of the candidates that are done, in their order; nothing else is read."""
    done = sqlalchemy.and_(_TRIALS.c.study_id == study_id, _TRIALS.c.state == TrialState.COMPLETE)
    trials = session.execute(sqlalchemy.select(_TRIALS.c.trial_id, _TRIALS.c.number).where(done)).all()
    if not trials:
        return np.zeros(0, dtype=np.int64), np.zeros((0, 0))
    ids, numbers = np.fromiter(chain.from_iterable(trials), np.int64).reshape(-1, 2).T
    # The rows of a whole range, without a join or an order: much faster, where others stand between them too.
    within = _VALUES.c.trial_id.between(int(ids.min()), int(ids.max()))
    rows = session.execute(sqlalchemy.select(_VALUES.c.trial_id, _VALUES.c.objective, _VALUES.c.value).where(within))
    found = np.fromiter(chain.from_iterable(rows.all()), np.float64).reshape(-1, 3)
    found = found[np.isin(found[:, 0], ids)]
    found = found[np.lexsort((found[:, 1], found[:, 0]))]
    return numbers[np.argsort(ids)], found[:, 2].reshape(len(ids), -1)


def recipe_text(session: Any, study_id: int, number: int) -> str:
    """A candidate's recipe as it was recorded."""
    statement = (
        sqlalchemy.select(_USER.c.value_json)
        .join(_TRIALS, _TRIALS.c.trial_id == _USER.c.trial_id)
        .where(_TRIALS.c.study_id == study_id, _TRIALS.c.number == number, _USER.c.key == RECIPE)
    )
    return str(json.loads(session.execute(statement).scalar_one()))
