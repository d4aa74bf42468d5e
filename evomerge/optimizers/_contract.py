"""The contract of an optimizer, as a check that anybody can run on their own."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence

import numpy as np

from evomerge.optimizers._core import Array, Exhausted, Goal, Optimizer, Recommendation, Recommends, Result

MakeOptimizer = Callable[[int, Sequence[Goal], int, Array], Optimizer]
RESULTS = 28  # more than a generation of every built-in optimizer
GOALS = (Goal("a", 0.0, 1.0), Goal("b"))


def check_optimizer(make: MakeOptimizer, *, least_goals: int = 1) -> None:
    """Raise AssertionError unless what `make(dim, goals, seed, start)` returns keeps the contract.

    Checked for 1 and 3 dimensions with 1 and 2 goals (from `least_goals` on): points lie in the unit cube; equal
    histories give equal points, bit for bit, whatever was asked or recommended in between; failed, out-of-space,
    non-finite, constant, infeasible and repeated results are survived; results may arrive in any order; an
    optimizer proposes something before it is exhausted, says why it is, and stays so; recommended points lie in
    the cube and say why; nothing outside the optimizer changes (global random generators, the caller's
    arrays, the working directory).
    """
    files = set(os.listdir())
    python_state, numpy_state = random.getstate(), repr(np.random.get_state(legacy=False))
    for dim in (1, 3):
        for goals in (GOALS[:1], GOALS)[least_goals - 1 :]:
            _check_points(make, dim, goals)
            _check_replay(make, dim, goals)
            _check_survival(make, dim, goals)
            if dim > 1:
                _check_floors(make, dim, goals)
    assert random.getstate() == python_state, "the global generator of random was used"
    assert repr(np.random.get_state(legacy=False)) == numpy_state, "numpy's global generator was used"
    assert set(os.listdir()) == files, "files appeared in the working directory"


def _score(x: Array, n_goals: int) -> Array:
    """A smooth test problem with values in (0, 1)."""
    peaks = np.array([0.3, 0.7])[:n_goals]
    return np.array([np.exp(-((x - peak) ** 2).mean() * 4) for peak in peaks])


def _result(number: int, x: Array, n_goals: int, floors: Array | None = None) -> Result:
    return Result(number, x, _score(x, n_goals), np.full(n_goals, 0.02), floors)


def _ask(optimizer: Optimizer, number: int, pending: Sequence[Array] = ()) -> Array | None:
    """Return a valid point, or None if the optimizer is exhausted."""
    try:
        x = optimizer.ask(number, pending)
    except Exhausted as end:
        assert str(end), "exhausted, and does not say why"
        return None
    _assert_point(x)
    return x


def _assert_point(x: Array) -> None:
    assert isinstance(x, np.ndarray) and x.dtype == np.float64 and x.ndim == 1, x
    assert np.isfinite(x).all() and (x >= 0).all() and (x <= 1).all(), f"outside the cube: {x}"


def _recommended(optimizer: Optimizer, dim: int) -> list[Recommendation]:
    """Return the valid recommendations of an optimizer, as copies; none if it never recommends."""
    found = list(optimizer.recommend()) if isinstance(optimizer, Recommends) else []
    for one in found:
        _assert_point(one.x)
        assert one.x.shape == (dim,), one.x
        assert one.why, "a recommendation does not say why"
    copies = [Recommendation(one.x.copy(), one.why) for one in found]
    for one in found:
        one.x[:] = 0.123  # the caller owns what it was given
    return copies


def _check_points(make: MakeOptimizer, dim: int, goals: Sequence[Goal]) -> None:
    optimizer = make(dim, goals, 5, np.full(dim, 0.4))
    seen: list[bytes] = []
    for number in range(RESULTS):
        x = _ask(optimizer, number)
        if x is None:
            assert seen, "exhausted before the first point"
            assert _ask(optimizer, number + 1) is None, "exhausted, and then not"
            break
        assert x.shape == (dim,), x
        seen.append(x.tobytes())
        optimizer.tell(_result(number, x.copy(), len(goals)))
    assert len(set(seen)) > len(seen) // 2, "ask repeats itself"


def _check_replay(make: MakeOptimizer, dim: int, goals: Sequence[Goal]) -> None:
    """Three searches with one history: asked serially, asked wildly, and not asked at all."""
    start = np.full(dim, 0.4)
    serial, wild, replayed = (make(dim, goals, 5, start.copy()) for _ in range(3))
    told = []
    for number in range(RESULTS):
        x = _ask(serial, number)
        again = _ask(wild, number)
        assert _same(x, again), f"candidate {number} depends on asks that were never told, or is not deterministic"
        if x is None:
            break
        result = _result(number, x.copy(), len(goals))
        x[:] = 0.123  # the caller owns what it was given
        assert result.x is not None
        if number % 4 == 0:
            _ask(wild, number + 1000, [result.x])
            _recommended(wild, dim)
        for optimizer in (serial, wild):
            mine = _result(number, result.x.copy(), len(goals))
            optimizer.tell(mine)
            assert mine.x is not None and np.array_equal(mine.x, result.x), "tell changed its argument"
            mine.x[:] = 0.9  # and keeps no reference
        told.append(result)
    for result in told:
        replayed.tell(result)
    pending = [np.full(dim, 0.25), np.full(dim, 0.75)]
    for number in range(RESULTS, RESULTS + 4):
        expected = _ask(serial, number, pending)
        assert _same(_ask(replayed, number, pending), expected), "replay differs"
        assert _same(_ask(wild, number, pending), expected), "asks or recommendations left a trace"
    advice = [_recommended(optimizer, dim) for optimizer in (serial, replayed, wild)]
    for other in advice[1:]:
        assert [r.x.tobytes() for r in other] == [r.x.tobytes() for r in advice[0]], "recommendations differ"


def _same(a: Array | None, b: Array | None) -> bool:
    return a is b if a is None or b is None else np.array_equal(a, b)


def _check_survival(make: MakeOptimizer, dim: int, goals: Sequence[Goal]) -> None:
    """Every kind of useless result, told out of order, then a flat landscape."""
    m = len(goals)
    optimizer = make(dim, goals, 6, np.full(dim, 0.4))
    _recommended(optimizer, dim)  # before there is anything to know
    optimizer.tell(Result(0, None, None, None))
    optimizer.tell(Result(1, None, np.full(m, 0.5), None))
    optimizer.tell(Result(2, np.full(dim, 0.5), None, None))
    optimizer.tell(Result(3, np.full(dim, 0.5), np.full(m, np.nan), None))
    optimizer.tell(Result(4, np.full(dim, 0.5), np.full(m, 0.5), np.full(m, np.nan)))
    in_flight = [(number, x) for number in range(5, 10) if (x := _ask(optimizer, number)) is not None]
    for number in range(10, 10 + RESULTS):
        if not in_flight:
            break
        done, x = in_flight.pop(min(3, len(in_flight) - 1) if number % 2 else 0)
        optimizer.tell(Result(done, x, np.full(m, 0.5), np.zeros(m) if number % 3 else None))
        point = _ask(optimizer, number, [p for _, p in in_flight])
        if point is not None:
            in_flight.append((number, point))
    _recommended(optimizer, dim)


def _check_floors(make: MakeOptimizer, dim: int, goals: Sequence[Goal]) -> None:
    """Floors that appear, tighten until nothing is feasible, and go; results that are told a second time."""
    m = len(goals)
    optimizer, replayed = (make(dim, goals, 7, np.full(dim, 0.4)) for _ in range(2))
    stages = (None, np.full(m, -np.inf), np.r_[0.7, np.full(m - 1, -np.inf)], np.full(m, 0.9), np.full(m, 2.0), None)
    told: list[Result] = []
    for number in range(RESULTS + len(stages)):
        x = _ask(optimizer, number)
        if x is None:
            break
        told.append(_result(number, x, m, stages[number * len(stages) // (RESULTS + len(stages))]))
        if number % 5 == 4:  # scored again, on more items
            earlier = told[number // 2]
            assert earlier.x is not None and earlier.values is not None
            told.append(Result(earlier.number, earlier.x, earlier.values + 0.01, np.full(m, 0.01), told[-1].floors))
        for result in told[-2:] if number % 5 == 4 else told[-1:]:
            optimizer.tell(result)
    _recommended(optimizer, dim)
    for result in told:
        replayed.tell(result)
    for number in range(2 * RESULTS, 2 * RESULTS + 2):
        assert _same(_ask(replayed, number), _ask(optimizer, number)), "replay differs with floors or repeated results"
