"""Picking one point of a study's front, and how sure the front is: by preference, floor, knee or weakest link.

A pick looks at the scores of the search split, whatever split is shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from evomerge import front
from evomerge.errors import ConfigError, Problem
from evomerge.intervals import Z95, resampled
from evomerge.rescore import eligible, feasible, front_of, table
from evomerge.search import oriented
from evomerge.study import Candidate, Study


@dataclass(frozen=True)
class Pick:
    """Which point of the front is wanted.

    Attributes:
        prefer: objective -> weight; those that are not named weigh nothing.
        at_least: objective -> the worst value that will do, in its own unit.
        knee, weakest_link: the two picks that need no numbers; at most one of them and `prefer`.
    """

    prefer: Mapping[str, float] = field(default_factory=dict)
    at_least: Mapping[str, float] = field(default_factory=dict)
    knee: bool = False
    weakest_link: bool = False

    def __bool__(self) -> bool:
        return bool(self.prefer or self.at_least or self.knee or self.weakest_link)

    def __str__(self) -> str:
        parts = [f"preferred {_numbers(self.prefer)}"] if self.prefer else []
        parts += ["weakest link"] if self.weakest_link else []
        parts += ["knee"] if self.knee or not parts else []
        parts += [f"at least {_numbers(self.at_least)}"] if self.at_least else []
        return ", ".join(parts)


def read_pick(
    study: Study, prefer: str = "", at_least: str = "", *, knee: bool = False, weakest_link: bool = False
) -> Pick:
    """Read the options of `front` and `propose`: "math=0.7,code=0.3".

    Raises:
        ConfigError: with every problem.
    """
    problems: list[Problem] = []
    names = list(study.header.objectives)
    wanted = _read(prefer, names, "--prefer", problems)
    floors = _read(at_least, names, "--at-least", problems)
    if wanted and (min(wanted.values()) < 0 or sum(wanted.values()) <= 0):
        problems.append(Problem(f"{prefer!r}: weights are numbers from 0 on, not all zero", "--prefer"))
    if bool(wanted) + knee + weakest_link > 1:
        problems.append(Problem("--prefer, --knee and --weakest-link are three ways to pick: give one"))
    if problems:
        raise ConfigError.of(problems, "the options")
    return Pick(wanted, floors, knee, weakest_link)


def picked(study: Study, candidates: Sequence[Candidate], pick: Pick) -> Candidate | None:
    """The point of the front that is wanted; None if the front is empty.

    Raises:
        ConfigError: no point of the front reaches the floors.
    """
    points = front_of(study, candidates)
    if not points:
        return None
    values = table(study, points)
    mask = front.at_least(values, floors_of_pick(study, pick))
    if not mask.any():
        ends = []
        for name, floor in pick.at_least.items():
            j = list(study.header.objectives).index(name)
            best = points[int(np.argmax(values[:, j]))]
            ends.append(f"the best {name} is {(best.values or ())[j]:.4f} (candidate {best.number}), not {floor:g}")
        raise ConfigError(
            f"none of the {len(points)} front points is at least {_numbers(pick.at_least)}: {'; '.join(ends)}",
            hint="lower --at-least, or ask `evomerge propose` for a recipe between the points",
        )
    left = [point for point, good in zip(points, mask, strict=True) if good]
    values = values[mask]
    if pick.prefer:
        return left[front.weighted(values, [pick.prefer.get(name, 0.0) for name in study.header.objectives])]
    if pick.weakest_link:
        return left[front.weakest_link(values, _start(study, candidates))]
    return left[front.knee(values)]


def floors_of_pick(study: Study, pick: Pick) -> np.ndarray:
    """(M,) of `--at-least`, larger is better; -inf where there is none."""
    floors = np.full(len(study.header.objectives), -np.inf)
    for j, (name, up) in enumerate(study.header.objectives.items()):
        if name in pick.at_least:
            floors[j] = oriented([pick.at_least[name]], [up])[0]
    return floors


def memberships(study: Study, candidates: Sequence[Candidate]) -> dict[str, float]:
    """How sure it is that each recipe is on the front, by fingerprint: see `front.membership`.

    Candidates that are clearly dominated, or not feasible, have 0 and take no part: they change nothing.
    """
    found = {c.fingerprint: 0.0 for c in eligible(candidates)}
    able = feasible(study, candidates)
    if not able:
        return found
    values = table(study, able)
    near = np.flatnonzero(front.hopeful(values, np.array([c.stderr for c in able], dtype=np.float64)))
    scores = [study.scores(able[i].number, "search") or {} for i in near]
    ups = study.header.objectives
    drawn = np.stack(
        [resampled([s[name] for s in scores]) * (1.0 if up else -1.0) for name, up in ups.items()],
        axis=2,
    )
    shares = front.membership(drawn)
    return found | {able[i].fingerprint: float(share) for i, share in zip(near, shares, strict=True)}


def could_be_on_front(study: Study, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates that were stopped early, of which the upper ends of all estimates' intervals are not dominated."""
    seen = {c.fingerprint for c in eligible(candidates)}
    points = table(study, front_of(study, candidates))
    ups = list(study.header.objectives.values())
    found = []
    for c in candidates:
        if c.estimate is None or c.estimate_stderr is None or c.fingerprint in seen:
            continue
        if c.attrs.get("stop_rule") == "infeasible":
            continue
        best = oriented(c.estimate, ups) + Z95 * np.array(c.estimate_stderr)
        if not ((points >= best).all(axis=1) & (points > best).any(axis=1)).any():
            found.append(c)
        seen.add(c.fingerprint)
    return found


def hypervolume_line(study: Study, candidates: Sequence[Candidate]) -> str | None:
    """The front's hypervolume and what it is measured from; None without known recipes."""
    anchors = [c for c in eligible(candidates) if c.label is not None]
    reference = front.reference_of(table(study, anchors)) if anchors else None
    points = front_of(study, candidates)
    if reference is None or not points:
        return None
    found = front.volume(table(study, points), reference, study.header.identity.get("seed", 0))
    ends = oriented(reference, list(study.header.objectives.values()))
    said = ", ".join(f"{name} {value:.4f}" for name, value in zip(study.header.objectives, ends, strict=True))
    return f"hypervolume {found} above the worst of the known recipes in each objective: {said}"


def _start(study: Study, candidates: Sequence[Candidate]) -> np.ndarray:
    """(M,) what gains are counted from: the base, or else the worst of the known recipes, or of the front."""
    done = eligible(candidates)
    base = [c for c in done if c.label == "base"]
    anchors = [c for c in done if c.label is not None]
    found = front.reference_of(table(study, base or anchors or front_of(study, candidates)))
    assert found is not None
    return found


def _read(text: str, names: Sequence[str], option: str, problems: list[Problem]) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, number = (p.strip() for p in part.partition("="))
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if name not in names:
            problems.append(Problem(f"there is no objective {name!r}", option, f"there are {', '.join(names)}"))
        elif not math.isfinite(value):
            problems.append(Problem(f"{part!r} is no NAME=NUMBER", option, f"as in {option} {names[0]}=0.7"))
        elif name in found:
            problems.append(Problem(f"{name} is given twice", option))
        else:
            found[name] = value
    if text and not text.strip(" ,"):
        problems.append(Problem("nothing is given", option, f"as in {option} {names[0]}=0.7"))
    return found


def _numbers(values: Mapping[str, float]) -> str:
    return " ".join(f"{name}={value:g}" for name, value in values.items())
