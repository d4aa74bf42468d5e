"""What every optimizer is: goals, results, the ask/tell protocol, and `make`.

An optimizer's state is a pure function of the sequence of results that it was told. A resumed search replays
that sequence and never asks again, so `ask` may not change anything that a later `ask` depends on, and it
draws from `rng_for(seed, number)` only. Nothing here knows recipes, genes or the study: points are numpy
vectors in the unit cube, and values are larger-is-better.

Two methods are required (`ask`, `tell`), one is optional: `recommend`, for optimizers that know points which are better
than the best result seen (a surrogate's optimum, a distribution's mean). What a search knows of its space beyond the
dimension comes as `Facts` to those classes that have a keyword `facts`; it is no option that a person sets.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from evomerge import registry
from evomerge.errors import ConfigError, Problem

Array = NDArray[np.float64]
FACTS = "facts"


@dataclass(frozen=True)
class Goal:
    """One objective as an optimizer sees it: a name and, where they exist, the bounds of its values.

    Values are larger-is-better, so an objective to be minimised arrives with its sign changed, and its
    bounds with it. Two bounds switch the surrogate to a logit link, one to a softplus link.
    """

    name: str
    lower: float | None = None
    upper: float | None = None


@dataclass(frozen=True, eq=False)
class Result:
    """The outcome of candidate `number`.

    `x` is its point `(d,)` in the unit cube, or None where the recipe lies outside the space. `values` `(m,)`
    are larger-is-better, or None where the candidate failed. `stderr` `(m,)` holds the standard errors
    of the values; NaN or None where unknown. `floors` `(m,)` are the constraints as they are known at this moment: a
    result with a value below its floor is infeasible; -inf, or None for all, where there is no constraint.
    `items` are the results of single items, one array `(n_j,)` per goal, or None.
    """

    number: int
    x: Array | None
    values: Array | None
    stderr: Array | None = None
    floors: Array | None = None
    items: Sequence[Array] | None = None


@dataclass(frozen=True, eq=False)
class Level:
    """A coarser space inside the cube: x = clip(origin + matrix @ z) for z in its own unit cube [0, 1]^k.

    Attributes:
        matrix: (d, k).
        origin: (d,).
    """

    name: str
    matrix: Array
    origin: Array

    @property
    def dim(self) -> int:
        """The number of dimensions k of the level."""
        return int(self.matrix.shape[1])

    def embed(self, z: Array) -> Array:
        """Return the point `(d,)` of the whole cube, or `(n, d)` for `(n, k)`."""
        return np.clip(self.origin + np.asarray(z, dtype=np.float64) @ self.matrix.T, 0.0, 1.0)

    def project(self, x: Array, tolerance: float = 1e-3) -> Array | None:
        """Return the level's point `(k,)` of a point of the cube, or None if it is not in the level.

        `tolerance` covers the rounding of recipes to 4 decimals.
        """
        z = np.clip(self._inverse @ (x - self.origin), 0.0, 1.0)
        return z if bool((np.abs(self.embed(z) - x) <= tolerance).all()) else None

    @cached_property
    def _inverse(self) -> Array:
        # Once per level, not per point: 0.9 s for 960 dimensions.
        return np.asarray(np.linalg.pinv(self.matrix), dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Facts:
    """What a search knows of its cube, its budget and its workers.

    Attributes:
        cells: (d,) of how many equal cells a coordinate consists; 0 where it is continuous.
        categorical: (d,) whether the cells have no order.
        zero: (d,) the point of the unmerged base; None if the cube does not hold it.
        experts: (d,) index of the expert that a coordinate weighs; -1 for one that concerns all.
        levels: nested spaces, coarse to fine; the last is the whole cube.
        workers: parallel evaluations.
        evaluations: how many candidates the search may ask for in all; None if time ends it.
        parts: coordinates that mean something together only, such as an edit of a layer path (its kind, place and
            length) or one position of it; each coordinate is in at most one part. A part whose first coordinate is in
            the same cell as `neutral`'s changes nothing, whatever its others are. () where there are none.
        neutral: (d,) the point where no part changes anything (the identity path); None without parts.
        meaning: what a point stands for, such as its layer path: points that agree in it are one candidate. None if
            only points that agree in all coordinates are.
    """

    cells: NDArray[np.intp]
    categorical: NDArray[np.bool_]
    zero: Array | None
    experts: NDArray[np.intp]
    levels: tuple[Level, ...]
    workers: int = 1
    evaluations: int | None = None
    parts: tuple[tuple[int, ...], ...] = ()
    neutral: Array | None = None
    meaning: Callable[[Array], Hashable] | None = None

    @classmethod
    def plain(cls, dim: int, workers: int = 1, evaluations: int | None = None) -> Facts:
        """Return the facts of a continuous cube of which nothing else is known."""
        whole = Level("whole", np.eye(dim), np.zeros(dim))
        minus = np.full(dim, -1, dtype=np.intp)
        return cls(
            np.zeros(dim, dtype=np.intp), np.zeros(dim, dtype=np.bool_), None, minus, (whole,), workers, evaluations
        )


@dataclass(frozen=True, eq=False)
class Recommendation:
    """A point worth scoring in full before the winner is chosen, and why: "surrogate optimum", "mean of CMA-ES"."""

    x: Array
    why: str


class Exhausted(Exception):
    """Raised by `ask`: there is nothing left to propose. Its message says why, for people."""


@runtime_checkable
class Optimizer(Protocol):
    """Ask for points, tell results."""

    def ask(self, number: int, pending: Sequence[Array] = ()) -> Array:
        """Return the point `(d,)` in [0, 1]^d for candidate `number`; `pending` are points still running.

        Raises:
            Exhausted: there is nothing left to propose.
        """

    def tell(self, result: Result) -> None:
        """Take one result, in the study's order; failed and out-of-space results are welcome."""


@runtime_checkable
class Recommends(Protocol):
    """An optimizer that knows more than the best result seen."""

    def recommend(self) -> Sequence[Recommendation]:
        """Return points, best first, that the results so far make the best; changes nothing. Empty if none is known."""


@runtime_checkable
class Describes(Protocol):
    """An optimizer that can say where it stands."""

    def describe(self) -> str:
        """Return in one line, for people, what has been searched so far."""


def violation(values: Array, floors: Array | None) -> float:
    """Return by how much values `(m,)` miss their floors, summed; 0 if feasible."""
    if floors is None:
        return 0.0
    missing = np.where(np.isfinite(floors), floors - values, 0.0)
    return float(np.maximum(missing, 0.0).sum())


def rng_for(seed: int, number: int) -> np.random.Generator:
    """Return the one generator that `ask(number)` may draw from."""
    return np.random.default_rng([seed, number])


def usable(result: Result, dim: int, n_goals: int) -> tuple[Array, Array, Array] | None:
    """Return private copies of (x, values, stderr), or None if there is nothing to learn from.

    Failed results, results outside the space and non-finite values give None; unknown errors become NaN.

    Raises:
        ValueError: x or values have the wrong length (a bug of the caller, not of a candidate).
    """
    if result.x is None or result.values is None:
        return None
    x = np.array(result.x, dtype=np.float64)
    values = np.array(result.values, dtype=np.float64)
    if x.shape != (dim,) or values.shape != (n_goals,):
        raise ValueError(
            f"tell(candidate {result.number}): x {x.shape} and values {values.shape} do not fit "
            f"an optimizer with {dim} dimensions and {n_goals} goals"
        )
    if not (np.isfinite(x).all() and np.isfinite(values).all()):
        return None
    stderr = np.full(n_goals, np.nan)
    if result.stderr is not None:
        given = np.asarray(result.stderr, dtype=np.float64)
        if given.shape == (n_goals,):
            stderr = np.where(np.isfinite(given) & (given >= 0), given, np.nan)
    return np.clip(x, 0.0, 1.0), values, stderr


def check_number(
    name: str,
    value: object,
    low: float,
    high: float = math.inf,
    *,
    whole: bool = False,
    above: bool = False,
) -> None:
    """Raise ConfigError unless the option is a number in [low, high] (`above`: in (low, high])."""
    right_type = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if isinstance(value, (int, float)) and right_type and low <= value <= high and not (above and value == low):
        return
    expected = ("a whole number" if whole else "a number") + (f" above {low:g}" if above else f" from {low:g}")
    expected += f" to {high:g}" if math.isfinite(high) else " on"
    problem = Problem(f"{name} is {value!r}", where=f"optimizer.{name}", hint=f"{expected}")
    raise ConfigError.of([problem], "the optimizer's options")


def make(
    name: str,
    dim: int,
    goals: Sequence[Goal],
    seed: int,
    start: Array,
    options: Mapping[str, Any] | None = None,
    facts: Facts | None = None,
) -> Optimizer:
    """Return the optimizer registered as `name`.

    `start` `(d,)` is a sensible point to begin from (unit cube). The options are the keyword-only parameters of
    the optimizer's class, `facts` excepted, which are passed on to classes that have such a parameter.

    Raises:
        ConfigError: unknown optimizer, unknown option, or an option's value out of range.
        ValueError: no dimension, no goal, a negative seed, or a start of the wrong shape.
    """
    start = np.array(start, dtype=np.float64)
    if dim < 1 or not goals or seed < 0 or start.shape != (dim,):
        raise ValueError(
            f"make({name!r}): need dim >= 1, goals, seed >= 0 and a start of shape (dim,); got "
            f"dim={dim}, {len(goals)} goals, seed={seed}, start {start.shape}"
        )
    factory: Callable[..., Optimizer] = registry.get("optimizers", name)
    known = option_defaults(factory)
    problems = []
    for key in options or {}:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known) or 'none'}"
            problems.append(Problem(f"{name} has no option {key!r}", f"optimizer.{key}", hint))
    if problems:
        raise ConfigError.of(problems, "the optimizer's options")
    start = np.clip(start, 0.0, 1.0)
    given = dict(options or {})
    if FACTS in inspect.signature(factory).parameters:
        given[FACTS] = facts or Facts.plain(dim)
    return factory(dim, tuple(goals), seed, start, **given)


def option_defaults(factory: Callable[..., Any]) -> dict[str, Any]:
    """Return the options of an optimizer with their defaults: its keyword-only parameters."""
    parameters = inspect.signature(factory).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name != FACTS}
