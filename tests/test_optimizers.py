"""Tests of evomerge.optimizers: the contract, `make`, and what holds for every optimizer."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import qmc

from evomerge.errors import ConfigError
from evomerge.optimizers import Exhausted, Facts, Optimizer, Recommendation, Result, check_optimizer, make
from evomerge.optimizers._core import rng_for, usable
from tests.landscapes import UNIT

NAMES = ("random", "sobol", "grid", "cma_es", "nsga2", "nsga3", "tpe", "map")  # and gp, which is slow
LONG: dict[str, dict[str, object]] = {"grid": {"points": 40}, "gp": {"startup": 22}}  # options for a search of 30


# ------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("name", NAMES)
def test_contract(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cma_signals.in").write_text("{'timeout': 0}")  # pycma would obey it
    check_optimizer(
        lambda dim, goals, seed, start: make(name, dim, goals, seed, start), least_goals=2 if name == "nsga3" else 1
    )


@pytest.mark.slow  # minutes: an ask takes up to a second
@pytest.mark.timeout(1200)
def test_contract_of_gp() -> None:
    check_optimizer(lambda dim, goals, seed, start: make("gp", dim, goals, seed, start, {"startup": 26}))


class Broken:
    """Random search with one fault; the contract has to see each."""

    def __init__(self, fault: str, dim: int) -> None:
        self.fault, self.dim, self.count, self.last = fault, dim, 0, np.zeros(dim)
        self.told: dict[int, np.ndarray | None] = {}

    def ask(self, number: int, pending: Sequence[np.ndarray] = ()) -> np.ndarray:
        self.count += 1
        shift = {"counts asks": self.count}.get(self.fault, 0)
        x = rng_for(5, number + 1000 * shift).random(self.dim)
        if self.fault == "leaves the cube":
            x = x * 1.5
        if self.fault == "float32":
            return x.astype(np.float32)
        if self.fault == "global generator":
            np.random.seed(int(x[0] * 1000))
        if self.fault == "writes a file":
            Path("trace.txt").write_text("x")
        if self.fault == "exhausted at once" or (self.fault == "exhausted silently" and self.told):
            raise Exhausted("" if self.told else "nothing to propose")
        if self.fault == "exhausted for a moment" and number == 20:
            raise Exhausted("a pause")
        if self.fault == "recommending leaves a trace" and self.last.any():
            return self.last
        return self.last if self.fault == "remembers references" and self.count > 9 else x

    def tell(self, result: Result) -> None:
        if self.fault == "chokes on failures" and result.values is None:
            raise AssertionError("values is None")
        if self.fault == "remembers references" and result.x is not None:
            self.last = result.x
        if self.fault == "changes the argument" and result.x is not None:
            np.multiply(result.x, 0.5, out=result.x)
        if self.fault == "chokes on floors" and result.floors is not None:
            raise AssertionError("floors")
        if self.fault == "chokes on repeats" and result.values is not None:
            assert result.number not in self.told
        self.told[result.number] = result.x

    def recommend(self) -> list[Recommendation]:
        if self.fault == "recommending leaves a trace":
            self.last = np.full(self.dim, 0.5)
        x = np.full(self.dim, 1.5 if self.fault == "recommends outside" else 0.5)
        shared = self.told.get(3) if self.fault == "recommends its own memory" else None
        return [Recommendation(x if shared is None else shared, "" if self.fault == "gives no reason" else "centre")]


@pytest.mark.parametrize(
    "fault",
    [
        "counts asks",
        "leaves the cube",
        "float32",
        "global generator",
        "writes a file",
        "remembers references",
        "chokes on failures",
        "changes the argument",
        "chokes on floors",
        "chokes on repeats",
        "exhausted at once",
        "exhausted silently",
        "exhausted for a moment",
        "recommending leaves a trace",
        "recommends outside",
        "recommends its own memory",
        "gives no reason",
    ],
)
def test_the_contract_finds(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError):
        check_optimizer(lambda dim, goals, seed, start: Broken(fault, dim))


def test_the_contract_accepts_the_broken_one_without_a_fault() -> None:
    check_optimizer(lambda dim, goals, seed, start: Broken("", dim))


# ------------------------------------------------------------------------------------- make


def test_an_unknown_name_or_option_is_refused_with_a_suggestion() -> None:
    start = np.full(2, 0.5)
    with pytest.raises(ConfigError, match="did you mean cma_es"):
        make("cmaes", 2, UNIT, 0, start)
    with pytest.raises(ConfigError) as caught:
        make("cma_es", 2, UNIT, 0, start, {"sigma": 0.1, "bogus": 1})
    assert [p.where for p in caught.value.problems] == ["optimizer.sigma", "optimizer.bogus"]
    assert "sigma0" in caught.value.problems[0].hint


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("cma_es", "sigma0", 0.0),
        ("cma_es", "sigma0", "big"),
        ("cma_es", "sigma0", float("nan")),
        ("cma_es", "workers", 0),
        ("cma_es", "weights", {"a": 0}),
        ("cma_es", "weights", {"c": 1.0}),
        ("cma_es", "weights", 3),
        ("nsga2", "population", 2),
        ("nsga2", "population", 24.5),
        ("tpe", "window", 1),
        ("tpe", "startup", True),
        ("nsga3", "population", 3),
        ("gp", "startup", 1),
        ("grid", "points", 1),
        ("grid", "points", 501),
        ("map", "explore", 1.5),
        ("map", "design", 1),
        ("map", "optimism", -1.0),
    ],
)
def test_a_wrong_option_value_is_a_config_error(name: str, option: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        make(name, 2, UNIT, 0, np.full(2, 0.5), {option: value})
    assert caught.value.problems[0].where == f"optimizer.{option}"


def test_finding_optimizers_imports_no_engine() -> None:
    files = ", ".join(f"evomerge.optimizers.{name}" for name in (*NAMES, "gp"))
    code = f"import sys, {files}; print(sorted({{'cma', 'optuna', 'torch'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_start_of_the_wrong_shape_is_a_bug() -> None:
    with pytest.raises(ValueError, match="start"):
        make("random", 3, UNIT, 0, np.zeros(2))


def test_a_result_that_does_not_fit_is_a_bug() -> None:
    with pytest.raises(ValueError, match="candidate 7"):
        usable(Result(7, np.zeros(3), np.zeros(1)), 3, 2)


QUIET = """
import json, sys
import numpy as np
from evomerge.optimizers import Goal, Result, make
for name, options in json.loads(sys.argv[1]).items():
    optimizer = make(name, 2, (Goal("a"), Goal("b")), 0, np.full(2, 0.5), options)
    for number in range(26):
        x = optimizer.ask(number)
        optimizer.tell(Result(number, x, np.array([x[0], -x[1]]), None, np.array([0.1, -np.inf])))
import optuna
assert optuna.logging.get_verbosity() == optuna.logging.INFO, "the verbosity was not restored"
"""


def test_nothing_is_printed_or_warned() -> None:
    options = json.dumps({name: LONG.get(name, {}) for name in (*NAMES, "gp")})
    command = [sys.executable, "-W", "error::UserWarning", "-W", "error::FutureWarning", "-c", QUIET, options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", NAMES)
def test_a_point_that_rounding_moved_out_of_the_cube_is_taken(name: str) -> None:
    optimizer = make(name, 2, UNIT, 0, np.full(2, 0.5), LONG.get(name))
    for number in range(30):
        x = np.array([1.0 + 1e-9, -1e-9]) if number % 2 else optimizer.ask(number)
        optimizer.tell(Result(number, x, np.array([x[0], -x[1]]), None))
    x = optimizer.ask(30)
    assert (x >= 0).all() and (x <= 1).all()


# ------------------------------------------------------------------------------------- random, sobol, grid


def test_sobol_covers_the_cube_more_evenly_than_random() -> None:
    for seed in range(3):
        points = {}
        for name in ("sobol", "random"):
            optimizer = make(name, 3, UNIT, seed, np.full(3, 0.5))
            points[name] = np.array([optimizer.ask(number) for number in range(7, 71)])
        assert qmc.discrepancy(points["sobol"]) < 0.5 * qmc.discrepancy(points["random"])


def test_sobol_depends_on_its_seed_and_not_on_the_order_of_asking() -> None:
    one, other = (make("sobol", 2, UNIT, seed, np.full(2, 0.5)) for seed in (0, 1))
    forward = [one.ask(number) for number in range(9)]
    backward = [one.ask(number) for number in reversed(range(9))]
    assert np.array_equal(forward, backward[::-1])
    assert not any(np.array_equal(one.ask(number), other.ask(number)) for number in range(9))


def whole_grid(optimizer: Optimizer, workers: int = 1) -> np.ndarray:
    """Return all points (n, d) of a grid that `workers` evaluate, failures included, in the order of asking."""
    points: list[np.ndarray] = []
    flying: list[np.ndarray] = []
    for number in range(1000):
        if len(flying) >= workers:
            values = None if number % 3 == 0 else np.zeros(2)
            optimizer.tell(Result(number, np.round(flying.pop(0), 4), values))
        try:
            points.append(optimizer.ask(number, flying))
        except Exhausted as end:
            assert "points of the grid" in str(end)
            return np.array(points)
        flying.append(points[-1])
    raise AssertionError("the grid never ends")


@pytest.mark.parametrize("workers", [1, 4, 20])
def test_a_grid_is_one_scale_from_the_base_to_the_far_corner(workers: int) -> None:
    facts = dataclasses.replace(Facts.plain(3), zero=np.array([0.2, 0.2, 0.0]))
    points = whole_grid(make("grid", 3, UNIT, 0, np.full(3, 0.5), facts=facts), workers)
    scales = (points - facts.zero) / (1 - facts.zero)
    assert np.allclose(np.sort(scales[:, 0]), np.linspace(0, 1, 13))
    assert np.allclose(scales, scales[:, :1])
    assert sorted(scales[:3, 0]) == pytest.approx([0.0, 2 / 3, 1.0])  # a short budget sees all of the range


def test_a_grid_of_one_coordinate_is_plain_and_moves_nothing_but_experts() -> None:
    facts = dataclasses.replace(Facts.plain(1), zero=np.array([0.25]))
    plain = whole_grid(make("grid", 1, UNIT, 0, np.full(1, 0.5), {"points": 5}, facts))
    assert sorted(plain[:, 0]) == [0.0, 0.25, 0.5, 0.75, 1.0]
    facts = dataclasses.replace(Facts.plain(3), experts=np.array([0, 1, -1]))
    points = whole_grid(make("grid", 3, UNIT, 0, np.full(3, 0.9), {"points": 5}, facts))
    assert len(points) == 5 and (points[:, 2] == 0.9).all() and sorted(points[:, 1]) == sorted(plain[:, 0])


def test_a_grid_leaves_out_what_is_known_and_merges_points_of_one_cell() -> None:
    optimizer = make("grid", 2, UNIT, 0, np.full(2, 0.5), {"points": 5})
    optimizer.tell(Result(0, np.full(2, 0.5003), np.zeros(2)))  # a known recipe, rounded
    optimizer.tell(Result(1, np.array([0.25, 0.5]), np.zeros(2)))  # not of the line
    assert sorted(whole_grid(optimizer)[:, 0]) == [0.0, 0.25, 0.75, 1.0]
    facts = dataclasses.replace(Facts.plain(2), cells=np.array([4, 4]))
    assert sorted(whole_grid(make("grid", 2, UNIT, 0, np.full(2, 0.5), facts=facts))[:, 0]) == [
        0.125,
        0.375,
        0.625,
        0.875,
    ]
