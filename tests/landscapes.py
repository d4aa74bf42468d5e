"""A noisy logit-quadratic landscape, and searches on it: what the tests of the optimizers share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import expit

from evomerge import front
from evomerge.optimizers import Goal, Optimizer, Result, make

UNIT = (Goal("a", 0.0, 1.0), Goal("b", 0.0, 1.0))


class Landscape:
    """Accuracies of m tasks, each a logit-quadratic of d coefficients, measured on `items` items."""

    def __init__(self, dim: int, tasks: int, seed: int, items: int = 200) -> None:
        rng = np.random.default_rng([seed, 99])
        self.dim, self.tasks, self.items, self.seed = dim, tasks, items, seed
        self.best = rng.uniform(0.0, 0.8, (tasks, dim))
        self.best[np.arange(tasks), np.arange(tasks) % dim] = rng.uniform(0.6, 1.0, tasks)
        roots = rng.standard_normal((tasks, dim, dim)) / np.sqrt(dim)
        shapes = 1.5 * roots @ roots.transpose(0, 2, 1) + np.eye(dim) * rng.uniform(0.2, 1.5, dim)
        self.shapes = shapes * 4 / max(1.0, dim / 4)
        self.peak = rng.uniform(0.8, 1.6, tasks)

    def true(self, x: np.ndarray) -> np.ndarray:
        away = x - self.best
        return np.asarray(expit(self.peak - 0.5 * np.einsum("ti,tij,tj->t", away, self.shapes, away)))

    def score(self, number: int, x: np.ndarray) -> Result:
        rng = np.random.default_rng([self.seed, number, 3])
        y = rng.binomial(self.items, self.true(x)) / self.items
        return Result(number, x, y, np.sqrt(np.maximum(y * (1 - y), 0.5 / self.items) / self.items))


def search(
    name: str, land: Landscape, n: int, workers: int = 1, options: dict[str, object] | None = None
) -> np.ndarray:
    """Return the true scores (n, m) of the evaluated points, in the order of asking; arrivals are shuffled."""
    goals = [Goal(f"task{t}", 0.0, 1.0) for t in range(land.tasks)]
    optimizer = make(name, land.dim, goals, land.seed, np.full(land.dim, 0.3), options or {})
    order = np.random.default_rng([land.seed, 7])
    known = [np.zeros(land.dim), *np.eye(land.dim)[:3], np.full(land.dim, 0.3), np.ones(land.dim)]
    flying: list[tuple[int, np.ndarray]] = []
    points = []
    for number in range(n):
        x = known[number] if number < len(known) else optimizer.ask(number, [p for _, p in flying])
        points.append(x)
        flying.append((number, x))
        if len(flying) >= workers:
            optimizer.tell(land.score(*flying.pop(order.integers(len(flying)))))
    return np.array([land.true(x) for x in points])


def volumes(name: str, dim: int, n: int, seeds: int, workers: int = 1) -> np.ndarray:
    lands = [Landscape(dim, 2, seed) for seed in range(seeds)]
    return np.array(
        [front.hypervolume(search(name, land, n, workers), 0.8 * land.true(np.zeros(dim))) for land in lands]
    )


def told(optimizer: Optimizer, score: Callable[[np.ndarray], float], n: int, first: int = 0) -> list[np.ndarray]:
    points = []
    for number in range(first, first + n):
        x = optimizer.ask(number)
        points.append(x)
        optimizer.tell(Result(number, x, np.array([score(x)]), None))
    return points
