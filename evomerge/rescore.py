"""What a study's candidates are worth: feasibility, front, merits, baselines; and scoring them on further splits.

The front and the merits are those of the search split. A split is scored once per candidate: the store is asked first,
and written at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType

import numpy as np

from evomerge import front
from evomerge.config import StudyConfig, parse_study
from evomerge.constraints import Constraint, floors, read_constraints, shortfalls
from evomerge.errors import ConfigError, EnvironmentProblem
from evomerge.objectives import Scores, make_objective
from evomerge.pool import Pool, make_pool
from evomerge.prepare import worker_spec
from evomerge.rounds import Rounds
from evomerge.search import oriented
from evomerge.study import Candidate, Study
from evomerge.weights import Checkpoint
from evomerge.worker import Failed, Job, Outcome

FEW = 30  # searched candidates, below which it says little of a space that none of them meets the constraints

Found = dict[int, dict[str, Scores]]


def study_config(study: Study, *, allow_task_code: bool = False) -> StudyConfig:
    """The configuration that the study was started with, from its own record.

    A database says what to read, never that its code may run: that is the user's to say each time.
    """
    stored = study.header.study_file
    overrides = tuple(stored["overrides"])
    return parse_study(stored["text"], stored["source"], overrides, allow_task_code=allow_task_code)


def eligible(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates with whole scores; of those with equal recipes the first."""
    unique: dict[str, Candidate] = {}
    for candidate in candidates:
        if candidate.values is not None and candidate.state == "done":
            unique.setdefault(candidate.fingerprint, candidate)
    return list(unique.values())


def table(study: Study, candidates: Sequence[Candidate]) -> np.ndarray:
    """(N, M) values on the search split, larger is better."""
    ups = list(study.header.objectives.values())
    return oriented(np.array([c.values for c in candidates], dtype=np.float64).reshape(-1, len(ups)), ups)


# -------------------------------------------------------------------- constraints


def constraints_of(study: Study) -> tuple[Constraint, ...]:
    """The study's constraints."""
    identity = study.header.identity
    texts, experts = identity.get("constraints", ()), identity.get("experts", ())
    return read_constraints(texts, study.header.objectives, experts, merged="merged" in identity)


def floors_of(study: Study, candidates: Sequence[Candidate]) -> np.ndarray:
    """(M,) smallest values that are allowed, larger is better; -inf where there is no limit."""
    known = {c.label: c.values or () for c in eligible(candidates) if c.label is not None}
    return floors(constraints_of(study), study.header.objectives, known)


def feasible(study: Study, candidates: Sequence[Candidate]) -> list[Candidate]:
    """The eligible candidates that meet every constraint on the search split."""
    done = eligible(candidates)
    if not done:
        return []
    mask = front.at_least(table(study, done), floors_of(study, candidates))
    return [c for c, good in zip(done, mask, strict=True) if good]


def nearest(study: Study, candidates: Sequence[Candidate]) -> tuple[Candidate, dict[str, float]] | None:
    """The candidate that misses the constraints least, and by how much it misses each, if none is feasible.

    Misses are added up after each is divided by its objective's range over all candidates.
    """
    done = eligible(candidates)
    if not done or feasible(study, candidates):
        return None
    values = table(study, done)
    missed = shortfalls(values, floors_of(study, candidates))
    spread = np.ptp(values, axis=0)
    least = int(np.argmin((missed / np.where(spread > 0, spread, 1.0)).sum(axis=1)))
    by_name = zip(study.header.objectives, missed[least].tolist(), strict=True)
    return done[least], {name: amount for name, amount in by_name if amount > 0}


def none_feasible(study: Study, candidates: Sequence[Candidate]) -> str | None:
    """What to say if no candidate meets the constraints; None if one does, or nothing has scores."""
    found = nearest(study, candidates)
    if found is None:
        return None
    candidate, missed = found
    values = dict(zip(study.header.objectives, candidate.values or (), strict=True))
    texts = {c.objective: [] for c in constraints_of(study)}  # type: dict[str, list[str]]
    for c in constraints_of(study):
        texts[c.objective].append(f"`{c.text}`")
    said = "; ".join(
        f"{name} is {values[name]:.4f}, {amount:.4f} short of {' and '.join(texts[name])}"
        for name, amount in missed.items()
    )
    label = f" ({candidate.label})" if candidate.label else ""
    searched = sum(c.label is None and c.state != "running" for c in candidates)
    if searched < FEW:  # nobody knows yet what the space holds
        ran = f"only {searched} searched candidate{'s' * (searched != 1)}" if searched else "no searched candidate"
        beside = " beside the known recipes" if any(c.label is not None for c in candidates) else ""
        hint = f"{ran.capitalize()} ran{beside}: raise the budget, or relax the constraint by so much"
    else:
        hint = "Relax the constraint by so much, widen the space, or search on with a larger budget"
    return (
        f"no candidate of {len(eligible(candidates))} meets the constraints; candidate {candidate.number}{label} comes "
        f"nearest: {said}. {hint}"
    )


def broken_limits(study: Study, candidates: Sequence[Candidate], chosen: Candidate, split: str) -> list[str]:
    """Constraints that a candidate misses on a further split, as far as its and the references' scores are stored."""

    def values(number: int) -> list[float] | None:
        scores = study.scores(number, split)
        return None if scores is None else [scores[name].value for name in study.header.objectives]

    own = values(chosen.number)
    limits = constraints_of(study)
    if own is None or not limits:
        return []
    known = {c.label: found for c in eligible(candidates) if c.label and (found := values(c.number)) is not None}
    ups = study.header.objectives
    said = []
    for limit in limits:
        missed = shortfalls(oriented(own, list(ups.values())), floors([limit], ups, known)).max()
        if missed > 0:
            said.append(f"on the {split} split candidate {chosen.number} misses `{limit.text}` by {missed:.4f}")
    return said


# -------------------------------------------------------------------- front and merit


def front_of(study: Study, candidates: Sequence[Candidate]) -> list[Candidate]:
    """The non-dominated of the feasible candidates on the search split, best first in the first objective.

    Of candidates with equal recipes only the first counts.
    """
    done = feasible(study, candidates)
    if not done:
        return []
    values = table(study, done)
    mask = front.non_dominated(values)
    order = sorted(np.flatnonzero(mask), key=lambda i: (-values[i][0], done[i].number))
    return [done[i] for i in order]


def weights_of(study: Study, candidates: Sequence[Candidate]) -> np.ndarray:
    """(M,) by which values are multiplied and summed to one merit, larger is better.

    It is the mean over objectives, each scaled to its range over the front of the search split, so that none
    outweighs the others by its unit. An objective without a range there has the range over all candidates.
    """
    ups = list(study.header.objectives.values())
    everybody = eligible(candidates)
    ranges = []
    for group in (front_of(study, candidates) or everybody, everybody):
        ranges.append(np.ptp(np.array([c.values for c in group], dtype=np.float64), axis=0))
    spread = np.where(ranges[0] > 0, ranges[0], ranges[1])
    return oriented(1.0 / np.where(spread > 0, spread, 1.0) / len(ups), ups)


def merits(study: Study, candidates: Sequence[Candidate]) -> dict[int, float]:
    """The merit (`weights_of`) of every eligible candidate on the search split, by number."""
    done = eligible(candidates)
    if not done:
        return {}
    weights = weights_of(study, candidates)
    return {c.number: float(np.dot(c.values or (), weights)) for c in done}


def baselines(study: Study, candidates: Sequence[Candidate]) -> dict[str, Candidate]:
    """What a search has to beat: "best expert" and "best standard recipe" (the base and all recipes without genes).

    Best in merit on the search split, among those that are feasible. A kind of which none is feasible is left out.
    """
    experts = set(study.header.identity.get("experts", ()))
    merit = merits(study, candidates)
    found: dict[str, Candidate] = {}
    for c in sorted(feasible(study, candidates), key=lambda c: (-merit[c.number], c.number)):
        if c.label is not None:
            found.setdefault("best expert" if c.label in experts else "best standard recipe", c)
    return found


def best_known(study: Study, candidates: Sequence[Candidate]) -> Candidate | None:
    """The better of the baselines in merit on the search split; None if no known recipe is feasible."""
    merit = merits(study, candidates)
    known = baselines(study, candidates).values()
    return max(known, key=lambda c: (merit[c.number], -c.number), default=None)


def remarks(study: Study, candidates: Sequence[Candidate]) -> list[str]:
    """What makes a study's choices worth less than they look: objectives that tell nothing, limits that do not hold."""
    done = eligible(candidates)
    found = []
    if len(done) > 1:
        searched = [c for c in candidates if c.label is None and c.state in ("done", "stopped")]
        for j, name in enumerate(study.header.objectives):
            values = {(c.values or ())[j] for c in done}
            if all(_without_error(c, j) for c in done):  # known recipes of one base are all as deep as that
                values |= {c.estimate[j] for c in searched if c.estimate is not None}
                if not searched:
                    continue
            if len(values) == 1:
                found.append(
                    f"objective {name} was {values.pop():.4f} for all {len(done)} candidates: it chose nothing; "
                    "give it more items or leave it out"
                )
    known = {c.label for c in done if c.label is not None}
    for constraint in constraints_of(study) if done else ():
        if constraint.labels and not known.intersection(constraint.labels):
            found.append(f"the constraint `{constraint.text}` has no effect: its reference has no scores")
    return found


def _without_error(candidate: Candidate, j: int) -> bool:
    """Whether the value of objective j is a count and no measurement, such as a depth."""
    return candidate.stderr is not None and candidate.stderr[j] == 0.0


# -------------------------------------------------------------------- further splits


def splits_of(config: StudyConfig) -> tuple[str, ...]:
    """The splits that every objective of the study has."""
    per_objective = [set(make_objective(o).splits) for o in config.objectives]
    return tuple(s for s in ("search", "validation", "test") if all(s in p for p in per_objective))


class Scorer:
    """Scores finished candidates of one study on further splits. Use as a context manager.

    Workers are started when the first model has to be scored, and serve until the end.

    Args:
        config: from `study_config`.
        inline: score in this process.
    """

    def __init__(self, study: Study, config: StudyConfig, *, inline: bool = False) -> None:
        self.study, self.config = study, config
        self._inline = inline
        self._pool: Pool | None = None
        self._rounds: Rounds | None = None

    def __enter__(self) -> Scorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.close()

    @property
    def rounds(self) -> Rounds:
        """The parts in which the validation split is scored."""
        if self._rounds is None:
            made = [make_objective(o) for o in self.config.objectives]
            self._rounds = Rounds.of(made, self.study.header.identity.get("seed", 0))
        return self._rounds

    def score(
        self,
        candidates: Iterable[Candidate],
        split: str,
        *,
        failures: dict[int, str] | None = None,
        on_score: Callable[[int, int], None] = lambda done, total: None,
    ) -> Found:
        """Scores of candidates on a split, or on a round of the validation split, by number; what is stored is read.

        Args:
            failures: where to put the reasons of candidates that cannot be scored; absent: they raise.
            on_score: told how many of how many models are scored, after each.

        Raises:
            ConfigError: an objective has no such split.
            EnvironmentProblem: the weights have changed since, or a model could not be scored.
        """
        found: Found = {}
        missing: dict[int, Candidate] = {}
        for candidate in candidates:
            stored = self.study.scores(candidate.number, split)
            if stored is None:
                missing[candidate.number] = candidate
            else:
                found[candidate.number] = stored
        if not missing:
            return found
        if split.partition(":")[0] not in splits_of(self.config):
            raise ConfigError(f"the study's objectives have no {split} split")
        jobs: list[Job] = []
        held: dict[int, tuple[str, dict[str, Scores]] | None] = {}
        for candidate in missing.values():
            whole, job, held[candidate.number] = self._job(candidate, split)
            if whole is not None:
                found[candidate.number] = self._keep(candidate.number, split, whole)
            else:
                jobs.append(job)
        for done, result in enumerate(self.run(jobs), start=1):
            on_score(done, len(jobs))
            if isinstance(result, Outcome):
                scores = result.scores[split.partition(":")[0]]
                if (before := held[result.number]) is not None:
                    scores = self.rounds.joined(before, scores, split)
                found[result.number] = self._keep(result.number, split, scores)
                continue
            message = f"candidate {result.number} has no {split} score ({result.reason}): {result.message}"
            if failures is None:
                raise EnvironmentProblem(message)
            failures[result.number] = message
        return found

    def run(self, jobs: Sequence[Job]) -> Iterator[Outcome | Failed]:
        """Evaluate jobs on the study's workers; results in the order in which they come.

        Raises:
            EnvironmentProblem: the weights or the objectives have changed since the study was searched.
        """
        if not jobs:
            return
        if self._pool is None:
            require_same_inputs(self.study, self.config)
            # The time allowed was meant for a candidate on the search split; other splits are larger.
            spec = replace(worker_spec(self.config, threads=self.study.header.threads), allowed_s=None)
            self._pool = make_pool(spec, inline=self._inline, **self.config.workers.pool_options(len(jobs)))
        for job in jobs:
            self._pool.submit(job)
        waiting = len(jobs)
        while waiting:
            for result in self._pool.wait(timeout_s=1.0):
                waiting -= 1
                yield result

    def _job(
        self, candidate: Candidate, split: str
    ) -> tuple[dict[str, Scores] | None, Job, tuple[str, dict[str, Scores]] | None]:
        """What a candidate still needs: scores that can be read off stored ones, or a job and what it adds to."""
        size_then = candidate.attrs.get("batch_tokens")  # the last bits of a score depend on it
        name = split.partition(":")[0]
        job = Job(candidate.number, candidate.recipe, (name,), batch_tokens=size_then)
        if name != "validation" or len(self.rounds.names) == 1:
            return None, job, None
        if split != name and (whole := self.study.scores(candidate.number, name)) is not None:
            return self.rounds.part_of(whole, split), job, None
        start, held = 0, None
        for index, earlier in enumerate(self.rounds.names[: self.rounds.names.index(split)]):
            stored = self.study.scores(candidate.number, earlier)
            if stored is not None:
                start, held = index + 1, (earlier, stored)
        parts = self.rounds.parts[start : self.rounds.names.index(split) + 1]
        return None, replace(job, parts=parts), held

    def _keep(self, number: int, split: str, scores: dict[str, Scores]) -> dict[str, Scores]:
        """Store scores; those of another process that was faster are the ones that count."""
        if self.study.add_scores(number, split, scores):
            return scores
        return self.study.scores(number, split) or scores


def require_same_inputs(study: Study, config: StudyConfig) -> None:
    """Raise unless weights and objectives are those that the study was searched with."""
    identity = study.header.identity
    for label, path in config.models.items():
        if Checkpoint(path).digest() != identity["weights"][label]:
            raise EnvironmentProblem(
                f"the checkpoint {path} ({label}) has changed since the study was searched",
                hint="scores of other weights do not belong in this study",
            )
    for spec in config.objectives:
        if make_objective(spec).fingerprint() != identity["objectives"].get(spec.name):
            raise EnvironmentProblem(f"the objective {spec.name} has changed since the study was searched")
