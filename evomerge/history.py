"""What a search knows from its study: which recipes are scored, whom to beat, which constraints hold, what to tell.

Everything here is rebuilt from the study's candidates, in the order in which they ended.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from evomerge.estimator import ItemMatrix
from evomerge.events import Event
from evomerge.fidelity import Schedule
from evomerge.limits import Terms
from evomerge.objectives import Scores
from evomerge.optimizers import Recommendation, Result
from evomerge.racing import Race
from evomerge.rivals import Rivals
from evomerge.space import Natural
from evomerge.spaces import Space
from evomerge.study import Candidate, Study
from evomerge.worker import Outcome

ALIKE = 0.02  # of a range: a recommendation so near an earlier one in every coordinate is the same wish
Floors = Callable[[Mapping[str, Sequence[float]]], np.ndarray | None]


class History:
    """The ended candidates of a study, as its search needs them.

    Args:
        floors: from the values of the labelled candidates known so far, in the objectives' own directions, to the
            least (M,) that a candidate must reach, larger is better; None without constraints.
        wants_items: whether results carry the items of single candidates.

    Attributes:
        finished: fingerprint -> the first candidate with that recipe, or the first that was scored in full.
        failures_in_a_row: at the end of the study.
        recommended: (dim,) points that optimizers recommended, and that have scores.
        wishes: why they were recommended.
        copies_in_a_row: candidates whose recipe was known already, at the end of the study.
    """

    def __init__(self, study: Study, space: Space, floors: Floors, *, wants_items: bool) -> None:
        header = study.header
        self.finished: dict[str, Candidate] = {}
        self.recommended: list[np.ndarray] = []
        self.wishes: set[str] = set()
        self.failures_in_a_row = 0
        self.copies_in_a_row = 0
        self._schedule = Schedule(header.identity.get("seed", 0), tuple(header.rungs), header.epochs)
        self._terms = Terms.of(header.terms)
        self._rivals = Rivals(header.objectives, study.items, self._terms)
        self._whole_scores: list[np.ndarray] = []  # (2, M): values and their variances
        self._matrix = ItemMatrix(study.items)
        self._study, self._space, self._wants_items = study, space, wants_items
        self._ups = list(header.objectives.values())
        self._labelled: dict[str, Sequence[float]] = {}
        self._floors_of = floors
        self._floors: np.ndarray | None = floors({})

    def add(self, candidate: Candidate) -> None:
        """Remember an ended candidate; later ones have to beat those that were scored in full."""
        self.failures_in_a_row = self.failures_in_a_row + 1 if candidate.state == "failed" else 0
        self.copies_in_a_row = self.copies_in_a_row + 1 if "same_as" in candidate.attrs else 0
        if candidate.source is not None and candidate.values is not None and candidate.params:
            self.recommended.append(self._space.encode(candidate.params))
            self.wishes.add(candidate.source)
        held = self.finished.get(candidate.fingerprint)
        if held is not None and (held.state != "stopped" or candidate.state != "done"):
            return
        self.finished[candidate.fingerprint] = candidate
        if candidate.values is None:
            return
        errors = np.nan_to_num(np.array(candidate.stderr or [0.0] * len(self._ups)))
        self._whole_scores.append(np.array([candidate.values, errors**2]))
        self._rivals.add(candidate.number, candidate.values, errors.tolist())
        self._matrix.add(candidate.number)
        if candidate.label is not None:
            self._labelled[candidate.label] = candidate.values
            self._floors = self._floors_of(self._labelled)

    @property
    def anything_done(self) -> bool:
        """Whether any candidate has scores."""
        return any(c.state == "done" for c in self.finished.values())

    def race(self, number: int, *, to_the_end: bool) -> Race | None:
        """On which items candidate `number` is scored, and whom it has to beat; None for all items at once.

        Args:
            to_the_end: score it in full whatever comes.
        """
        part = self._schedule.part(number, to_the_end=to_the_end)
        return None if part is None else self._rivals.race(part, to_the_end=to_the_end, floors=self._floors)

    def attrs(self, outcome: Outcome, *, to_the_end: bool) -> dict[str, Any]:
        """What is recorded of an outcome beside scores: its own attributes, and its epoch."""
        return outcome.attrs | self._schedule.attrs(outcome.number, to_the_end=to_the_end)

    def refined(self, outcome: Outcome) -> Mapping[str, Mapping[str, Scores]]:
        """The outcome's scores; the estimates of a stopped candidate by all earlier ones, where that is more precise.

        Of an objective of which it has no item (it was too deep to be scored at all) nothing is known but what
        candidates have: their mean, and how far one of them is from it. What comes back is stored, and never computed
        again.
        """
        if outcome.stopped is None:
            return outcome.scores
        refined = {}
        for index, name in enumerate(self._study.header.objectives):
            score = refined[name] = outcome.scores["search"][name]
            if name in self._terms.whole:
                continue
            if len(score.items) == 0:
                refined[name] = self._prior(index, score)
                continue
            found = self._matrix.estimate(index, score.items, outcome.stopped.positions[name])
            if found is not None and found.stderr < score.stderr:
                refined[name] = replace(score, value=found.value, stderr=found.stderr)
        return {**outcome.scores, "search": refined}

    def _prior(self, index: int, unknown: Scores) -> Scores:
        """An objective's mean over all candidates scored in full, and the deviation of a further one's score."""
        values, variances = np.array(self._whole_scores)[:, :, index].T
        deviation = float(np.sqrt(values.var() + variances.mean()))
        return replace(unknown, value=float(values.mean()), stderr=deviation)

    def result(self, candidate: Candidate) -> Result:
        """What the optimizer is told of an ended candidate."""
        # A stopped candidate counts with its estimate: leaving the beaten ones out would bias every ranking.
        values, stderr = candidate.values or candidate.estimate, candidate.stderr or candidate.estimate_stderr
        whole = candidate.values is not None and "same_as" not in candidate.attrs
        return Result(
            number=candidate.number,
            x=self._space.encode(candidate.params) if candidate.params else None,
            values=oriented(values, self._ups) if values is not None else None,
            stderr=np.array(stderr) if stderr is not None else None,
            floors=self._floors,
            items=self._items(candidate.number) if self._wants_items and whole else None,
        )

    def next_wish(
        self, offered: Sequence[Recommendation], points: Sequence[np.ndarray], wishes: Collection[str]
    ) -> tuple[dict[str, Natural], str] | None:
        """The first recommendation that has no whole score yet, as genes and its reason; None if there is none.

        A surrogate moves a little with each result: another wish comes before the same one again.

        Args:
            points, wishes: recommended points that are running, (dim,) each, and their reasons.
        """
        granted = self.wishes.union(wishes)
        for found in sorted(offered, key=lambda found: found.why in granted):
            params = self._space.decode(found.x)
            x = self._space.encode(params)
            if any(np.abs(x - other).max() < ALIKE for other in (*self.recommended, *points)):
                continue
            held = self.finished.get(self._space.recipe(params).fingerprint)
            if held is None or held.state == "stopped":
                return params, found.why
        return None

    def _items(self, number: int) -> list[np.ndarray]:
        """The items (N,) of each objective, larger is better; ratios (N, 2) as the ratio of each item."""
        found = []
        for items, up in zip(self._study.items(number), self._ups, strict=True):
            flat = items[:, 0] / items[:, 1] if items.ndim == 2 else items
            found.append(flat if up else -flat)
        return found


def event_of(candidate: Candidate, elapsed_s: float) -> Event:
    """What people are told of an ended candidate."""
    return Event(
        number=candidate.number,
        label=candidate.label,
        values=candidate.values,
        stderr=candidate.stderr,
        reason=candidate.reason,
        same_as=candidate.attrs.get("same_as"),
        elapsed_s=elapsed_s,
        stopped=candidate.stopped,
        source=candidate.source,
    )


def oriented(values: ArrayLike, maximize: Sequence[bool]) -> np.ndarray:
    """Values with larger-is-better signs. values: (M,) or (N, M)."""
    signs = np.where(np.asarray(maximize), 1.0, -1.0)
    return np.asarray(values, dtype=np.float64) * signs
