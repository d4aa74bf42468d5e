"""Objective kind `weakest_link`: the worst of several objectives, so that no skill is paid for with another.

"Law of the Weakest Link: Cross Capabilities of Large Language Models": a model is about as good at what needs several
skills as at the weakest of these. An average hides it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from evomerge import registry
from evomerge.errors import Problem
from evomerge.objectives import ObjectiveSpec, Scores
from evomerge.objectives._nested import (
    common_splits,
    fit_inner,
    inner_problems,
    inner_specs,
    make_inner,
    observe_inner,
    references_of,
)
from evomerge.objectives._options import WeakestLinkOptions, read_options

if TYPE_CHECKING:
    from evomerge.model import LiveModel, Outline


class WeakestLinkObjective:
    """The worst score of several objectives, or a soft form of it.

    Options: `of` (two or more objectives, as in the study file; all better in one direction, and in units that can be
    compared), `temperature` (in the unit of the scores; absent: the plain minimum).

    With K scores s_k and the temperature t the value is -t log(mean_k exp(-s_k / t)): between their minimum (t near 0)
    and their mean (t large). Where smaller scores are better it is the same of -s_k, negated: a (soft) maximum.
    The standard error is by the delta method, with the objectives' own errors taken as independent; that of the
    plain minimum is the weakest one's, which is on the safe side where several are nearly the weakest.

    An item is an item of one of the objectives: (its number, its columns, its values). In a part of the items, an
    objective that none of them is from is left out.

    Raises:
        ConfigError: an unknown or ill-typed option, of this objective or of an inner one.
    """

    def __init__(self, spec: ObjectiveSpec) -> None:
        self.spec = spec
        self.name = spec.name
        self._specs = inner_specs(spec)
        self.options = read_options(WeakestLinkOptions, {**spec.options, "of": self._specs}, f"objective {spec.name}")
        self.inner = make_inner(spec)

    @property
    def maximize(self) -> bool:
        """The inner objectives' direction."""
        return self.inner[0].maximize

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """The value at the inner objectives' bounds: it never falls when a score rises."""
        ends = []
        for side in (0, 1):
            found = [bound for o in self.inner if (bound := o.bounds[side]) is not None]
            ends.append(self._value(np.array(found))[0] if len(found) == len(self.inner) else None)
        return ends[0], ends[1]

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that all inner objectives have."""
        return common_splits(self.inner)

    @property
    def partial(self) -> bool:
        """Whether all inner objectives are."""
        return all(o.partial for o in self.inner)

    @property
    def references(self) -> tuple[str, ...]:
        """The models that inner objectives want to see."""
        return references_of(self.inner)

    def observe(self, reference: str, live: LiveModel, split: str) -> None:
        """Show a model to the inner objectives."""
        observe_inner(self.inner, reference, live, split)

    def check(self) -> list[Problem]:
        """The inner objectives, and that they have one direction."""
        problems = inner_problems(self.spec, self.inner)
        if not problems and len({o.maximize for o in self.inner}) > 1:
            said = ", ".join(f"{o.name} ({'larger' if o.maximize else 'smaller'} is better)" for o in self.inner)
            hint = "all objectives under `of:` must be better in one direction"
            problems.append(Problem(f"no weakest of {said}", f"objective {self.name}", hint))
        return problems

    def fit(self, outline: Outline) -> tuple[list[Problem], list[str]]:
        """What the inner objectives say of the base's tokenizer."""
        return fit_inner(self.inner, outline)

    def fingerprint(self) -> str:
        """Hash of the inner objectives and the temperature."""
        parts = [str(self.options.temperature), *(f"{o.name} {o.fingerprint()}" for o in self.inner)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def size(self, split: str) -> int:
        """The number of items of all inner objectives."""
        return sum(o.size(split) for o in self.inner)

    def score(self, live: LiveModel, split: str, positions: Sequence[int] | None = None) -> Scores:
        """items: (N, 2 + m) inner objective's number, number of value columns (0: one plain value), values."""
        found: list[tuple[int, Scores]] = []
        start = 0
        for index, objective in enumerate(self.inner):
            n = objective.size(split)
            own = None if positions is None else [i - start for i in positions if start <= i < start + n]
            if own is None or own:
                found.append((index, objective.score(live, split, own)))
            start += n
        rows = [_rows(index, scores.items) for index, scores in found]
        width = max(r.shape[1] for r in rows)
        items = np.concatenate([np.pad(r, ((0, 0), (0, width - r.shape[1]))) for r in rows])
        return self._combined([scores for _, scores in found], items)

    def aggregate(self, items: np.ndarray) -> Scores:
        """The weakest of the inner objectives' aggregates of their items."""
        found = []
        for index, objective in enumerate(self.inner):
            own = items[items[:, 0] == index]
            if len(own):
                columns = int(own[0, 1])
                found.append(objective.aggregate(own[:, 2 : 2 + columns] if columns else own[:, 2]))
        return self._combined(found, items)

    def _combined(self, scores: Sequence[Scores], items: np.ndarray) -> Scores:
        value, weights = self._value(np.array([s.value for s in scores]))
        errors = np.array([s.stderr for s in scores])
        return Scores(value, float(np.sqrt(np.sum((weights * errors) ** 2))), items)

    def _value(self, scores: np.ndarray) -> tuple[float, np.ndarray]:
        """The (soft) worst of scores (K,), and its derivatives (K,)."""
        losses = -scores if self.maximize else scores
        worst = float(losses.max())
        t = self.options.temperature
        if t is None:
            weights = np.zeros(len(losses))
            weights[int(losses.argmax())] = 1.0
            soft = worst
        else:
            powers = np.exp((losses - worst) / t)
            weights = powers / powers.sum()
            soft = worst + t * float(np.log(powers.mean()))
        return -soft if self.maximize else soft, weights


def _rows(index: int, items: np.ndarray) -> np.ndarray:
    values = items if items.ndim == 2 else items[:, None]
    head = np.tile([float(index), 0.0 if items.ndim == 1 else float(items.shape[1])], (len(items), 1))
    return np.concatenate([head, values], axis=1)


registry.register("objectives", "weakest_link", WeakestLinkObjective)
