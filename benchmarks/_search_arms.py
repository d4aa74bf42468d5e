"""The peers of the search benchmark, each from its published settings, and plain baselines.

All ask for weights at a level of the landscape (one per expert, or one per expert and layer, in natural units) and are
told scores. What such a tool hands over is its best trial by its own scores, or the trials that no other one dominates.

* mergekit-evolve: CMA-ES from 1 / experts with step size 1/6, no box but weights folded by |x|, one generation after
  the other, the strategy's own stop conditions, the same items each time.
* Sakana's parameter space: CMA-ES in [0, 1] from 0.5 with step size 1/6; samples outside are drawn again.
* mergenetic: pymoo's GA, and NSGA-II for several objectives: population 25, simulated binary crossover, polynomial
  mutation, one weight per expert in [0, 1], few items.
* TPE and GP: Optuna's samplers with their defaults.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from _landscapes import HIGHEST, UNIFORM_SCALES, Array, Landscape, Meter

FEW = 0.25  # share of the items that mergenetic's arms score: 100 of 400


class Search(Protocol):
    """Ask for a point of the level, tell its scores (larger is better); None where the search has ended."""

    def ask(self) -> Array | None: ...

    def tell(self, z: Array, values: Array) -> None: ...


@dataclass(frozen=True)
class Begin:
    """What a search is made from: dimensions of its level, objectives, a seed, experts."""

    dim: int
    n_goals: int
    seed: int
    experts: int


@dataclass(frozen=True)
class Peer:
    """An arm: what it searches, how, and for how long.

    Attributes:
        start: makes the search.
        level: of the landscape's levels.
        share: of the items that it scores.
        folded: weights are |z|.
        most: evaluations after which it ends, for arms whose own work is slow.
        seeds: at most so many, for the same reason; None for all.
        modes: "one" objective, or a "front".
    """

    start: Callable[[Begin], Search]
    level: str
    share: float = 1.0
    folded: bool = False
    most: float = np.inf
    seeds: int | None = None
    modes: tuple[str, ...] = ("one",)


@dataclass(frozen=True, eq=False)
class Trial:
    """One scored candidate: weights, its scores `(m,)` as the search knows them, evaluations spent until then."""

    weights: Array
    values: Array
    spent: float


def run_peer(arm: Peer, landscape: Landscape, meter: Meter, seed: int, budget: float) -> Iterator[Trial]:
    """The trials of one search."""
    shape = landscape.shape
    ties = shape.ties(arm.level)
    search = arm.start(Begin(ties.shape[1], len(meter.objectives), seed, shape.experts))
    while meter.spent < min(budget, arm.most) - 1e-9:
        z = search.ask()
        if z is None:
            return
        flat = ties @ (np.abs(z) if arm.folded else z)
        weights = flat.reshape(shape.experts, shape.layers, shape.components)
        values = meter.values(weights, arm.share)
        search.tell(z, values)
        yield Trial(weights, values, meter.spent)


class RandomSearch:
    """Uniform in [0, HIGHEST]."""

    def __init__(self, begin: Begin) -> None:
        self._dim, self._rng = begin.dim, np.random.default_rng([11, begin.seed])

    def ask(self) -> Array:
        return self._rng.uniform(0.0, HIGHEST, self._dim)

    def tell(self, z: Array, values: Array) -> None:
        pass


class UniformGrid:
    """Task arithmetic with one scale, twelve of them."""

    def __init__(self, begin: Begin) -> None:
        self._dim, self._left = begin.dim, list(reversed(UNIFORM_SCALES))

    def ask(self) -> Array | None:
        return np.full(self._dim, self._left.pop()) if self._left else None

    def tell(self, z: Array, values: Array) -> None:
        pass


class Cma:
    """Synchronous CMA-ES (pycma) on the mean of the objectives."""

    def __init__(self, begin: Begin, start: float, highest: float | None, stops: bool) -> None:
        import cma

        rng = np.random.default_rng([12, begin.seed])
        options = {"verbose": -9, "verb_log": 0, "seed": np.nan, "signals_filename": "",
                   "randn": lambda *shape: rng.standard_normal(shape)}  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._es = cma.CMAEvolutionStrategy(np.full(begin.dim, start), 1.0 / 6.0, options)
        self._highest, self._stops = highest, stops
        self._waiting: list[Array] = []
        self._told: list[tuple[Array, float]] = []

    def ask(self) -> Array | None:
        if not self._waiting:
            if self._stops and self._es.stop():
                return None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._waiting = [self._inside(z) for z in self._es.ask()]
        return self._waiting.pop(0)

    def _inside(self, z: Array) -> Array:
        """The sample, or one drawn again until it is in the box; after 64 times it is clipped."""
        if self._highest is None:
            return z
        for _ in range(64):
            if (z >= 0.0).all() and (z <= self._highest).all():
                break
            z = self._es.ask(1)[0]
        return np.clip(z, 0.0, self._highest)

    def tell(self, z: Array, values: Array) -> None:
        self._told.append((z, -float(values.mean())))
        if len(self._told) == self._es.popsize:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._es.tell([z for z, _ in self._told], [loss for _, loss in self._told])
            self._told = []


class Genetic:
    """NSGA-II (Deb et al. 2002), which with one objective is a genetic algorithm whose best 25 survive."""

    def __init__(self, begin: Begin, highest: float, population: int = 25) -> None:
        self._dim, self._highest, self._size = begin.dim, highest, population
        self._rng = np.random.default_rng([13, begin.seed])
        self._parents: list[tuple[Array, Array]] = []
        self._order: dict[int, tuple[int, float]] = {}
        self._children: list[tuple[Array, Array]] = []
        self._waiting = list(self._rng.uniform(0.0, highest, (population, begin.dim)))

    def ask(self) -> Array:
        if not self._waiting:
            self._waiting = [self._child() for _ in range(self._size)]
        return self._waiting.pop(0)

    def tell(self, z: Array, values: Array) -> None:
        self._children.append((z, values))
        if len(self._children) == self._size:
            self._survive([*self._parents, *self._children])
            self._children = []

    def _survive(self, everyone: list[tuple[Array, Array]]) -> None:
        values = np.array([v for _, v in everyone])
        rank, crowding = ranks(values)
        kept = np.lexsort((-crowding, rank))[: self._size]
        self._parents = [everyone[i] for i in kept]
        self._order = {place: (int(rank[i]), -float(crowding[i])) for place, i in enumerate(kept)}

    def _child(self) -> Array:
        first, second = (self._parents[self._tournament()][0] for _ in range(2))
        unit = self._crossed(first / self._highest, second / self._highest)
        return np.clip(self._mutated(unit), 0.0, 1.0) * self._highest

    def _tournament(self) -> int:
        one, other = self._rng.integers(0, len(self._parents), 2).tolist()
        return one if self._order[one] <= self._order[other] else other

    def _crossed(self, a: Array, b: Array, eta: float = 15.0) -> Array:
        """Simulated binary crossover: each gene with probability 1/2, the pair with 0.9; one of the two children."""
        rng = self._rng
        if rng.random() > 0.9:
            return a if rng.random() < 0.5 else b
        u = rng.random(self._dim)
        spread = np.where(u <= 0.5, (2.0 * u) ** (1.0 / (eta + 1)), (0.5 / (1.0 - u)) ** (1.0 / (eta + 1)))
        side = np.where(rng.random(self._dim) < 0.5, 1.0, -1.0)
        return np.where(rng.random(self._dim) < 0.5, 0.5 * (a + b) + side * 0.5 * spread * (b - a), a)

    def _mutated(self, x: Array, eta: float = 20.0) -> Array:
        """Polynomial mutation of each gene with probability 1 / dimensions, at least of one in ten children."""
        rng = self._rng
        u = rng.random(self._dim)
        step = np.where(u < 0.5, (2.0 * u) ** (1.0 / (eta + 1)) - 1.0, 1.0 - (2.0 * (1.0 - u)) ** (1.0 / (eta + 1)))
        return x + np.where(rng.random(self._dim) < 1.0 / self._dim, step, 0.0)


def ranks(values: Array) -> tuple[Array, Array]:
    """The non-domination rank `(n,)` and the crowding distance `(n,)` of rows of values."""
    from evomerge.front import non_dominated

    rank, crowding = np.zeros(len(values)), np.zeros(len(values))
    rest, level = np.arange(len(values)), 0
    while len(rest):
        layer = rest[non_dominated(values[rest])]
        rank[layer] = level
        for column in values[layer].T:
            order = np.argsort(column, kind="stable")
            gap = np.full(len(layer), np.inf)
            span = max(float(np.ptp(column)), 1e-12)
            gap[order[1:-1]] = (column[order[2:]] - column[order[:-2]]) / span
            crowding[layer] += gap
        rest, level = np.setdiff1d(rest, layer), level + 1
    return rank, crowding


class Optuna:
    """A sampler of Optuna on a study in memory."""

    def __init__(self, begin: Begin, sampler: str) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            chosen = (
                optuna.samplers.GPSampler(seed=begin.seed)
                if sampler == "gp"
                else optuna.samplers.TPESampler(seed=begin.seed)
            )
        self._study = optuna.create_study(directions=["maximize"] * begin.n_goals, sampler=chosen)
        self._space: dict[str, Any] = {
            f"x{i:03d}": optuna.distributions.FloatDistribution(0.0, HIGHEST) for i in range(begin.dim)
        }
        self._trial: Any = None

    def ask(self) -> Array:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._trial = self._study.ask(self._space)
        return np.array([self._trial.params[name] for name in self._space])

    def tell(self, z: Array, values: Array) -> None:
        self._study.tell(self._trial, [float(v) for v in values])


BOTH = ("one", "front")
PEERS: dict[str, Peer] = {
    "mergekit-evolve": Peer(lambda b: Cma(b, 1.0 / b.experts, None, stops=True), "layers", folded=True),
    "sakana": Peer(lambda b: Cma(b, 0.5, 1.0, stops=False), "layers"),
    "mergenetic": Peer(lambda b: Genetic(b, 1.0), "model", share=FEW, most=400, modes=BOTH),
    "nsga2, layers": Peer(lambda b: Genetic(b, HIGHEST), "layers", modes=BOTH),
    "nsga2, model": Peer(lambda b: Genetic(b, HIGHEST), "model", modes=BOTH),
    "random, layers": Peer(RandomSearch, "layers", modes=BOTH),
    "random, model": Peer(RandomSearch, "model", modes=BOTH),
    "uniform grid": Peer(UniformGrid, "model"),
    "tpe, layers": Peer(lambda b: Optuna(b, "tpe"), "layers", most=200, seeds=5),
    "tpe, model": Peer(lambda b: Optuna(b, "tpe"), "model", most=240, modes=BOTH),
    "gp, model": Peer(lambda b: Optuna(b, "gp"), "model", most=100, seeds=5),
    "gp ehvi, model": Peer(lambda b: Optuna(b, "gp"), "model", most=40, seeds=2, modes=("front",)),
    "cma-es, model": Peer(lambda b: Cma(b, 0.5, HIGHEST, stops=False), "model"),
}
