"""Crossover of complementary recipes: an archive whose members compete for single items (M2N2).

Abrantes et al., GECCO 2025 (M2N2). Each item of the objectives is a limited resource that the members share: an item
that few solve is worth more to those who do. Parent 1 is drawn by the share it gets; parent 2 by what it has of the
items that parent 1 lacks. Alone it is a genetic algorithm that keeps niches; in a portfolio it is the proposer that
looks at items.

Rules:
- the archive holds the `population` best results by the mean of the scaled values; infeasible ones leave first. (M2N2
  lets the least fit leave. On tests/landscapes.py with 24 coefficients that gave 0.02 to 0.03 less after 240 results.)
- fitness of member i: the mean over goals and their items j of s_ij / sum_k s_kj, for members with whole items. Items
  beyond [0, 1] are first mapped to it by their range in the archive. Members without items, or with fewer than
  others, count with the mean of their scaled values, on the same scale;
- child: spherical around the unmerged base where the cube holds it (two experts halfway give 0.7 of each, not 0.5),
  else straight. Parent 2 has the share w up to a random depth and 1 - w beyond it. Depth is the place among the
  coordinates of the same expert; with one coordinate per expert there is none, and one share from [-0.1, 1.1]. Then a
  mutation, since blends alone never leave the span of the parents. Categories come from either parent;
- until two results are known: `start`, then uniform points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evomerge import registry
from evomerge.optimizers._core import Array, Facts, Goal, Result, check_number, rng_for, usable, violation

SAME = 1e-3  # two points closer than this in every coordinate are one recipe
OVERSHOOT = 0.1
FINEST, COARSEST = 0.01, 0.2  # standard deviations of the mutation


@dataclass(frozen=True, eq=False)
class _Member:
    """A result in the archive: point `(d,)`, values `(m,)`, by how much these miss their floors, items per goal."""

    number: int
    x: Array
    values: Array
    missing: float
    items: tuple[NDArray[np.uint8] | NDArray[np.float32], ...] | None


class Crossover:
    """Children of complementary members of a small archive; any number of objectives."""

    wants_items = True

    def __init__(
        self,
        dim: int,
        goals: Sequence[Goal],
        seed: int,
        start: Array,
        *,
        population: int = 20,
        facts: Facts | None = None,
    ) -> None:
        """See `make`; `population` is the size of the archive."""
        check_number("population", population, 2, whole=True)
        facts = facts or Facts.plain(dim)
        self._dim, self._n_goals, self._seed, self._start = dim, len(goals), seed, start.copy()
        self._population = population
        self._categorical, self._zero = facts.categorical, facts.zero
        self._depth = depths(facts.experts)
        self._archive: list[_Member] = []

    def tell(self, result: Result) -> None:
        """Take the result into the archive; the worst leaves."""
        told = usable(result, self._dim, self._n_goals)
        if told is None:
            return
        x, values, _ = told
        new = _Member(result.number, x, values, violation(values, result.floors), _packed(result.items, self._n_goals))
        rest = [m for m in self._archive if m.number != new.number and np.abs(m.x - x).max() >= SAME]
        self._archive = [*rest, new]
        if len(self._archive) > self._population:
            missing = np.array([m.missing for m in self._archive])
            del self._archive[int(np.lexsort((_merit(self._archive), -missing))[0])]

    def ask(self, number: int, pending: Sequence[Array] = ()) -> Array:
        """Return a child of two members, or a first point; `pending` matters for the first point only."""
        rng = rng_for(self._seed, number)
        if len(self._archive) < 2:
            known = [*(m.x for m in self._archive), *pending]
            taken = any(np.abs(x - self._start).max() < SAME for x in known)
            return rng.random(self._dim) if taken else self._start.copy()
        first, second = self._parents(rng)
        child = self._blend(self._archive[first].x, self._archive[second].x, rng)
        return self._mutate(child, rng)

    def _parents(self, rng: np.random.Generator) -> tuple[int, int]:
        """Return two different members: the first by fitness, the second by what it has and the first lacks."""
        fitness, shares = _fitness(self._archive)
        allowed = np.array([m.missing == 0 for m in self._archive])
        if allowed.sum() < 2:
            allowed[:] = True
        first = _drawn(np.where(allowed, fitness, 0.0), allowed, rng)
        allowed[first] = False
        attraction = fitness
        if shares is not None and np.isfinite(shares[first]).all():
            more = np.maximum(shares - shares[first], 0.0).sum(axis=1)
            more = np.where(np.isfinite(more) & allowed, more, 0.0)
            attraction = more if more.sum() > 0 else fitness
        return first, _drawn(np.where(allowed, attraction, 0.0), allowed, rng)

    def _blend(self, first: Array, second: Array, rng: np.random.Generator) -> Array:
        if self._depth is None:
            share = np.full(self._dim, rng.uniform(-OVERSHOOT, 1 + OVERSHOOT))
        else:
            ratio, split = rng.random(), rng.random()
            share = np.where(self._depth < split, ratio, 1 - ratio)
        child = first + share * (second - first)
        if self._zero is not None:
            child = self._zero + _slerp(first - self._zero, second - self._zero, share)
        return np.where(self._categorical, np.where(rng.random(self._dim) < share, second, first), child)

    def _mutate(self, child: Array, rng: np.random.Generator) -> Array:
        """Return the child with normal steps of one random size; a category changes once in d coordinates."""
        size = np.exp(rng.uniform(np.log(FINEST), np.log(COARSEST)))
        moved = np.clip(child + size * rng.standard_normal(self._dim), 0.0, 1.0)
        other = rng.random(self._dim)
        changed = rng.random(self._dim) < 1 / self._dim
        return np.where(self._categorical, np.where(changed, other, child), moved)


def _slerp(first: Array, second: Array, share: Array) -> Array:
    """Return the point `(d,)` on the arc from first to second, each coordinate at its own share; keeps lengths."""
    lengths = float(np.linalg.norm(first)) * float(np.linalg.norm(second))
    angle = float(np.arccos(np.clip(first @ second / lengths, -1.0, 1.0))) if lengths > 0 else 0.0
    if not 1e-3 < angle < np.pi - 1e-3:
        return first + share * (second - first)
    point: Array = (np.sin((1 - share) * angle) * first + np.sin(share * angle) * second) / np.sin(angle)
    return point


def depths(experts: NDArray[np.intp]) -> Array | None:
    """Return where each coordinate `(d,)` lies among those of its expert, from 0 to 1; None if none has two or more."""
    depth = np.zeros(len(experts))
    for expert in np.unique(experts):
        own = np.flatnonzero(experts == expert)
        depth[own] = (np.arange(len(own)) + 0.5) / len(own)
    several = any((experts == expert).sum() > 1 for expert in np.unique(experts))
    return depth if several else None


def _packed(items: Sequence[Array] | None, n_goals: int) -> tuple[NDArray[np.uint8] | NDArray[np.float32], ...] | None:
    """Return private, small copies of the items; None if any goal has none or a form other than a list of numbers."""
    if items is None or len(items) != n_goals:
        return None
    packed: list[NDArray[np.uint8] | NDArray[np.float32]] = []
    for each in items:
        given = np.asarray(each, dtype=np.float64)
        if given.ndim != 1 or len(given) == 0 or not np.isfinite(given).all():
            return None
        binary = bool(np.isin(given, (0.0, 1.0)).all())
        packed.append(given.astype(np.uint8) if binary else given.astype(np.float32))
    return tuple(packed)


def _unit(table: Array, always: bool = False) -> Array:
    """Map each column of `(n, k)` to [0, 1] by its range; unless `always`, columns inside it stay as they are."""
    low, high = table.min(axis=0), table.max(axis=0)
    inside = (low >= 0) & (high <= 1) & (not always)
    scaled = (table - low) / np.where(high > low, high - low, 1.0)
    return np.where(inside, table, scaled)


def _merit(members: Sequence[_Member]) -> Array:
    """Return the mean of the values `(n,)`, each goal scaled by its range among the members."""
    merit: Array = _unit(np.array([m.values for m in members]), always=True).mean(axis=1)
    return merit


def _fitness(members: Sequence[_Member]) -> tuple[Array, Array | None]:
    """Return the fitness `(n,)` and each member's shares `(n, items)`; these NaN, or None in all, without whole items.

    Abrantes et al. 2025: a member's share of an item is its own score over the sum of all members' scores.
    """
    plain = _merit(members)
    lengths = [tuple(len(each) for each in m.items) if m.items is not None else () for m in members]
    longest = max(lengths, key=sum)
    whole = np.array([bool(n) and n == longest for n in lengths])
    if whole.sum() < 2:
        return plain, None
    with_items = [m.items for m, w in zip(members, whole, strict=True) if w and m.items is not None]
    columns = []
    for goal in zip(*with_items, strict=True):
        scores = _unit(np.array(goal, dtype=np.float64))
        total = scores.sum(axis=0)
        columns.append(scores / np.where(total > 0, total, 1.0) / scores.shape[1])
    own = np.hstack(columns)
    shares = np.full((len(members), own.shape[1]), np.nan)
    shares[whole] = own
    sums, fitness = own.sum(axis=1), plain.copy()
    if sums.sum() > 0:
        fitness[whole] = sums / sums.sum() * (plain[whole].sum() or 1.0)
    return fitness, shares


def _drawn(weights: Array, allowed: NDArray[np.bool_], rng: np.random.Generator) -> int:
    """Return an index drawn in proportion to the weights; any allowed one if all are zero."""
    if weights.sum() <= 0:
        return int(rng.choice(np.flatnonzero(allowed)))
    return int(rng.choice(len(weights), p=weights / weights.sum()))


registry.register("optimizers", "crossover", Crossover)
