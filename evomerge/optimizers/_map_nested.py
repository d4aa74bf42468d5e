"""Nested MAP: merge the two most alike models first, freeze the result, and go on with one model less.

Li et al., MAP (arXiv 2406.07529), section on nested-merging MAP: K experts cost 20 (K - 1) evaluations, each of them
in a plane, instead of a design that grows with K^2; the price is that preferences are fixed beforehand and that
nothing frozen is reconsidered. Here it is a schedule of planned points: a stage ends when all of its points have
results, so parallel evaluations fill a stage in any order. Only `tell` moves on, so that a replay gives the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc

from evomerge.errors import ConfigError, Problem
from evomerge.optimizers._core import Array, Facts, Goal, rng_for
from evomerge.optimizers._map_front import near
from evomerge.optimum import optimum
from evomerge.surrogate import fit

POINTS = 20  # per pair of models; a fifth of them with equal shares
PATIENCE = 3  # a stage ends at the latest after this many times its points in results
IN_PLANE = 1e-3  # recipes are rounded to 4 decimals


@dataclass(frozen=True, eq=False)
class _Node:
    """An expert or a frozen merge: the point zero + vector, and the tasks of its experts."""

    tasks: tuple[int, ...]
    vector: Array  # (d,)
    own: float  # how good it is at its own tasks, in [0, 1]


class Nested:
    """The schedule; `done` from the moment when the last merge has been frozen and evaluated."""

    def __init__(self, goals: Sequence[Goal], seed: int, facts: Facts, preferences: Array) -> None:
        """Take the facts of the cube; goal i belongs to expert i.

        Raises:
            ConfigError: not one objective and one coordinate per expert, or no point of the unmerged base.
        """
        self._axes = _axes(goals, facts)
        assert facts.zero is not None
        self._goals, self._seed, self._zero, self._preferences = goals, seed, facts.zero.copy(), preferences
        self._nodes: list[_Node] = []
        self._pair: tuple[int, int] | None = None
        self._plan = self._zero + self._axes
        self._told = 0  # results since the stage began
        self._x: list[Array] = []
        self._values: list[Array] = []
        self._stderr: list[Array] = []
        self._failed: list[Array] = []
        self.done = False

    def tell(self, x: Array | None, values: Array | None, stderr: Array, floors: Array | None) -> None:
        """Take one result (`values` None: the point failed) and end the stage if it was the last one."""
        if self.done:
            return
        if x is not None and values is None:
            self._failed.append(x)
        elif x is not None and values is not None:
            self._x.append(x)
            self._values.append(values)
            self._stderr.append(stderr)
        self._told += 1
        known = np.array([*self._x, *self._failed]).reshape(-1, len(self._zero))
        late = self._told >= PATIENCE * max(len(self._plan), 4)
        if (late or self._is_planned_done(known)) and self._x:
            self._advance(floors)

    def ask(self, number: int, pending: Sequence[Array]) -> Array | None:
        """Return the next point of the stage, another point of its plane, or None if the schedule has none."""
        if self.done:
            return None
        taken = np.array([*self._x, *self._failed, *pending]).reshape(-1, len(self._zero))
        for row in self._missing(taken):
            return np.array(self._plan[row])
        rng = rng_for(self._seed, number)
        if self._pair is not None:
            a, b = (self._nodes[i].vector for i in self._pair)
            return np.asarray(self._zero + rng.random() * a + rng.random() * b)
        if self._nodes:
            return None  # the last merge is being evaluated
        return np.asarray(self._zero + rng.uniform(0.25, 1.0) * self._axes[rng.integers(len(self._axes))])

    def recipe(self) -> Array | None:
        """Return the merge of all experts, or None before the last stage."""
        return self._zero + self._nodes[0].vector if len(self._nodes) == 1 else None

    def _missing(self, taken: Array) -> list[int]:
        """Rows of the plan without a result; an expert with any result on its axis needs no other."""
        open_rows = ~near(self._plan, taken)
        if not self._nodes:
            open_rows &= np.array([not self._on_axis(i, taken).any() for i in range(len(self._axes))])
        return np.flatnonzero(open_rows).tolist()

    def _is_planned_done(self, known: Array) -> bool:
        return not self._missing(known)

    def _on_axis(self, expert: int, x: Array) -> Array:
        offset = x - self._zero
        others = np.abs(np.delete(offset, int(np.argmax(self._axes[expert])), axis=1))
        along = offset @ self._axes[expert]
        return np.asarray((others <= IN_PLANE).all(axis=1) & (along > IN_PLANE))

    def _advance(self, floors: Array | None) -> None:
        if not self._nodes:
            self._nodes = [_Node((i,), self._axes[i], self._own(i)) for i in range(len(self._axes))]
        elif self._pair is not None:
            merged = self._merge(self._pair, floors)
            self._nodes = [node for i, node in enumerate(self._nodes) if i not in self._pair] + [merged]
        else:
            self.done = True
            return
        self._told = 0
        if len(self._nodes) == 1:
            self._pair, self._plan = None, (self._zero + self._nodes[0].vector)[None]
            return
        # Closest in what they can do; the first such pair where several are.
        self._pair = min(
            combinations(range(len(self._nodes)), 2),
            key=lambda pair: abs(self._nodes[pair[0]].own - self._nodes[pair[1]].own),
        )
        a, b = (self._nodes[i].vector for i in self._pair)
        self._plan = self._zero + self._plane_design() @ np.vstack([a, b])

    def _plane_design(self) -> Array:
        """Return `(POINTS, 2)` shares of the two models."""
        equal = np.linspace(0, 1, POINTS // 5 + 1)[1:, None] * np.ones(2)
        stage = len(self._nodes)
        engine = qmc.Sobol(2, scramble=True, rng=np.random.default_rng([self._seed, stage]))
        return np.vstack([equal, engine.random(16)])

    def _own(self, expert: int) -> float:
        """The best result of an expert alone on its own task; 0 if it never gave one."""
        mask = self._on_axis(expert, np.array(self._x))
        return float(self._scaled(np.array(self._values))[mask, expert].max()) if mask.any() else 0.0

    def _scaled(self, values: Array) -> Array:
        """Values in [0, 1]: by the bounds of the goals where both exist, else by the range of the results."""
        results = np.array(self._values)
        low, high = results.min(axis=0), results.max(axis=0)
        for j, goal in enumerate(self._goals):
            if goal.lower is not None and goal.upper is not None:
                low[j], high[j] = goal.lower, goal.upper
        return np.asarray((values - low) / np.where(high > low, high - low, 1.0))

    def _merge(self, pair: tuple[int, int], floors: Array | None) -> _Node:
        """Fit the pair's tasks in its plane and freeze the point with the largest preferred sum."""
        a, b = (self._nodes[i] for i in pair)
        tasks = a.tasks + b.tasks
        chosen = list(tasks)
        shares, rows = _in_plane(np.array(self._x) - self._zero, a.vector, b.vector)
        weights = self._preferences[chosen]
        weights = weights if weights.sum() > 0 else np.ones(len(chosen))
        own = 0.5 * (a.own + b.own)
        best = np.full(2, 0.5)
        if len(rows):
            values, stderr = np.array(self._values)[rows], np.array(self._stderr)[rows]
            models = [
                fit(shares, values[:, j], stderr[:, j], lower=self._goals[j].lower, upper=self._goals[j].upper)
                for j in chosen
            ]
            limits = None if floors is None else floors[chosen]
            low, high = shares.min(axis=0), shares.max(axis=0)
            best, found, _ = optimum(models, weights, low, high, self._seed, limits)
            full = np.array(self._values).mean(axis=0)
            full[chosen] = found
            own = float(np.average(self._scaled(full)[chosen], weights=weights))
        return _Node(tasks, best[0] * a.vector + best[1] * b.vector, own)


def _axes(goals: Sequence[Goal], facts: Facts) -> Array:
    """Return `(K, d)`: from the base to the far end of each expert's axis.

    Raises:
        ConfigError: see `Nested`.
    """
    dim, m = len(facts.experts), len(goals)
    experts = int(facts.experts.max()) + 1
    reason = ""
    if facts.zero is None:
        reason = "the space does not hold the unmerged base (all coefficients 0)"
    elif sorted(facts.experts.tolist()) != list(range(dim)) or dim < 2 or facts.cells.any():
        reason = f"the space has {dim} coordinates for {experts} experts; each of 2 or more needs one, continuous"
    elif m != dim:
        reason = f"there are {m} objectives for {dim} experts, and nested merging needs one for each, in their order"
    elif (facts.zero >= 1.0 - IN_PLANE).any():
        reason = "a coefficient ends at 0, so that its expert has no axis"
    if reason or facts.zero is None:
        hint = "use variant: quadratic, or a space with one coefficient per expert and one objective per expert"
        raise ConfigError.of([Problem(f"map: {reason}", "optimizer.variant", hint)], "the optimizer's options")
    axes = np.zeros((dim, dim))
    for coordinate, expert in enumerate(facts.experts):
        axes[expert, coordinate] = 1.0 - facts.zero[coordinate]
    return axes


def _in_plane(offset: Array, a: Array, b: Array) -> tuple[Array, NDArray[np.intp]]:
    """Return the shares `(k, 2)` of the offsets that are a mixture of the vectors a and b, and their rows."""
    # The two have no coordinate in common, so they are orthogonal; a vector of length 0 has no share to see.
    shares = np.column_stack([offset @ v / (v @ v) if v @ v > IN_PLANE**2 else np.ones(len(offset)) for v in (a, b)])
    close = (np.abs(offset - shares @ np.vstack([a, b])) <= IN_PLANE).all(axis=1)
    inside = ((shares >= -0.01) & (shares <= 1.01)).all(axis=1)
    rows = np.flatnonzero(close & inside)
    return np.clip(shares[rows], 0.0, 1.0), rows
