"""From the candidates that may be the best on the search split to one winner, by the validation split.

The best of many noisy scores is too good to be true. So the search split only names finalists, by posterior means;
fresh items choose among them, in rounds; and of those that are as good as the best, the simplest wins. The test split
never influences a choice here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evomerge.config import StudyConfig
from evomerge.errors import ConfigError, EnvironmentProblem
from evomerge.history import oriented
from evomerge.intervals import Z95, is_share, leads
from evomerge.objectives import Scores
from evomerge.path_space import is_path_spec
from evomerge.recipe import Conditional, Recipe
from evomerge.rescore import (
    Found,
    Scorer,
    baselines,
    eligible,
    feasible,
    none_feasible,
    splits_of,
    weights_of,
)
from evomerge.rounds import NAMES, WHOLE
from evomerge.study import Candidate, Study
from evomerge.surrogate import nearness, posterior

PROVISIONAL = (
    "for now (nothing is scored on validation) the best posterior merit; `evomerge front --split test` chooses"
)
CONTENDERS = 16  # so many tied candidates, at most, go on: each costs a pass over a part of the validation split
RECOMMENDED = 8  # and so many that an optimizer recommended
STEP = 32  # candidates compared with the best at once

Fetch = Callable[[Sequence[Candidate], str], Found]


class NotStored(Exception):
    """More has to be scored before the winner is known."""


@dataclass
class _Course:
    """A selection under way: what everybody is judged by, and what is worth telling."""

    study: Study
    weights: np.ndarray
    prior: Mapping[int, float]
    notes: list[str] = field(default_factory=list)

    def merit(self, scores: Mapping[str, Scores]) -> float:
        return float(np.dot([scores[name].value for name in self.study.header.objectives], self.weights))

    def items(self, scores: Mapping[str, Scores]) -> list[Scores]:
        return [scores[name] for name in self.study.header.objectives]


def winner(
    study: Study,
    config: StudyConfig,
    candidates: Sequence[Candidate],
    *,
    inline: bool = False,
    scorer: Scorer | None = None,
) -> tuple[Candidate, list[str]]:
    """The winner, and notes on how it was chosen; what is not stored yet is scored. See docs/front.md.

    A candidate that cannot be scored on validation is left out, with a note. Without validation splits the search
    scores decide.

    Raises:
        ConfigError: there is no candidate to choose from, or none meets the constraints.
    """
    found = finalists(study, candidates)
    if not found.candidates:
        message = none_feasible(study, candidates)
        raise ConfigError(message or f"the study {study.name!r} has no candidate to choose from yet")
    try:
        return _select(study, candidates, found, _stored_rounds(study, found.candidates), _stored(study))
    except NotStored:
        pass
    if WHOLE not in splits_of(config):
        said = "there is no validation split: the search scores, which are optimistic, decide"
        return found.candidates[0], [found.note, said]
    failures: dict[int, str] = {}
    own = scorer or Scorer(study, config, inline=inline)
    try:

        def fetch(group: Sequence[Candidate], name: str) -> Found:
            return own.score(group, name, failures=failures)

        rounds = _stored_rounds(study, found.candidates, own.rounds.names)
        chosen, notes = _select(study, candidates, found, rounds, fetch)
    except NotStored:
        why = next(iter(failures.values()), "")
        raise EnvironmentProblem(
            f"none of the {len(found.candidates)} finalists has validation scores: {why}"
        ) from None
    finally:
        if scorer is None:
            own.__exit__(None, None, None)
    return chosen, [*notes, *failures.values()]


def stored_winner(study: Study, candidates: Sequence[Candidate]) -> tuple[Candidate, str] | None:
    """What `winner` would answer from stored scores alone, and how it was chosen; None if more has to be scored.

    If nothing was ever scored on validation, it is the best on search.
    """
    found = finalists(study, candidates)
    if not found.candidates:
        return None
    rounds = _stored_rounds(study, found.candidates)
    if not rounds:
        return found.candidates[0], PROVISIONAL
    try:
        chosen, notes = _select(study, candidates, found, rounds, _stored(study))
    except NotStored:
        return None
    return chosen, f"the best on validation; {'; '.join(notes)}"


# -------------------------------------------------------------------- who goes on


@dataclass(frozen=True)
class Finalists:
    """Who is scored on validation, best first by posterior merit on search; and why, for people."""

    candidates: list[Candidate]
    prior: dict[int, float]
    note: str


def finalists(study: Study, candidates: Sequence[Candidate]) -> Finalists:
    """The feasible candidates that are worth scoring on fresh items.

    Those tied at the top of the search split (`contenders`), at most CONTENDERS; those that the optimizer or `propose`
    recommended; and the baselines, so that the winner is known to be better than what needs no search.
    """
    prior = posterior_merits(study, candidates)
    tied = contenders(study, candidates, prior)
    chosen = {c.number: c for c in tied[:CONTENDERS]}
    able = sorted(feasible(study, candidates), key=lambda c: (-prior[c.number], c.number))
    advised = [c for c in able if c.attrs.get("source") and c.number not in chosen][:RECOMMENDED]
    known = {**baselines(study, candidates), "base": next((c for c in able if c.label == "base"), None)}
    anchors = {c.number: c for c in known.values() if c is not None and c.number not in chosen}
    anchors = {n: c for n, c in anchors.items() if n not in {a.number for a in advised}}
    note = _tied_note(len(tied))
    if advised or anchors:
        parts = [f"{len(advised)} recommended"] if advised else []
        parts += [f"{len(anchors)} known recipes"] if anchors else []
        note += f"; with {' and '.join(parts)} {len(chosen) + len(advised) + len(anchors)} went on to validation"
    everybody = [*chosen.values(), *advised, *anchors.values()]
    if anchors or advised:
        everybody[1:] = sorted(everybody[1:], key=lambda c: (-prior[c.number], c.number))
    return Finalists(everybody, prior, note)


def contenders(
    study: Study, candidates: Sequence[Candidate], prior: Mapping[int, float] | None = None
) -> list[Candidate]:
    """The feasible candidates that are statistically tied at the top of the search split, best first; all of them.

    The best is the one with the largest posterior merit (`posterior_merits`). A candidate is tied with it unless the
    95 % paired bootstrap interval of their difference in merit says that it is worse. Points off the front count too:
    what dominates them by less than the noise may be worse.
    """
    done = feasible(study, candidates)
    if not done:
        return []
    prior = posterior_merits(study, candidates) if prior is None else prior
    weights = weights_of(study, candidates)
    merit = {c.number: float(np.dot(c.values or (), weights)) for c in done}
    best = min(done, key=lambda c: (-prior[c.number], -merit[c.number], c.number))
    rest = sorted((c for c in done if c is not best), key=lambda c: (-merit[c.number], c.number))
    reference = _search_items(study, best)
    tied = []
    for start in range(0, len(rest), STEP):
        group = rest[start : start + STEP]
        found = leads([_search_items(study, c) for c in group], reference, weights)
        near = [
            c
            for c, lead in zip(group, found, strict=True)
            if (lead.value >= 0 if math.isnan(lead.high) else lead.high >= 0)
        ]
        if not near:  # merits only fall from here
            break
        tied += near
    return [best, *sorted(tied, key=lambda c: (-prior[c.number], -merit[c.number], c.number))]


def posterior_merits(study: Study, candidates: Sequence[Candidate]) -> dict[int, float]:
    """The merit of every eligible candidate with its values shrunk towards a surrogate of all results, by number.

    The luck of one score is not shared by its neighbours (`surrogate.posterior`). Candidates that were stopped early
    inform the surrogate; recipes outside the space keep their own values, and so do all layer orders: neighbours in
    their genes may do quite different things. Genes are scaled to their range over the candidates, those that span a
    factor of 100 by their logarithm, and choices become one column each: the stored rows suffice, so that looking at a
    study reads no models. Genes that nested spaces tie together keep one scale, and the surrogate knows them as parts
    of one coordinate.
    """
    done = eligible(candidates)
    if not done:
        return {}
    weights = weights_of(study, candidates)
    shrunk = {c.number: np.array(c.values, dtype=np.float64) for c in done}
    smooth = not is_path_spec(study.header.identity.get("space"))
    told = [c for c in candidates if smooth and c.params and (c.number in shrunk or c.estimate is not None)]
    if told:
        x, ties = _points([c.params or {} for c in told], study.header.coarse)
        values = np.array([c.values or c.estimate for c in told], dtype=np.float64)
        errors = np.array([c.stderr or c.estimate_stderr for c in told], dtype=np.float64)
        ends = _bounds(study, done[0])
        ups = list(study.header.objectives.values())
        good = oriented(values, ups)
        focus = nearness(good)
        for j in range(values.shape[1] if x.shape[1] else 0):
            low, high = ends[j] if ups[j] else tuple(None if end is None else -end for end in reversed(ends[j]))
            means, _ = posterior(x, good[:, j], errors[:, j], low, high, ties=ties, focus=focus)
            for c, mean in zip(told, means, strict=True):
                if c.number in shrunk:
                    shrunk[c.number][j] = mean if ups[j] else -mean
    return {number: float(np.dot(values, weights)) for number, values in shrunk.items()}


def _points(rows: Sequence[Mapping[str, Any]], coarse: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray | None]:
    """(N, d) points in the unit cube, and (d, k) which column is part of which coarser one; None if each is its own.

    Genes that never vary, nor those tied to them, have no column.
    """
    numbers: dict[str, np.ndarray] = {}
    columns: dict[Any, list[np.ndarray]] = {}  # by the coordinate that they are part of
    for name in rows[0]:
        cells = [row.get(name) for row in rows]
        if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in cells):
            numbers[name] = np.array(cells, dtype=np.float64)
        else:
            kinds = sorted({str(v) for v in cells})
            columns |= {(name, kind): [np.array([float(str(v) == kind) for v in cells])] for kind in kinds[1:]}
    groups: dict[Any, list[np.ndarray]] = {}
    for name, own in numbers.items():
        groups.setdefault(coarse.get(name, name), []).append(own)
    for key, members in groups.items():
        table = np.stack(members)
        if table.min() > 0 and table.max() >= 100 * table.min():
            table = np.log(table)
        if np.ptp(table) > 0:
            columns[key] = list((table - table.min()) / np.ptp(table))
    if not columns:
        return np.empty((len(rows), 0)), None
    sizes = [len(members) for members in columns.values()]
    ties = np.repeat(np.eye(len(sizes)), sizes, axis=0) if max(sizes) > 1 else None
    return np.stack([own for members in columns.values() for own in members], axis=1), ties


def _bounds(study: Study, candidate: Candidate) -> list[tuple[float | None, float | None]]:
    """Per objective 0 and 1 for shares, which is all that the items show."""
    return [(0.0, 1.0) if is_share(s) else (None, None) for s in _search_items(study, candidate)]


# -------------------------------------------------------------------- rounds


def _select(
    study: Study, candidates: Sequence[Candidate], found: Finalists, rounds: Sequence[str], fetch: Fetch
) -> tuple[Candidate, list[str]]:
    """Paired successive halving over the rounds, then the one-standard-error rule among those that are left."""
    if not rounds:
        raise NotStored
    course = _Course(study, weights_of(study, candidates), found.prior, [found.note])
    left, counts = found.candidates, [len(found.candidates)]
    scores: Found = {}
    for name in rounds:
        scores = fetch(left, name)
        left = [c for c in left if c.number in scores]
        if not left:
            raise NotStored
        if name != WHOLE:
            left = _survivors(course, left, scores)
            counts.append(len(left))
    if len(counts) > 1:
        course.notes.append(f"{', '.join(map(str, counts))} of them were scored in the rounds on validation")
    return _simplest(course, left, scores), course.notes


def _survivors(course: _Course, left: Sequence[Candidate], scores: Found) -> list[Candidate]:
    """Those that go on to the next round: not clearly worse than the leader, and at most half.

    Known recipes only leave when they are clearly worse: the last rule prefers them among equals.
    """
    merit = {c.number: course.merit(scores[c.number]) for c in left}
    ranked = sorted(left, key=lambda c: (-merit[c.number], -course.prior[c.number], c.number))
    items = [course.items(scores[c.number]) for c in ranked]
    ahead = leads(items[1:], items[0], course.weights) if len(ranked) > 1 else []
    stay = [ranked[0], *(c for c, lead in zip(ranked[1:], ahead, strict=True) if not lead.high < 0)]
    half = {c.number for c in ranked[: -(-len(ranked) // 2)]}
    return [c for c in stay if c.number in half or c.label is not None]


def _simplest(course: _Course, left: Sequence[Candidate], scores: Found) -> Candidate:
    """Of the candidates within one standard error of the best merit, the simplest; of equally simple ones the best.

    The error is that of the paired difference to the best one (the one-standard-error rule: Breiman et al. 1984).
    """
    merit = {c.number: course.merit(scores[c.number]) for c in left}
    known = {c.number: c.label is not None for c in left}
    order = {c.number: (0.0 if known[c.number] else -course.prior[c.number], c.number) for c in left}
    ranked = sorted(left, key=lambda c: (-merit[c.number], not known[c.number], order[c.number]))
    best, *rest = ranked
    items = [course.items(scores[c.number]) for c in ranked]
    near = [best]
    for c, lead in zip(rest, leads(items[1:], items[0], course.weights) if rest else [], strict=True):
        error = 0.0 if math.isnan(lead.low) else (lead.high - lead.low) / (2 * Z95)
        near += [c] if -lead.value <= error else []
    sizes = {c.number: complexity(c.recipe) for c in near}
    chosen = min(near, key=lambda c: (sizes[c.number], ranked.index(c)))
    if chosen is not best:
        course.notes.append(
            f"candidate {best.number} is best on validation, and candidate {chosen.number} within one standard error "
            f"of it and simpler ({sizes[chosen.number]} settings, not {sizes[best.number]})"
        )
    return chosen


def complexity(recipe: Recipe) -> int:
    """The number of settings in a recipe: each model's different values of each parameter.

    So it tells levels apart and not points of one level: with one weight per expert it is the number of experts,
    whatever the weights are; groups of layers and components add to it. The values of a curve over depth count one by
    one. Of a layer order each run of layers counts, and each scale.
    """
    found: set[tuple[str, str, Any]] = set()
    if recipe.method == "passthrough":
        found |= {("", "layers", index) for index in range(len(recipe.slices))}

    def add(owner: str, name: str, value: Any) -> None:
        if isinstance(value, Conditional):
            add(owner, name, value.value)
        elif isinstance(value, tuple):
            for each in value:
                add(owner, name, each)
        else:
            found.add((owner, name, value))

    for name, value in recipe.parameters:
        add("", name, value)
    for piece in recipe.slices:
        for name, value in piece.parameters:
            add("", name, value)
        for source in piece.sources:
            for name, value in source.parameters:
                add(source.model, name, value)
    return len(found)


def _stored_rounds(study: Study, group: Sequence[Candidate], planned: Sequence[str] = ()) -> tuple[str, ...]:
    """The rounds that were begun, or `planned`, or, where everybody has the whole split, that alone; else none."""
    for index, name in enumerate(NAMES[:-1]):
        if any(study.scores(c.number, name) is not None for c in group):
            return NAMES[index:]
    held = [study.scores(c.number, WHOLE) is not None for c in group]
    if all(held):
        return (WHOLE,)
    return tuple(planned) or ((WHOLE,) if any(held) else ())


def _stored(study: Study) -> Fetch:
    def fetch(group: Sequence[Candidate], name: str) -> Found:
        found: Found = {}
        for c in group:
            scores = study.scores(c.number, name)
            if scores is None:
                raise NotStored
            found[c.number] = scores
        return found

    return fetch


def _tied_note(count: int) -> str:
    if count == 1:
        return "no other candidate is statistically tied with the best on search"
    scored = f"; the {CONTENDERS} best of them went on to validation" if count > CONTENDERS else ""
    return f"{count} candidates are statistically tied at the top on search{scored}"


def _search_items(study: Study, candidate: Candidate) -> list[Scores]:
    """One score per objective, in the study's order."""
    scores = study.scores(candidate.number, "search")
    if scores is None:
        raise EnvironmentProblem(f"the study {study.name!r} holds no items of candidate {candidate.number}")
    return [scores[name] for name in study.header.objectives]
