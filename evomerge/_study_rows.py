"""What a study's rows hold: its header, its candidates, and how scores become attributes and come back.

Per-item scores are packed into pieces below 60 KB, which every database can hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from evomerge.fidelity import Stopped
from evomerge.objectives import Scores
from evomerge.recipe import Recipe
from evomerge.space import Natural
from evomerge.storage import pack, unpack

PIECE_CHARS = 59_000
ITEMS = "evomerge:items"
PARTIAL = "evomerge:partial"  # items of a stopped candidate
BEATEN = "beaten"  # the only rule there was before rules were recorded
POSITIONS = "evomerge:positions"  # and which of the split's items they are
STATES = {TrialState.COMPLETE: "done", TrialState.PRUNED: "stopped", TrialState.FAIL: "failed"}


@dataclass(frozen=True)
class Header:
    """What makes a study this study; compared when it is opened again.

    Attributes:
        identity: base, experts, weights' digests, space, objectives, optimizer, seed.
        objectives: name -> whether larger is better, in order.
        study_file: the YAML file's text and source, and the options it was read with.
        versions: of the libraries that wrote it.
        threads: per worker; re-scoring uses as many, since arithmetic may depend on it in the last bit.
        workers: when the study was started; optimizers size their generations by it ever after.
        rungs: shares of the search items after which a candidate may be stopped, the last is 1; empty: no stopping.
        epochs: rotating subsets of the items, as the arguments of `fidelity.epoch_of`; empty: none.
        coarse: gene -> the coordinate of the space's coarsest level that it is part of, if it is part of one.
        terms: how objectives that are scored whole take part in races, as the arguments of `limits.Terms`.
        moments: of a layer-order study with matched scales: source -> what `moments.Observed` saw of its layers.
    """

    identity: dict[str, Any]
    objectives: dict[str, bool]
    study_file: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    threads: int = 0
    workers: int = 1
    rungs: Sequence[float] = ()
    epochs: Mapping[str, Any] = field(default_factory=dict)
    coarse: Mapping[str, int] = field(default_factory=dict)
    moments: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    terms: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """One row of the study. States: running, done, stopped, failed.

    Attributes:
        values: one per objective, in the objectives' own units; None unless done.
        arrival: how many candidates had finished before this one; None while running.
        estimate, estimate_stderr: of a stopped candidate, in place of values.
        owner: the fencing number of the controller that runs it; None once it has ended, or if nobody is known.
        recipe_of: the text of a candidate's recipe, by number.
    """

    number: int
    state: str
    label: str | None
    fingerprint: str
    params: dict[str, Natural] | None
    values: tuple[float, ...] | None = None
    stderr: tuple[float, ...] | None = None
    arrival: int | None = None
    reason: str | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict)
    estimate: tuple[float, ...] | None = None
    estimate_stderr: tuple[float, ...] | None = None
    owner: int | None = None
    recipe_of: Callable[[int], str] = field(default=str, repr=False, compare=False)

    @property
    def stopped(self) -> str | None:
        """For people: at which share of the items it was stopped, by which rule, and beside which candidate."""
        if self.state != "stopped":
            return None
        return str(_stopped_of(self.attrs, {}))

    @property
    def source(self) -> str | None:
        """Who recommended this candidate to be scored in full, if anybody did."""
        found: str | None = self.attrs.get("source")
        return found

    @property
    def recipe(self) -> Recipe:
        """The recipe, read from the database at each call: a study of many candidates opens at once."""
        return Recipe.from_yaml(self.recipe_of(self.number), f"candidate {self.number}")


def candidate_of(
    number: int,
    trial_state: TrialState,
    names: Sequence[str],
    params: dict[str, Natural],
    values: Sequence[float],
    attrs: Mapping[str, Any],
    *,
    owner: int | None,
    recipe_of: Callable[[int], str],
) -> Candidate:
    """The candidate that these rows hold. names: of the objectives."""
    state = STATES.get(trial_state, "running")
    done, stopped = state == "done", state == "stopped"
    return Candidate(
        number=number,
        state=state,
        label=attrs.get("label"),
        fingerprint=attrs["recipe_id"],
        params=params or None,
        values=tuple(values) if done else None,
        stderr=tuple(attrs[f"stderr.search.{n}"] for n in names) if done else None,
        arrival=attrs.get("arrival"),
        reason=attrs.get("reason"),
        attrs=attrs,
        estimate=tuple(attrs[f"estimate.search.{n}"] for n in names) if stopped else None,
        estimate_stderr=tuple(attrs[f"estimate_stderr.search.{n}"] for n in names) if stopped else None,
        owner=owner,
        recipe_of=recipe_of,
    )


def frame_row(c: Candidate, names: Sequence[str]) -> dict[str, Any]:
    """A candidate as a flat row: number, state, label, values, standard errors, genes, attributes."""
    row: dict[str, Any] = {"number": c.number, "state": c.state, "label": c.label}
    row |= dict(zip(names, c.values or [float("nan")] * len(names), strict=True))
    errors = c.stderr or [float("nan")] * len(names)
    row |= {f"stderr.{n}": e for n, e in zip(names, errors, strict=True)}
    if c.estimate is not None and c.estimate_stderr is not None:
        row |= {f"estimate.{n}": v for n, v in zip(names, c.estimate, strict=True)}
        row |= {f"estimate_stderr.{n}": v for n, v in zip(names, c.estimate_stderr, strict=True)}
    row |= c.params or {}
    row["reason"] = c.reason
    for key in ("t_merge_s", "t_eval_s", "peak_bytes", "worker", "recipe_id", "same_as", "share", "beaten_by",
                "stop_rule", "epoch"):  # fmt: skip
        row[key] = c.attrs.get(key)
    return row


def add_rows(session: Any, table: Any, trial_id: int, rows: Mapping[str, Any]) -> None:
    """Add attributes to a trial."""
    for key, value in rows.items():
        session.add(table(trial_id=trial_id, key=key, value_json=json.dumps(value)))


def read_rows(session: Any, table: Any, trial_id: int) -> dict[str, Any]:
    """A trial's attributes."""
    rows = session.query(table).filter_by(trial_id=trial_id).all()
    return {row.key: json.loads(row.value_json) for row in rows}


def score_rows(scores: Mapping[str, Mapping[str, Scores]]) -> dict[str, float]:
    """split -> objective -> Scores as attributes, without the items."""
    return {
        f"{kind}.{split}.{name}": getattr(score, kind)
        for split, by_name in scores.items()
        for name, score in by_name.items()
        for kind in ("value", "stderr")
    }


def item_rows(scores: Mapping[str, Mapping[str, Scores]]) -> dict[str, str]:
    """split -> objective -> Scores as attributes: the items alone."""
    packed: dict[str, str] = {}
    for split, by_name in scores.items():
        for name, score in by_name.items():
            packed |= array_rows(f"{ITEMS}:{split}:{name}", score.items)
    return packed


def stopped_rows(scores: Mapping[str, Scores], stopped: Stopped) -> tuple[dict[str, Any], dict[str, str]]:
    """Attributes of a stopped candidate for people, and those that hold its items and their positions."""
    user: dict[str, Any] = {"share": stopped.share, "beaten_by": stopped.beaten_by, "stop_rule": stopped.rule}
    if stopped.objective:
        user["stop_objective"] = stopped.objective
    system: dict[str, str] = {}
    for name, score in scores.items():
        user[f"estimate.search.{name}"] = score.value
        user[f"estimate_stderr.search.{name}"] = score.stderr
        system |= array_rows(f"{PARTIAL}:{name}", score.items)
        system |= array_rows(f"{POSITIONS}:{name}", stopped.positions[name])
    return user, system


def read_stopped(
    names: Sequence[str], user: Mapping[str, Any], system: Mapping[str, str]
) -> tuple[dict[str, Scores], Stopped]:
    """What `stopped_rows` wrote."""
    scores = {
        name: Scores(
            user[f"estimate.search.{name}"],
            user[f"estimate_stderr.search.{name}"],
            read_array(system, f"{PARTIAL}:{name}"),
        )
        for name in names
    }
    positions = {name: read_array(system, f"{POSITIONS}:{name}").astype(np.intp) for name in names}
    return scores, _stopped_of(user, positions)


def _stopped_of(user: Mapping[str, Any], positions: Mapping[str, np.ndarray]) -> Stopped:
    rule, objective = user.get("stop_rule", BEATEN), user.get("stop_objective", "")
    return Stopped(user["share"], user["beaten_by"], positions, rule, objective)


def array_rows(key: str, array: np.ndarray) -> dict[str, str]:
    """An array as attributes KEY:000, KEY:001, ... of at most PIECE_CHARS each."""
    text = pack(array)
    starts = range(0, max(1, len(text)), PIECE_CHARS)
    return {f"{key}:{k:03d}": text[start : start + PIECE_CHARS] for k, start in enumerate(starts)}


def read_array(system: Mapping[str, str], key: str) -> np.ndarray:
    """What `array_rows` wrote."""
    pieces: list[str] = []
    while (name := f"{key}:{len(pieces):03d}") in system:
        pieces.append(system[name])
    return unpack("".join(pieces))


def distribution(domain: Sequence[Natural] | tuple[float, float, bool]) -> BaseDistribution:
    """Optuna's distribution of a gene's domain."""
    if isinstance(domain, list):
        return CategoricalDistribution(domain)
    low, high, log = domain
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=bool(log))
    return FloatDistribution(float(low), float(high), log=bool(log))


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between two nested mappings, one line for each key."""
    return [f"{k}: stored {_short(a)}, now {_short(b)}" for k, (a, b) in _differing(stored, wanted).items()]


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
