"""Small studies with made-up scores, for tests of what is read from a study."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evomerge.objectives import Scores, mean_scores
from evomerge.recipe import Recipe
from evomerge.study import Header, Study

N = 200
_folder = tempfile.TemporaryDirectory()  # one database for all: making its tables takes longer than a test
_count = itertools.count()


def right(count: int, first: int = 0) -> Scores:
    """Accuracy of a model that answers `count` of N items, from the item `first` on."""
    return mean_scores(np.roll(np.arange(N) < count, first).astype(float))


def recipe(weight: float, *others: float) -> Recipe:
    """Task arithmetic of up to three experts."""
    names = ("red", "green", "blue")
    return Recipe.build(
        "task_arithmetic", "base", {n: {"weight": w} for n, w in zip(names, (weight, *others), strict=False)}
    )


def empty_study(header: Header) -> Study:
    """A new study."""
    return Study.create(f"sqlite:///{_folder.name}/small.db", f"small-{next(_count)}", header)


def study_of(
    search: Sequence[Scores | Sequence[Scores]],
    validation: Sequence[Scores | None] = (),
    *,
    labels: Mapping[int, str] | None = None,
    sources: Mapping[int, str] | None = None,
    recipes: Mapping[int, Recipe] | None = None,
    params: Sequence[Mapping[str, float]] = (),
    objectives: Mapping[str, bool] | None = None,
    identity: Mapping[str, Any] | None = None,
) -> Study:
    """A study of candidates with these scores; one objective, `acc`, unless others are named."""
    ups = dict(objectives or {"acc": True})
    made = empty_study(Header(dict(identity or {}), ups))
    for number, scores in enumerate(search):
        own = dict(params[number]) if params else None
        domains = {name: (0.0, 1.0, False) for name in own or {}}
        made_of = (recipes or {}).get(number, recipe(0.01 * number))
        made.propose(made_of, own, domains, (labels or {}).get(number), (sources or {}).get(number))
        by_name = dict(zip(ups, [scores] if isinstance(scores, Scores) else scores, strict=True))
        made.finish(number, {"search": by_name}, number, {})
    for number, held_out in enumerate(validation):
        if held_out is not None:
            made.add_scores(number, "validation", {"acc": held_out})
    return made
