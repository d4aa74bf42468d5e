"""Which fully scored candidates the next one has to beat, and what it must reach: from a study's results to a race."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from evomerge.fidelity import Part, count_at, item_order
from evomerge.front import non_dominated
from evomerge.limits import Limits, Terms, Whole, hopes_of
from evomerge.racing import MOST_BYTES, MOST_RIVALS, Race, Rival, weightings

Array = NDArray[np.float64]


class Rivals:
    """The fully scored candidates of a study, and which of them the next candidate has to beat.

    A single objective has one rival, the incumbent. Of a front, first come the best of each weighting, those of most
    weightings before others, then those with the best mean over objectives, each scaled to its range over the
    front; at most `MOST_RIVALS`, and fewer where their items would exceed `MOST_BYTES` per job. A weighting whose best
    does not travel is raced against the best that does.

    Args:
        objectives: name -> whether larger is better.
        load: number -> the items of every objective, in the split's order.
        terms: which objectives are scored whole, and what counts as hope.
    """

    def __init__(
        self, objectives: Mapping[str, bool], load: Callable[[int], Sequence[Array]], terms: Terms | None = None
    ) -> None:
        self._objectives, self._load, self._terms = dict(objectives), load, terms or Terms()
        self._values: dict[int, tuple[float, ...]] = {}
        self._stderr: dict[int, tuple[float, ...]] = {}
        self._made: dict[tuple[int, Part], Rival] = {}

    def add(self, number: int, values: Sequence[float], stderr: Sequence[float] | None = None) -> None:
        """A candidate was scored in full.

        Args:
            values: in the objectives' own directions.
            stderr: of the values; needed where an objective is scored whole or says what guessing gives.
        """
        self._values[number] = tuple(values)
        self._stderr[number] = tuple(stderr or ())

    def race(self, part: Part, *, to_the_end: bool = False, floors: Array | None = None) -> Race:
        """How the next candidate is scored.

        Args:
            part: the order of its items, its rungs and its gate.
            to_the_end: score it in full whatever comes, though in the same parts as any other, so that the same
                items share a batch.
            floors: (M,) the least that constraints allow, larger is better; -inf or None for anything.
        """
        if to_the_end or len(part.rungs) == 1 or not self._values:
            return Race(part.seed, part.rungs)
        limits, able = self._limits(floors)
        numbers, low, span = self._chosen(able)
        self._made = {(n, part): self._made.get((n, part)) or self._make(n, part) for n in numbers}
        rivals: list[Rival] = []
        room = MOST_BYTES
        for rival in self._made.values():
            room -= sum(array.nbytes for array in rival.items)
            if rivals and room < 0:
                break
            rivals.append(rival)
        ups = tuple(self._objectives.values())
        scaled = (tuple(low.tolist()), tuple(span.tolist())) if limits.settled else ((), ())
        return Race(part.seed, part.rungs, tuple(rivals), ups, *scaled, part.gate, limits)

    def _limits(self, floors: Array | None) -> tuple[Limits, Collection[int]]:
        """What the next candidate must reach, and the candidates that meet the floors; all of them if none does.

        Hope is counted among those that meet the floors: the best of the others is no choice, however much it knows.
        """
        ups = list(self._objectives.values())
        if floors is None or not np.isfinite(floors).any():
            return Limits(hopes=self._hopes(self._values), settled=True), self._values
        signs = np.where(ups, 1.0, -1.0)
        every = np.array(list(self._values.values())) * signs
        able = [n for n, values in zip(self._values, every, strict=True) if (values >= floors).all()]
        own = tuple(float(f) if np.isfinite(f) else None for f in floors * signs)
        return Limits(own, self._hopes(able), bool(able)), able or self._values

    def _hopes(self, able: Collection[int]) -> tuple[float | None, ...]:
        """The least of hope from these candidates; empty for no such rule, as where there are none."""
        if not able:
            return ()
        names, ups = list(self._objectives), list(self._objectives.values())
        errors = np.array([self._stderr[n] or (0.0,) * len(ups) for n in able])
        return hopes_of(np.array([self._values[n] for n in able]), errors, names, ups, self._terms)

    def _chosen(self, able: Collection[int]) -> tuple[list[int], Array, Array]:
        """Numbers of the rivals among `able`, best first; their front's worst values and its ranges."""
        numbers = np.array(sorted(able))
        signs = np.where(list(self._objectives.values()), 1.0, -1.0)
        values = np.array([self._values[n] for n in numbers.tolist()]) * signs
        every = np.array(list(self._values.values())) * signs
        mask = non_dominated(values)
        numbers, values = numbers[mask], values[mask]
        span = np.where(np.ptp(values, axis=0) > 0.0, np.ptp(values, axis=0), np.ptp(every, axis=0))
        span = np.where(span > 0.0, span, 1.0)
        low = values.min(axis=0)
        scaled = (values - low) / span
        shares = np.array(weightings(len(signs)))
        smallest = np.where(shares > 0.0, scaled[:, None] / np.where(shares > 0.0, shares, 1.0), np.inf).min(axis=2)
        bests = np.r_[(scaled @ shares.T).argmax(axis=0), smallest.argmax(axis=0)]
        wins = np.bincount(bests, minlength=len(values))
        most = MOST_RIVALS if len(signs) > 1 else 1
        order = np.lexsort((-scaled.mean(axis=1), -wins))[:most]
        return [int(n) for n in numbers[order]], low, span

    def _make(self, number: int, part: Part) -> Rival:
        last = part.rungs[-2]
        items, scales, spreads = [], [], []
        whole: dict[int, Whole] = {}
        for j, (name, every) in enumerate(zip(self._objectives, self._load(number), strict=True)):
            if name in self._terms.whole:
                whole[j] = Whole(self._values[number][j], self._stderr[number][j], len(every))
                items.append(np.empty(0))
                scales.append(1.0)
                spreads.append(float(every.std()))
                continue
            order = item_order(part.seed, name, len(every))
            items.append(every[order[: count_at(len(every), last)]])
            scale = float(every[:, 1].mean()) if every.ndim == 2 else 1.0
            scales.append(scale)
            spreads.append(float((every[:, 0] / scale if every.ndim == 2 else every).std()))
        return Rival(number, tuple(items), self._values[number], tuple(scales), tuple(spreads), whole)
