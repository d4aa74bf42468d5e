"""What the optimizers on Optuna's samplers share: studies that last one question, quiet and seeded, and generations.

No result is ever written to a storage. The optimizers keep plain rows, as many as their docstrings say, and each
question to a sampler gets a study of its own that shows the rows as trials, so memory and time depend on those
alone. The samplers minimise: values change their sign on the way, since Optuna 5.0 normalises the objectives of
NSGA-III as if all were minimised. A floor becomes the constraint floor - value <= 0; the newest floors hold for
all rows.
"""

from __future__ import annotations

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from evomerge.optimizers._core import Array, Goal, Result, rng_for, usable

if TYPE_CHECKING:
    import optuna
    from optuna.samplers import NSGAIIISampler, NSGAIISampler
    from optuna.trial import FrozenTrial

OUTSIDE = -1  # the number of the trial that is being asked for: never that of a result
PENDING = 1 << 40  # the first number of the pending ones: newer than every result


@dataclass(frozen=True, eq=False)
class Row:
    """One usable result: its number, point `(d,)` and values `(m,)`, larger is better."""

    number: int
    x: Array
    values: Array


class Rows:
    """The newest usable results by number, at most `size` of them, and the newest floors.

    A number that is told again keeps its place and takes the later values.
    """

    def __init__(self, dim: int, n_goals: int, size: int | None = None) -> None:
        self.floors: Array | None = None
        self._dim, self._n_goals, self._size = dim, n_goals, size
        self._rows: dict[int, Row] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def tell(self, result: Result) -> None:
        """Take the floors of any result, and the row of a usable one; the oldest row leaves a full window."""
        self.floors = None if result.floors is None else np.array(result.floors, dtype=np.float64)
        told = usable(result, self._dim, self._n_goals)
        if told is not None:
            self._rows[result.number] = Row(result.number, told[0], told[1])
            if self._size is not None and len(self._rows) > self._size:
                del self._rows[next(iter(self._rows))]


def seed_for(seed: int, number: int) -> int:
    """Return the 32-bit seed of the sampler that answers `ask(number)`."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Optuna's messages and its warnings about experimental parts, for a while."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(level)


@functools.cache
def cube(dim: int) -> dict[str, optuna.distributions.BaseDistribution]:
    """Return the unit cube as Optuna describes it; names are zero-padded, so that sorting keeps the order."""
    import optuna

    return {f"x{i:05d}": optuna.distributions.FloatDistribution(0.0, 1.0) for i in range(dim)}


def finished(rows: Iterable[Row], floors: Array | None, **system_attrs: Any) -> list[FrozenTrial]:
    """Return the rows as finished trials with their constraints."""
    goals = [] if floors is None else np.flatnonzero(np.isfinite(floors)).tolist()
    trials = []
    for row in rows:
        trial = _trial(row.number, row.x, (-row.values).tolist(), dict(system_attrs))
        for goal in goals:
            assert floors is not None
            trial.set_constraint(str(goal), float(floors[goal] - row.values[goal]))
        trials.append(trial)
    return trials


def running(points: Sequence[Array]) -> list[FrozenTrial]:
    """Return pending points `(d,)` as running trials."""
    return [_trial(PENDING + i, np.asarray(x, dtype=np.float64), None, {}) for i, x in enumerate(points)]


def asked(dim: int, **system_attrs: Any) -> FrozenTrial:
    """Return the trial that a sampler is asked to fill; it is part of no study."""
    trial = _trial(OUTSIDE, np.zeros(dim), None, system_attrs)
    trial.params = {}
    return trial


def _trial(number: int, x: Array, values: list[float] | None, system_attrs: dict[str, Any]) -> FrozenTrial:
    from optuna.trial import FrozenTrial, TrialState

    space = cube(len(x))
    return FrozenTrial(
        number=number,
        state=TrialState.RUNNING if values is None else TrialState.COMPLETE,
        value=None,
        values=values,
        datetime_start=None,
        datetime_complete=None,
        params=dict(zip(space, x.tolist(), strict=True)),
        distributions=space,
        user_attrs={},
        system_attrs=system_attrs,
        intermediate_values={},
        trial_id=number,
    )


@functools.cache
def _shelf() -> Any:
    """Return the class of a storage that shows given trials and keeps nothing that a sampler notes on them."""
    from optuna.storages import InMemoryStorage

    class Shelf(InMemoryStorage):
        trials: Sequence[FrozenTrial] = ()

        def get_all_trials(self, study_id: int, deepcopy: bool = True, states: Any = None) -> list[FrozenTrial]:
            return [trial for trial in self.trials if states is None or trial.state in states]

        def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
            pass

    return Shelf


def study(trials: Sequence[FrozenTrial], n_goals: int) -> optuna.Study:
    """Return a study that minimises every objective and holds `trials`: for one question only."""
    import optuna

    shelf = _shelf()()
    shelf.trials = trials
    return optuna.create_study(storage=shelf, study_name="one question", directions=["minimize"] * n_goals)


def point(params: Mapping[str, Any], dim: int) -> Array:
    """Return the vector `(dim,)` of a sampler's answer."""
    return np.array([params[name] for name in cube(dim)], dtype=np.float64)


class Generations(ABC):
    """A genetic algorithm by arrivals: every `population` results, in the order told, are a generation.

    Known recipes count, so parallel workers never wait. A complete generation and its parents compete to be the
    next parents; the rest is forgotten, so 2 x `population` rows are all that is kept. A result that is told again
    replaces its row; if that is gone already, it competes anew. Subclasses choose the sampler.
    """

    def __init__(self, dim: int, goals: Sequence[Goal], seed: int, population: int) -> None:
        self._dim, self._n_goals, self._seed, self._population = dim, len(goals), seed, population
        self._parents: dict[int, Row] = {}
        self._newest: dict[int, Row] = {}
        self._floors: Array | None = None
        self._generation = 0

    @abstractmethod
    def sampler(self, seed: int) -> NSGAIISampler | NSGAIIISampler:
        """Return the sampler that selects parents and breeds."""

    def tell(self, result: Result) -> None:
        """Add the result to the current generation; a complete one selects the parents of the next."""
        self._floors = None if result.floors is None else np.array(result.floors, dtype=np.float64)
        told = usable(result, self._dim, self._n_goals)
        if told is None:
            return
        store = self._parents if result.number in self._parents else self._newest
        store[result.number] = Row(result.number, told[0], told[1])
        if len(self._newest) >= self._population:
            self._select()

    def ask(self, number: int, pending: Sequence[Array] = ()) -> Array:
        """Return a child of two parents, or a random point in the first generation; `pending` does not matter."""
        if not self._parents:
            return rng_for(self._seed, number).random(self._dim)
        with quiet():
            sampler = self.sampler(seed_for(self._seed, number))
            key = sampler._get_generation_key()
            # The parents are a generation of exactly `population`, so all of them survive as parents of the child.
            parents = study(finished(self._parents.values(), self._floors, **{key: 0}), self._n_goals)
            child = asked(self._dim, **{key: 1})
            params = sampler.sample_relative(parents, child, cube(self._dim))
            for name, distribution in cube(self._dim).items():
                if name not in params:
                    params[name] = sampler.sample_independent(parents, child, name, distribution)
        return point(params, self._dim)

    def _select(self) -> None:
        rows = {**self._parents, **self._newest}
        self._generation += 1
        with quiet():
            sampler = self.sampler(seed_for(self._seed, PENDING + self._generation))
            family = finished(rows.values(), self._floors, **{sampler._get_generation_key(): 0})
            chosen = sampler.select_parent(study(family, self._n_goals), 1)
        self._parents = {trial.number: rows[trial.number] for trial in chosen}
        self._newest = {}
