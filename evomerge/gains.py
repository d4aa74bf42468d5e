"""How much of a candidate's gain survives on items that did not choose it: the report of a study.

The gain is the lead over the best known recipe, on the same items, with its paired interval. The search split
flatters the winner, since it was picked there among many; the test split, which picked nothing, does not. There, the
candidate is tested against the best expert and the best standard recipe, and the first line says whether the search
added anything. Everything here is read from stored scores: nothing is scored, and nothing is chosen by test scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from evomerge.intervals import Interval, Test, holm, lead_test, leads
from evomerge.objectives import SPLITS, Scores
from evomerge.rescore import baselines, best_known, weights_of
from evomerge.study import Candidate, Study

__all__ = ["MEAN", "Comparison", "Report", "Row", "best_known", "report", "signed"]

MEAN = "mean, scaled"  # over objectives, each scaled as for the choice of the winner
LEVEL = 0.05  # of the tests of merit together


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
class Comparison:
    """One test on the test split, against one baseline in one objective or in the mean of all.

    Attributes:
        kind: "best expert" or "best standard recipe".
        p_value: corrected (Holm) over the report's tests of merit, or over those of objectives; NaN: cannot be tested.
    """

    kind: str
    baseline: Candidate
    name: str
    test: Test
    p_value: float

    @property
    def gained(self) -> bool:
        """Whether the candidate is better than the baseline, by more than chance explains."""
        return self.p_value <= LEVEL and self.test.lead.value > 0

    @property
    def named_baseline(self) -> str:
        """Label and number."""
        return f"{self.baseline.label} (candidate {self.baseline.number})"

    def __str__(self) -> str:
        if math.isnan(self.p_value):
            return f"{signed(self.test.lead)}, not tested"
        exact = ", exact McNemar" if self.test.method == "mcnemar" else ""
        return f"{signed(self.test.lead)}, p = {self.p_value:.2g}{exact}"


@dataclass(frozen=True)
class Report:
    """A candidate against the recipes that need no search.

    Attributes:
        baseline: the best known recipe on search.
        rows: one per objective, and one for their mean if there are several; against `baseline`.
        tests: on the test split, if it is scored; against the best expert and the best standard recipe.
    """

    candidate: Candidate
    baseline: Candidate
    rows: tuple[Row, ...]
    tests: tuple[Comparison, ...] = ()

    @property
    def is_baseline(self) -> bool:
        """True if nothing was gained: the candidate is the best known recipe."""
        return self.candidate.fingerprint == self.baseline.fingerprint

    @property
    def verdict(self) -> str | None:
        """Whether search added anything, in one sentence; None without scores on fresh items to tell it by."""
        ours = f"candidate {self.candidate.number}"
        if self.candidate.label is not None:
            if not self.rows[0].gains.keys() & {"validation", "test"}:
                return None  # the best on search so far: the search may still be running
            return f"search added nothing: {ours} is a known recipe, {self.candidate.label}"
        merit = [t for t in self.tests if t.name == self.rows[-1].name]
        own = [t for t in merit if t.baseline.number == self.baseline.number]
        if not own:
            return None
        # A gain is one over both: the baseline that looked worse on search may be the better one.
        decides = next((t for t in (*own, *merit) if not t.gained), own[0])
        lead, p_value, named = decides.test.lead, decides.p_value, decides.named_baseline
        said = signed(lead) + ("" if len(self.rows) == 1 else f" in the {MEAN.replace(',', ' of the')} objectives")
        p = f"p = {p_value:.2g}" + (f" after Holm's correction for {len(merit)} tests" if len(merit) > 1 else "")
        if decides.gained:
            return f"search gained something: on the test split {ours} leads {named} by {said}, {p}"
        if p_value <= LEVEL:
            return f"search added nothing: on the test split {ours} is worse than {named}, by {said}, {p}"
        told = "single numbers cannot be tested" if math.isnan(p_value) else p
        return f"search added nothing that the test split can tell: {ours} against {named} is {said}, {told}"

    def lines(self) -> list[str]:
        """The report for a terminal; the verdict comes first."""
        lines = [self.verdict] if self.verdict is not None else []
        if self.is_baseline:
            said = f"candidate {self.candidate.number} is itself the best known recipe on search: {self.baseline.label}"
            return [*lines, said]
        lines.append(f"gain of candidate {self.candidate.number} over the best known recipe on search, "
                     f"{self.named_baseline}:")  # fmt: skip
        lines += [f"  {row.name}: {row}" for row in self.rows]
        if self.tests:
            lines.append(f"tests on the test split ({self.corrected}):")
            lines += [f"  over the {t.kind}, {t.baseline.label}, {t.name}: {t}" for t in self.tests]
        return lines

    @property
    def named_baseline(self) -> str:
        """Label and number."""
        return f"{self.baseline.label} (candidate {self.baseline.number})"

    @property
    def corrected(self) -> str:
        """How the p-values were corrected."""
        merit = sum(t.name == self.rows[-1].name for t in self.tests)
        said = f"two-sided, paired, p-values corrected by Holm's method: over the {merit} of merit, which decide"
        return said + (f", and over the {len(self.tests) - merit} of objectives" if merit < len(self.tests) else "")


def report(study: Study, candidates: Sequence[Candidate], candidate: Candidate) -> Report | None:
    """The candidate's gains on every split on which it and the best known recipe are scored.

    None if there is no known recipe to compare with.
    """
    baseline = best_known(study, candidates)
    if baseline is None:
        return None
    ours, theirs = _stored(study, candidate), _stored(study, baseline)
    splits = [s for s in SPLITS if s in ours and s in theirs]
    weighted = _weights(study, candidates)
    rows = []
    for name, weights in weighted.items():
        gains = {split: leads([_used(ours[split], weights)], _used(theirs[split], weights), weights[weights != 0])[0]
                 for split in splits}  # fmt: skip
        optimism = None
        if "test" in ours:
            pairs = zip(ours["search"], ours["test"], weights, strict=True)
            optimism = float(sum(w * (search.value - test.value) for search, test, w in pairs))
        rows.append(Row(name, gains, optimism))
    return Report(candidate, baseline, tuple(rows), _tests(study, candidates, candidate, ours, weighted))


def _tests(
    study: Study,
    candidates: Sequence[Candidate],
    candidate: Candidate,
    ours: dict[str, list[Scores]],
    weighted: dict[str, np.ndarray],
) -> tuple[Comparison, ...]:
    """The candidate against each baseline that is scored on test and is another recipe, in every row.

    The tests of merit answer the question that was asked beforehand, whether the search gained anything; those of
    single objectives explain. So each kind is a family of its own.
    """
    found = []
    for kind, baseline in baselines(study, candidates).items():
        theirs = _stored(study, baseline).get("test")
        if "test" not in ours or theirs is None or baseline.fingerprint == candidate.fingerprint:
            continue
        for name, weights in weighted.items():
            test = lead_test(_used(ours["test"], weights), _used(theirs, weights), weights[weights != 0])
            found.append(Comparison(kind, baseline, name, test, test.p_value))
    merit = list(weighted)[-1]
    families = {decides: holm([c.p_value for c in found if (c.name == merit) is decides]) for decides in (True, False)}
    return tuple(replace(c, p_value=families[c.name == merit].pop(0)) for c in found)


def signed(gain: Interval) -> str:
    """ "+0.0310 [-0.0020, +0.0640]": a difference always shows its sign."""
    if np.isnan(gain.low):
        return f"{gain.value:+.4f}"
    return f"{gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"


def _weights(study: Study, candidates: Sequence[Candidate]) -> dict[str, np.ndarray]:
    """(M,) weights of each row of a report."""
    ups = list(study.header.objectives.values())
    weighted = {name: np.eye(len(ups))[i] * (1 if ups[i] else -1) for i, name in enumerate(study.header.objectives)}
    if len(ups) > 1:
        weighted[MEAN] = weights_of(study, candidates)
    return weighted


def _used(scores: Sequence[Scores], weights: np.ndarray) -> list[Scores]:
    """The scores that count: an interval is as wide as the least of them."""
    return [score for score, weight in zip(scores, weights, strict=True) if weight]


def _stored(study: Study, candidate: Candidate) -> dict[str, list[Scores]]:
    """split -> one score per objective, in the study's order, for the splits that are stored."""
    found = {}
    for split in SPLITS:
        scores = study.scores(candidate.number, split)
        if scores is not None:
            found[split] = [scores[name] for name in study.header.objectives]
    return found
