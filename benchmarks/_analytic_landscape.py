"""Analytic landscapes: the logit of each task's score is a concave quadratic of the weights; items are exact.

The quadratic of task t is top - d' A d / 2 with d = w - w*_t. A is positive semidefinite and random: experts interact
through a Wishart matrix of their effective weights (the layers' weights averaged with effects that decay as 1 / rank of
the layer, which layers matter being random too); each layer has a target of its own around its expert's; and there are
a few random directions across everything.

Item i of task t is answered right if z_i(w) exceeds the normal quantile of 1 - score_t(w). z_i is the item's own
difficulty plus a random function of the weights (random Fourier features), and exactly standard normal for every w. So
the truth is known in closed form, near merges agree on most items, and far ones on fewer.
"""

from __future__ import annotations

import numpy as np
from _landscapes import Array, Shape, logit, sigmoid
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import ndtri

KINDS = ("balanced", "heterogeneous", "conflicting")
EXPERTS, LAYERS, COMPONENTS, TASKS = 4, 12, 2, 3
FEATURES = 24
COMMON = 0.85  # share of a layer's effect that all tasks have in common
OWN = 0.75  # share of an item's variance that is the same for all merges
# Of the curvature: the experts' effective weights, the layers' own targets, random directions.
BETWEEN, WITHIN, ACROSS = 1.0, 0.25, 0.1
SCATTER = 0.2  # of the layers' own targets around their expert's
# Kind: the weight of expert k that is best for task t, and what a wrong weight of the expert costs.
TARGETS = {
    "balanced": [[0.6, 0.45, 0.45, 0.5], [0.45, 0.6, 0.45, 0.5], [0.45, 0.45, 0.6, 0.5]],
    "heterogeneous": [[1.0, 0.1, 0.3, 0.0], [0.2, 0.7, 0.1, 0.0], [0.3, 0.0, 0.5, 0.0]],
    "conflicting": [[1.0, -0.3, 0.3, 0.3], [-0.3, 1.0, 0.3, 0.3], [0.1, 0.1, 0.9, 0.2]],
}
COSTS = {
    "balanced": [1.0, 1.0, 1.0, 1.0],
    "heterogeneous": [1.0, 0.5, 1.0, 0.4],
    "conflicting": [1.0, 1.0, 1.0, 0.5],
}
BASE, TOP = 0.52, 0.80  # a task's score of the base and at its own optimum, before each is moved at random


class AnalyticLandscape:
    """One random landscape of a kind; the seed draws its matrices and its items."""

    n_tasks = TASKS

    def __init__(self, kind: str, seed: int, n_items: int = 400) -> None:
        self.name, self.n_items, self.plateau = f"analytic {kind}", n_items, kind == "balanced"
        self.shape = Shape(EXPERTS, LAYERS, COMPONENTS)
        rng = np.random.default_rng([1, KINDS.index(kind), seed])
        shared = np.stack([_effects(rng) for _ in range(EXPERTS)])
        made = [_quadratic(rng, np.array(TARGETS[kind][t]), np.array(COSTS[kind]), shared) for t in range(TASKS)]
        self._target, self._curvature, self._top = (np.stack(part) for part in zip(*made, strict=True))
        # Two merges whose weights differ by 0.3 everywhere share about two thirds of the random part.
        self._frequency = rng.normal(0.0, 3.0, (FEATURES, EXPERTS, LAYERS * COMPONENTS)) / np.sqrt(EXPERTS)
        self._frequency *= _effects(rng)
        self._frequency = self._frequency.reshape(FEATURES, -1)
        shape = (TASKS * n_items, 1 + 2 * FEATURES)
        self._items = {split: rng.standard_normal(shape) for split in ("search", "validation")}

    def scores(self, x: Array) -> Array:
        """True scores `(tasks,)` of flat weights `(dim,)`."""
        d = x - self._target
        found: Array = sigmoid(self._top - 0.5 * np.einsum("ti,tij,tj->t", d, self._curvature, d))
        return found

    def truth(self, weights: Array) -> Array:
        """See Landscape."""
        return self.scores(weights.ravel())

    def outcomes(self, weights: Array, split: str, positions: NDArray[np.intp] | None = None) -> NDArray[np.uint8]:
        """See Landscape."""
        x = weights.ravel()
        angle = self._frequency @ x
        waves = np.concatenate([np.cos(angle), np.sin(angle)]) / np.sqrt(FEATURES)
        features = np.concatenate([[np.sqrt(OWN)], np.sqrt(1.0 - OWN) * waves])
        threshold = np.repeat(-ndtri(self.scores(x)), self.n_items)
        items = self._items[split]
        if positions is not None:
            items, threshold = items[positions], threshold[positions]
        return (items @ features > threshold).astype(np.uint8)

    def optimum(self) -> Array:
        """See Landscape: the mean score climbed along its gradient, from several places."""

        def loss(x: Array) -> tuple[float, Array]:
            d = x - self._target
            bent = np.einsum("tij,tj->ti", self._curvature, d)
            score = sigmoid(self._top - 0.5 * (bent * d).sum(axis=1))
            return -float(score.mean()), ((score * (1.0 - score))[:, None] * bent).mean(axis=0)

        starts = [*np.clip(self._target, 0.0, 1.2), np.clip(self._target.mean(axis=0), 0.0, 1.2)]
        bounds = [(0.0, 1.2)] * self.shape.dim
        runs = [minimize(loss, start, jac=True, bounds=bounds, method="L-BFGS-B") for start in starts]
        best = min(runs, key=lambda run: run.fun).x
        return np.asarray(best).reshape(EXPERTS, LAYERS, COMPONENTS)


def _effects(rng: np.random.Generator) -> Array:
    """How much each layer's weight counts `(layers * components,)`: 1 / rank, in random order; the sum is 1."""
    effect = 1.0 / (1.0 + rng.permutation(LAYERS))
    share = rng.dirichlet(np.full(COMPONENTS, 3.0), LAYERS)
    return np.asarray((effect[:, None] * share / effect.sum()).ravel())


def _quadratic(rng: np.random.Generator, target: Array, cost: Array, shared: Array) -> tuple[Array, Array, float]:
    """A task's best weights `(dim,)`, its curvature `(dim, dim)`, and the logit at the best weights."""
    per_layer = LAYERS * COMPONENTS
    target = target + rng.normal(0.0, 0.07, EXPERTS)
    best = (target[:, None] + rng.normal(0.0, SCATTER, (EXPERTS, per_layer))).ravel()
    effects = COMMON * shared + (1.0 - COMMON) * np.stack([_effects(rng) for _ in range(EXPERTS)])
    cost = cost * rng.uniform(0.8, 1.25, EXPERTS)
    root = rng.standard_normal((EXPERTS, 3 * EXPERTS)) / np.sqrt(3 * EXPERTS)
    wishart = np.sqrt(cost)[:, None] * (0.6 * np.eye(EXPERTS) + 0.4 * root @ root.T) * np.sqrt(cost)
    spread = np.zeros((EXPERTS, EXPERTS * per_layer))
    for k in range(EXPERTS):
        spread[k, k * per_layer : (k + 1) * per_layer] = effects[k]
    between = spread.T @ wishart @ spread
    within = np.diag((cost[:, None] * effects).ravel())
    across = rng.standard_normal((6, EXPERTS * per_layer)) * effects.ravel() / np.sqrt(6)
    curvature = BETWEEN * between + WITHIN * within + ACROSS * across.T @ across
    top, base = logit(TOP) + rng.normal(0.0, 0.15), logit(BASE) + rng.normal(0.0, 0.15)
    drop = 0.5 * float(best @ curvature @ best)
    # A task that the base does nearly as well as any merge would be flat; its curvature is that of a typical one.
    return best, curvature * (top - base) / max(drop, 0.05), top
