"""evomerge's arms of the search benchmark: the package's own parts, driven by the engine's loop without its database.

Known recipes first and scored in full; then ask, score, tell, with the engine's own optimizers, rungs, rivals and
estimates. What is handed over of one objective is chosen as the package does: the optimizer's recommendations, the
candidates that are best by posterior mean and the best known recipes meet on items that no search has seen, in halving
rounds. Those items are paid for out of the same budget: before each point where results are looked at, some evaluations
are kept for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from _landscapes import Array, Landscape, Meter, known_recipes

ROUNDS = (0.25, 0.5, 1.0)  # shares of the validation items
MOST_FINALISTS = 12


@dataclass(frozen=True)
class Evomerge:
    """An arm: which optimizer at which level, and what is left out.

    Attributes:
        coarse: whether it is told of the coarsest level.
        rotation: epochs with items of their own, where an objective has enough items for them.
        level: None is the whole cube with all its levels as facts; a name is that level alone.
        matrix: estimates of stopped candidates by regression on the items of earlier ones.
        racing: stop candidates that are beaten, with estimates; without it epochs' shares still apply.
        simplest: of those within a standard error of the best on fresh items take the simplest; otherwise the best.
        guard: choose on fresh items; otherwise the first recommendation is handed over.
    """

    optimizer: str = "coarse_to_fine"
    level: str | None = None
    coarse: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    rotation: bool = True
    matrix: bool = True
    racing: bool = True
    guard: bool = True
    simplest: bool = True
    modes: tuple[str, ...] = ("one", "front")
    most: float = np.inf
    seeds: int | None = None


@dataclass(frozen=True, eq=False)
class Candidate:
    """A candidate of the run: weights, point of the optimizer's cube, values and errors `(m,)`; if whole, if known."""

    weights: Array
    x: Array
    values: Array
    stderr: Array
    whole: bool
    known: bool


class MeteredObjective:
    """An objective of the package's protocol whose "live model" is an array of weights."""

    maximize, partial, bounds, splits = True, True, (0.0, 1.0), ("search",)

    def __init__(self, name: str, meter: Meter, index: int) -> None:
        self.name, self._meter, self._positions = name, meter, meter.positions[index]

    def size(self, split: str) -> int:
        return len(self._positions)

    def score(self, live: Any, split: str, positions: Sequence[int] | None = None) -> Any:
        chosen = self._positions if positions is None else self._positions[np.asarray(positions, dtype=np.intp)]
        return self.aggregate(self._meter.items(live, split, chosen))

    def aggregate(self, items: np.ndarray) -> Any:
        from evomerge.objectives import mean_scores

        return mean_scores(items)


class Run:
    """One search of an arm."""

    def __init__(self, arm: Evomerge, landscape: Landscape, meter: Meter, seed: int, budget: float) -> None:
        from evomerge.estimator import ItemMatrix
        from evomerge.fidelity import FEWEST_CANDIDATES, RUNGS, SHARE, WORTH_EPOCHS, Schedule
        from evomerge.optimizers import Goal, make
        from evomerge.rivals import Rivals

        self._arm, self._meter, self._seed = arm, meter, seed
        self._shape, self._ties = landscape.shape, landscape.shape.ties(arm.level or "layers")
        self._known = known_recipes(self._shape)
        dim = self._ties.shape[1]
        names = [f"objective {j}" for j in range(len(meter.objectives))]
        self._objectives = [MeteredObjective(name, meter, j) for j, name in enumerate(names)]
        goals = [Goal(name, 0.0, 1.0) for name in names]
        start = self._unit(dict(self._known)["uniform soup"])
        facts = self._shape.facts(int(budget), arm.level)
        if not arm.coarse:
            facts = replace(facts, levels=facts.levels[1:])
        self._optimizer = make(arm.optimizer, dim, goals, seed, start, arm.options, facts)
        epochs = {
            "known": len(self._known),
            "evaluations": int(budget),
            "share": SHARE,
            "candidates": FEWEST_CANDIDATES,
        }
        rotates = arm.rotation and min(map(len, meter.positions)) >= WORTH_EPOCHS  # else the whole split is cheap
        self._schedule = Schedule(seed, RUNGS if arm.racing else (), epochs if rotates else {})
        self._items: dict[int, list[np.ndarray]] = {}
        self._rivals = Rivals(dict.fromkeys(names, True), self._items.__getitem__)
        self._matrix = ItemMatrix(self._items.__getitem__)
        self._sizes: dict[tuple[str, str], int] = {}
        self.candidates: list[Candidate] = []

    def _unit(self, x: Array) -> Array:
        """The point of the optimizer's cube of a point `(dim,)` of the whole cube that lies in the level."""
        return np.asarray(np.linalg.lstsq(self._ties, x, rcond=None)[0])

    def weights(self, x: Array) -> Array:
        """The weights of a point of the optimizer's cube, rounded as recipes are."""
        return np.round(self._shape.weights(np.clip(self._ties @ x, 0.0, 1.0)), 4)

    def step(self) -> bool:
        """Ask for one candidate, score it, tell it; False where nothing is left to ask for."""
        from evomerge.optimizers import Exhausted, Result

        number = len(self.candidates)
        known = number < len(self._known)
        try:
            x = self._unit(self._known[number][1]) if known else self._optimizer.ask(number)
        except Exhausted:
            return False
        weights = self.weights(x)
        values, stderr, items = self._scored(number, weights, known)
        if items is not None:
            self._items[number] = items
            self._rivals.add(number, values.tolist())
            self._matrix.add(number)
        self.candidates.append(Candidate(weights, x, values, stderr, items is not None, known))
        self._optimizer.tell(Result(number, x, values, stderr, items=items))
        return True

    def _scored(self, number: int, weights: Array, known: bool) -> tuple[Array, Array, list[np.ndarray] | None]:
        """Scores and errors `(m,)`, estimates where the candidate was stopped; and the items if it was not."""
        from evomerge.fidelity import Part
        from evomerge.worker import score_in_rungs

        part = self._schedule.part(number, to_the_end=known) or Part(self._seed, (1.0,))
        race = self._rivals.race(part, to_the_end=known)
        scores, stopped = score_in_rungs(self._objectives, weights, "search", race, self._sizes)  # type: ignore[arg-type]
        found = [scores[o.name] for o in self._objectives]
        values, stderr = np.array([s.value for s in found]), np.array([s.stderr for s in found])
        if stopped is None:
            return values, stderr, [np.asarray(s.items) for s in found]
        for j, objective in enumerate(self._objectives if self._arm.matrix else ()):
            better = self._matrix.estimate(j, found[j].items, stopped.positions[objective.name])
            if better is not None and better.stderr < stderr[j]:
                values[j], stderr[j] = better.value, better.stderr
        return values, stderr, None

    def recommended(self) -> list[Array]:
        """The weights that the optimizer recommends, best first."""
        from evomerge.optimizers import Recommends

        if not isinstance(self._optimizer, Recommends):
            return []
        return [self.weights(r.x) for r in self._optimizer.recommend()]

    def ranked(self) -> list[Candidate]:
        """The candidates scored in full by the mean of their posterior means, best first."""
        from evomerge.surrogate import nearness, posterior

        done = self.candidates
        x, y, e = (np.array([getattr(c, part) for c in done]) for part in ("x", "values", "stderr"))
        coarse = np.linalg.pinv(self._ties) @ self._shape.ties("model")
        ties = coarse if coarse.shape[1] < coarse.shape[0] else None
        shrunk = [posterior(x, y[:, j], e[:, j], 0.0, 1.0, ties=ties, focus=nearness(y))[0] for j in range(y.shape[1])]
        merit = np.mean(shrunk, axis=0)
        return [done[i] for i in np.argsort(-merit, kind="stable") if done[i].whole]

    # ---------------------------------------------------------------- what is handed over

    def best(self, allowance: float) -> Array:
        """The weights to hand over for a single objective, after at most `allowance` evaluations on fresh items."""
        ranked, recommended = self.ranked(), self.recommended()
        if not self._arm.guard:
            return recommended[0] if recommended else ranked[0].weights
        anchors = [c for c in ranked if c.known][:2]
        chosen = [*recommended, *(c.weights for c in anchors), *(c.weights for c in ranked if not c.known)]
        # n finalists cost at most n / 2 + 1.5 evaluations, with two known recipes that stay to the end.
        finalists = _distinct(chosen)[: int(np.clip(2 * allowance - 3, 2, MOST_FINALISTS))]
        return self._halved(finalists, {c.weights.tobytes() for c in anchors})

    def _halved(self, finalists: list[Array], known: set[bytes]) -> Array:
        """The winner of paired rounds on growing parts of the validation split, as in `evomerge.selection`.

        Half of them stay in each round, none that is clearly worse than the leader, and known recipes that are not; in
        the end the simplest within one standard error of the best.
        """
        positions = np.concatenate(self._meter.positions)
        order = positions[np.random.default_rng([self._seed, 77]).permutation(len(positions))]
        seen = [np.empty(0) for _ in finalists]
        alive = list(range(len(finalists)))
        for share in ROUNDS:
            for i in alive:
                new = order[len(seen[i]) : round(share * len(order))]
                seen[i] = np.append(seen[i], self._meter.items(finalists[i], "validation", new))
            alive.sort(key=lambda i: -float(seen[i].mean()))
            if share < 1.0:
                half = -(-len(alive) // 2)
                alive = [
                    i
                    for place, i in enumerate(alive)
                    if _lead(seen[i], seen[alive[0]], 1.96) >= 0.0 and (place < half or finalists[i].tobytes() in known)
                ]
        if not self._arm.simplest:
            return finalists[alive[0]]
        near = [i for i in alive if _lead(seen[i], seen[alive[0]], 1.0) >= 0.0]
        sizes = {i: complexity(finalists[i]) for i in near}
        return finalists[min(near, key=lambda i: (sizes[i], alive.index(i)))]

    def front(self, allowance: float) -> list[tuple[Array, Array]]:
        """Weights and scores of the non-dominated candidates scored in full, recommendations included."""
        from evomerge.front import non_dominated

        scored = [(c.weights, c.values) for c in self.candidates if c.whole]
        for weights in self.recommended()[: int(allowance)]:
            scored.append((weights, self._meter.values(weights)))
        mask = non_dominated(np.array([v for _, v in scored]))
        return [pair for pair, good in zip(scored, mask, strict=True) if good]


def allowance_at(checkpoint: float, arm: Evomerge, mode: str) -> float:
    """Evaluations that are kept for choosing, of `checkpoint` in all."""
    if mode == "front":
        return float(min(4.0, 0.1 * checkpoint))
    return float(min(MOST_FINALISTS / 2 + 1.5, 0.2 * checkpoint)) if arm.guard else 0.0


def run_evomerge(
    arm: Evomerge, landscape: Landscape, meter: Meter, seed: int, budget: float, checkpoints: Sequence[float], mode: str
) -> Iterator[tuple[float, Run, float]]:
    """(checkpoint, run so far, allowance) for each checkpoint; choosing does not change the run."""
    run = Run(arm, landscape, meter, seed, budget)
    left = [c for c in checkpoints if c <= budget]
    searched = 0.0  # evaluations of the search itself, those of choosing not counted
    going = True
    while left:
        allowance = allowance_at(left[0], arm, mode)
        if going and searched < left[0] - allowance:
            before = meter.spent
            going = run.step()
            searched += meter.spent - before
            continue
        yield left.pop(0), run, allowance


def complexity(weights: Array) -> int:
    """The number of different weights per expert, summed: what `evomerge.selection` counts in a recipe."""
    return sum(len(np.unique(own)) for own in weights)


def _lead(mine: Array, best: Array, z: float) -> float:
    """The upper end of a paired difference to the best, z standard errors above its mean."""
    difference = mine - best
    return float(difference.mean() + z * difference.std() / np.sqrt(len(difference)))


def _distinct(offered: Sequence[Array]) -> list[Array]:
    found: dict[bytes, Array] = {}
    for weights in offered:
        found.setdefault(np.round(weights, 4).tobytes(), weights)
    return list(found.values())


EVOMERGE: dict[str, Evomerge] = {
    "evomerge": Evomerge(),
    "evomerge, no rotation": Evomerge(rotation=False, most=240, modes=("one",)),
    "evomerge, straight to groups": Evomerge(coarse=False, most=240),
    "evomerge, to layers": Evomerge(options={"finest": "layers"}, most=240),
    "evomerge, no matrix": Evomerge(matrix=False, most=240, modes=("one",)),
    "evomerge, no racing": Evomerge(racing=False, most=240),
    "evomerge, no guard": Evomerge(guard=False, modes=("one",)),
    "evomerge, no simplicity rule": Evomerge(simplest=False, most=240, modes=("one",)),
    "map, model": Evomerge("map", level="model", most=240),
    "cma_es, model": Evomerge("cma_es", level="model", modes=("one",)),
    "cma_es, layers": Evomerge("cma_es", level="layers", modes=("one",)),
}
