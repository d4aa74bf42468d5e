"""The contract of an optimizer, as a check that anybody can run on their own."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence

import numpy as np

from evomerge.optimizers._core import Array, Goal, Optimizer, Result

MakeOptimizer = Callable[[int, Sequence[Goal], int, Array], Optimizer]
RESULTS = 28  # more than a generation of every built-in optimizer


def check_optimizer(make: MakeOptimizer) -> None:
    """Raise AssertionError unless what `make(dim, goals, seed, start)` returns keeps the contract.

    Checked for 1 and 3 dimensions with 1 and 2 goals: points lie in the unit cube; equal histories give equal
    points, bit for bit, whatever was asked in between; failed, out-of-space, non-finite and constant results are
    survived; results may arrive in any order; nothing outside the optimizer changes (global random
    generators, the caller's arrays, the working directory).
    """
    files = set(os.listdir())
    python_state, numpy_state = random.getstate(), repr(np.random.get_state(legacy=False))
    for dim in (1, 3):
        for goals in ((Goal("a", 0.0, 1.0),), (Goal("a", 0.0, 1.0), Goal("b"))):
            _check_points(make, dim, goals)
            _check_replay(make, dim, goals)
            _check_survival(make, dim, goals)
    assert random.getstate() == python_state, "the global generator of random was used"
    assert repr(np.random.get_state(legacy=False)) == numpy_state, "numpy's global generator was used"
    assert set(os.listdir()) == files, "files appeared in the working directory"


def _score(x: Array, n_goals: int) -> Array:
    """A smooth test problem with values in (0, 1)."""
    peaks = np.array([0.3, 0.7])[:n_goals]
    return np.array([np.exp(-((x - peak) ** 2).mean() * 4) for peak in peaks])


def _result(number: int, x: Array, n_goals: int) -> Result:
    return Result(number, x, _score(x, n_goals), np.full(n_goals, 0.02))


def _check_points(make: MakeOptimizer, dim: int, goals: Sequence[Goal]) -> None:
    optimizer = make(dim, goals, 5, np.full(dim, 0.4))
    seen = []
    for number in range(RESULTS):
        x = optimizer.ask(number)
        assert isinstance(x, np.ndarray) and x.dtype == np.float64 and x.shape == (dim,), x
        assert np.isfinite(x).all() and (x >= 0).all() and (x <= 1).all(), f"outside the cube: {x}"
        seen.append(x.tobytes())
        result = _result(number, x.copy(), len(goals))
        optimizer.tell(result)
    assert len(set(seen)) > RESULTS // 2, "ask repeats itself"


def _check_replay(make: MakeOptimizer, dim: int, goals: Sequence[Goal]) -> None:
    """Three searches with one history: asked serially, asked wildly, and not asked at all."""
    start = np.full(dim, 0.4)
    serial, wild, replayed = (make(dim, goals, 5, start.copy()) for _ in range(3))
    told = []
    for number in range(RESULTS):
        x = serial.ask(number)
        result = _result(number, x.copy(), len(goals))
        x[:] = 0.123  # the caller owns what it was given
        again = wild.ask(number)
        assert result.x is not None and np.array_equal(again, result.x), (
            f"candidate {number} depends on asks that were never told, or is not deterministic"
        )
        if number % 4 == 0:
            wild.ask(number + 1000, [result.x])
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
        expected = serial.ask(number, pending)
        assert np.array_equal(replayed.ask(number, pending), expected), "replay differs"
        assert np.array_equal(wild.ask(number, pending), expected), "asks left a trace"


def _check_survival(make: MakeOptimizer, dim: int, goals: Sequence[Goal]) -> None:
    """Every kind of useless result, told out of order, then a flat landscape."""
    m = len(goals)
    optimizer = make(dim, goals, 6, np.full(dim, 0.4))
    optimizer.tell(Result(0, None, None, None))
    optimizer.tell(Result(1, None, np.full(m, 0.5), None))
    optimizer.tell(Result(2, np.full(dim, 0.5), None, None))
    optimizer.tell(Result(3, np.full(dim, 0.5), np.full(m, np.nan), None))
    optimizer.tell(Result(4, np.full(dim, 0.5), np.full(m, 0.5), np.full(m, np.nan)))
    in_flight = [(number, optimizer.ask(number)) for number in range(5, 10)]
    for number in range(10, 10 + RESULTS):
        done, x = in_flight.pop(3 if number % 2 else 0)
        optimizer.tell(Result(done, x, np.full(m, 0.5), np.zeros(m) if number % 3 else None))
        point = optimizer.ask(number, [p for _, p in in_flight])
        assert np.isfinite(point).all() and (point >= 0).all() and (point <= 1).all()
        in_flight.append((number, point))
