"""Made-up landscapes of mixed variables, measured as binomial scores: what the tests of their optimizers share."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from scipy.special import expit

from evomerge.optimizers import Facts, Goal, Result, make

ITEMS = 200
KINDS = ("none", "repeat", "skip", "splice", "swap")


class Mixed(Protocol):
    """A landscape with facts, a start and true values in (0, 1)."""

    facts: Facts
    start: np.ndarray

    def true(self, x: np.ndarray) -> float: ...


def cell(x: float, cells: int) -> int:
    return min(int(x * cells), cells - 1)


class Choices:
    """32 positions of three choices each and 63 scales, all independent; two of three positions are best as they are.

    `others` is what a wrong choice costs; a right change is worth as much.
    """

    def __init__(self, seed: int, positions: int = 32, scales: int = 63, cost: float = 0.25) -> None:
        rng = np.random.default_rng([seed, 11])
        self.positions, self.cost = positions, cost
        self.best = np.where(rng.random(positions) < 2 / 3, 0, rng.integers(1, 3, positions))
        self.scales = 0.5 + 0.15 * rng.standard_normal(scales)
        dim = positions + scales
        cells = np.r_[np.full(positions, 3), np.zeros(scales)].astype(np.intp)
        self.start = np.r_[np.full(positions, 1 / 6), np.full(scales, 0.5)]
        paired = min(positions, scales)
        parts = tuple((k, positions + k) if k < paired else (k,) for k in range(positions))
        self.facts = replace(
            Facts.plain(dim), cells=cells, categorical=cells > 0, parts=parts, neutral=self.start.copy()
        )

    def true(self, x: np.ndarray) -> float:
        wrong = sum(cell(v, 3) != b for v, b in zip(x[: self.positions], self.best, strict=True))
        away = x[self.positions :] - self.scales
        return float(expit(2.5 - self.cost * wrong - (away @ away)))


class Path:
    """Edits of the identity path of 24 layers with two other sources: an edit's worth depends on its place and length.

    Each layer of each source is worth something at its depth; every seam costs the more the further it jumps; a layer
    that is left out costs what it was worth; the second run of a layer is worth something in one region only.
    """

    LAYERS, SOURCES, SLOTS, BLOCK = 24, 3, 6, 10

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng([seed, 12])
        n = self.LAYERS
        smooth = np.exp(-0.5 * ((np.arange(n)[:, None] - np.arange(n)) / 2.0) ** 2)
        field = (smooth / smooth.sum(axis=1, keepdims=True)) @ rng.standard_normal((n, self.SOURCES + 1))
        self.worth = 0.12 * np.abs(field[:, :1]) + np.c_[np.zeros(n), 0.12 * field[:, 1 : self.SOURCES] - 0.01]
        self.again = 0.1 * field[:, -1] - 0.01
        kinds, free, block = len(KINDS), n - 4, self.BLOCK
        one = [kinds, free, block, self.SOURCES - 1, 0]
        categorical = [True, False, False, True, False]
        dim = 5 * self.SLOTS
        self.start = np.tile([0.5 / kinds, 0.5 / free, 0.5 / block, 0.25, 0.5], self.SLOTS)
        self.facts = replace(
            Facts.plain(dim),
            cells=np.tile(one, self.SLOTS).astype(np.intp),
            categorical=np.tile(categorical, self.SLOTS),
            parts=tuple(tuple(range(5 * k, 5 * k + 5)) for k in range(self.SLOTS)),
            neutral=self.start.copy(),
        )

    def path(self, x: np.ndarray) -> tuple[list[tuple[int, int]], float]:
        """Return the (source, layer) steps of a point and what its scales cost."""
        n, free = self.LAYERS, self.LAYERS - 4
        edits = []
        for k in range(self.SLOTS):
            kind, first, length, source, scale = x[5 * k : 5 * k + 5]
            name = KINDS[cell(kind, len(KINDS))]
            if name != "none":
                begin = 2 + cell(first, free)
                end = min(begin + 1 + cell(length, self.BLOCK), n - 2)
                edits.append((KINDS.index(name), begin, end, 1 + cell(source, self.SOURCES - 1), scale))
        own, copies, order = [0] * n, [1] * n, list(range(n))
        for kind, begin, end, source, _ in sorted(edits):
            for layer in range(begin, end):
                if KINDS[kind] == "splice":
                    own[layer] = source
                if KINDS[kind] == "skip":
                    copies[layer] = 0
                if KINDS[kind] == "repeat" and copies[layer] == 1 and layer == begin:
                    copies[begin:end] = [2 * c for c in copies[begin:end]]
            if KINDS[kind] == "swap" and end < n - 1:
                order[begin], order[begin + 1] = order[begin + 1], order[begin]
        steps: list[tuple[int, int]] = []
        i = 0
        while i < n:  # runs of doubled layers come once more behind themselves
            j = i
            while j < n and copies[order[j]] >= 2:
                j += 1
            run = order[i : max(j, i + 1)]
            steps += [(own[a], a) for a in run if copies[a]] * (2 if j > i else 1)
            i = max(j, i + 1)
        away = sum((e[4] - 0.55) ** 2 for e in edits)
        return steps, float(away)

    def value(self, steps: Sequence[tuple[int, int]], away: float) -> float:
        """Return the true score of a path, whose scales cost `away`."""
        seen: set[int] = set()
        total = -away
        for source, layer in steps:
            total += self.again[layer] if layer in seen else self.worth[layer, source]
            seen.add(layer)
        for (s, a), (t, b) in itertools.pairwise(steps):
            if s != t or b != a + 1:
                total -= 0.01 + 0.004 * abs(b - a - 1)
        gain = total - self.worth[:, 0].sum()
        return float(expit(0.3 + 1.5 * gain - 1.5 * min(gain, 0.0) ** 2))

    def true(self, x: np.ndarray) -> float:
        return self.value(*self.path(x))


class Depths(Path):
    """The same layers, chosen depth by depth: the base's own, none, or one of two others; a scale at every seam."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        free = self.LAYERS - 4
        self.scale = 0.5 + 0.15 * np.random.default_rng([seed, 13]).standard_normal(free)
        self.start = np.r_[np.full(free, 1 / 8), np.full(free, 0.5)]
        cells = np.r_[np.full(free, 4), np.zeros(free)].astype(np.intp)
        self.facts = replace(
            Facts.plain(2 * free),
            cells=cells,
            categorical=cells > 0,
            parts=tuple((k, free + k) for k in range(free)),
            neutral=self.start.copy(),
        )

    def path(self, x: np.ndarray) -> tuple[list[tuple[int, int]], float]:
        """Return the (source, layer) steps of a point and what its scales cost."""
        free = self.LAYERS - 4
        chosen = [0, 0, *(cell(v, 4) for v in x[:free]), 0, 0]
        steps = [((0, 0, 1, 2)[c], layer) for layer, c in enumerate(chosen) if c != 1]
        seams = [b - 2 for (s, a), (t, b) in itertools.pairwise(steps) if s != t or b != a + 1]
        return steps, 0.2 * sum(float((x[free + k] - self.scale[k]) ** 2) for k in seams if 0 <= k < free)


def measured(land: Mixed, number: int, x: np.ndarray, seed: int, items: int = ITEMS) -> Result:
    """Return the score of a point on so many items, with its standard error."""
    y = np.random.default_rng([seed, number, 3]).binomial(items, land.true(x)) / items
    return Result(number, x, np.array([y]), np.sqrt(np.maximum([y * (1 - y)], 0.5 / items) / items))


def found(
    name: str, land: Mixed, n: int, seed: int, options: Mapping[str, Any] | None = None, marks: tuple[int, ...] = ()
) -> list[float]:
    """Return the true value of the best by score, after each of `marks` evaluations (and after n)."""
    dim = len(land.start)
    facts = replace(land.facts, evaluations=n)
    optimizer = make(name, dim, (Goal("a", 0.0, 1.0),), seed, land.start, options, facts)
    best, value, out = land.start, -np.inf, []
    for number in range(n):
        x = land.start if number == 0 else optimizer.ask(number)
        result = measured(land, number, x, seed)
        optimizer.tell(result)
        assert result.values is not None
        if result.values[0] > value:
            best, value = x, float(result.values[0])
        if number + 1 in (*marks, n):
            out.append(land.true(best))
    return out
