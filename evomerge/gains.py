"""How much of a candidate's gain survives on items that did not choose it: the report of a study.

The gain is the lead over the best known recipe, on the same items, with its paired interval. The search split
flatters the winner, since it was picked there among many; the test split, which picked nothing, does not. Everything
here is read from stored scores: nothing is scored, and nothing is chosen by test scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.intervals import Interval, leads
from evomerge.objectives import SPLITS, Scores
from evomerge.rescore import eligible, weights_of
from evomerge.study import Candidate, Study

MEAN = "mean, scaled"  # over objectives, each scaled as for the choice of the winner


@dataclass(frozen=True)
class Row:
    """One objective, or the mean of all.

    Attributes:
        gains: split -> lead over the baseline, positive where the candidate is better, whatever the direction.
        optimism: how much better the search split makes the candidate look than the test split; None if not known.
    """

    name: str
    gains: dict[str, Interval]
    optimism: float | None

    @property
    def survived(self) -> float | None:
        """The gain on test as a share of the gain on search; None unless that one is separated from zero."""
        search, test = self.gains.get("search"), self.gains.get("test")
        if search is None or test is None or not search.low > 0:
            return None
        return test.value / search.value

    def __str__(self) -> str:
        parts = [f"{split} {signed(gain)}" for split, gain in self.gains.items()]
        if self.survived is not None:
            parts.append(f"{self.survived:.0%} of the search gain survived")
        if self.optimism is not None:
            parts.append(f"optimism {self.optimism:+.4f}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Report:
    """A candidate against the best known recipe.

    Attributes:
        rows: one per objective, and one for their mean if there are several.
    """

    candidate: Candidate
    baseline: Candidate
    rows: tuple[Row, ...]

    @property
    def is_baseline(self) -> bool:
        """True if nothing was gained: the candidate is the best known recipe."""
        return self.candidate.fingerprint == self.baseline.fingerprint

    def lines(self) -> list[str]:
        """The report for a terminal."""
        if self.is_baseline:
            return [
                f"candidate {self.candidate.number} is itself the best known recipe on search: {self.baseline.label}"
            ]
        head = f"gain of candidate {self.candidate.number} over the best known recipe on search, {self.named_baseline}:"
        return [head, *(f"  {row.name}: {row}" for row in self.rows)]

    @property
    def named_baseline(self) -> str:
        """Label and number."""
        return f"{self.baseline.label} (candidate {self.baseline.number})"


def best_known(study: Study, candidates: Sequence[Candidate]) -> Candidate | None:
    """The known recipe with the best merit on the search split; None if no known recipe has scores."""
    known = [c for c in eligible(candidates) if c.label is not None]
    if not known:
        return None
    weights = weights_of(study, candidates)
    return max(known, key=lambda c: (float(np.dot(c.values or (), weights)), -c.number))


def report(study: Study, candidates: Sequence[Candidate], candidate: Candidate) -> Report | None:
    """The candidate's gains on every split on which it and the best known recipe are scored.

    None if there is no known recipe to compare with.
    """
    baseline = best_known(study, candidates)
    if baseline is None:
        return None
    ours, theirs = _stored(study, candidate), _stored(study, baseline)
    splits = [s for s in SPLITS if s in ours and s in theirs]
    ups = list(study.header.objectives.values())
    weighted = {name: np.eye(len(ups))[i] * (1 if ups[i] else -1) for i, name in enumerate(study.header.objectives)}
    if len(ups) > 1:
        weighted[MEAN] = weights_of(study, candidates)
    rows = []
    for name, weights in weighted.items():
        # Objectives of weight 0 are left out: an interval is as wide as the least of those that count.
        used = [j for j, w in enumerate(weights) if w]
        gains = {
            split: leads([[ours[split][j] for j in used]], [theirs[split][j] for j in used], weights[used])[0]
            for split in splits
        }
        optimism = None
        if "test" in ours:
            pairs = zip(ours["search"], ours["test"], weights, strict=True)
            optimism = float(sum(w * (search.value - test.value) for search, test, w in pairs))
        rows.append(Row(name, gains, optimism))
    return Report(candidate, baseline, tuple(rows))


def signed(gain: Interval) -> str:
    """ "+0.0310 [-0.0020, +0.0640]": a difference always shows its sign."""
    if np.isnan(gain.low):
        return f"{gain.value:+.4f}"
    return f"{gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"


def _stored(study: Study, candidate: Candidate) -> dict[str, list[Scores]]:
    """split -> one score per objective, in the study's order, for the splits that are stored."""
    found = {}
    for split in SPLITS:
        scores = study.scores(candidate.number, split)
        if scores is not None:
            found[split] = [scores[name] for name in study.header.objectives]
    return found
