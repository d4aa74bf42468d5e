"""Tests of evomerge.optimizers: the contract, `make`, and what holds for every optimizer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from evomerge.errors import ConfigError
from evomerge.optimizers import Result, check_optimizer, make
from evomerge.optimizers._core import rng_for, usable
from tests.landscapes import UNIT

NAMES = ("random", "cma_es", "nsga2", "tpe", "map")


# ------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("name", NAMES)
def test_contract(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cma_signals.in").write_text("{'timeout': 0}")  # pycma would obey it
    check_optimizer(lambda dim, goals, seed, start: make(name, dim, goals, seed, start))


class Broken:
    """Random search with one fault; the contract has to see each."""

    def __init__(self, fault: str, dim: int) -> None:
        self.fault, self.dim, self.count, self.last = fault, dim, 0, np.zeros(dim)

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
        return self.last if self.fault == "remembers references" and self.count > 9 else x

    def tell(self, result: Result) -> None:
        if self.fault == "chokes on failures" and result.values is None:
            raise AssertionError("values is None")
        if self.fault == "remembers references" and result.x is not None:
            self.last = result.x
        if self.fault == "changes the argument" and result.x is not None:
            np.multiply(result.x, 0.5, out=result.x)


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
    files = ", ".join(f"evomerge.optimizers.{name}" for name in NAMES)
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
import sys, warnings
import numpy as np
from evomerge.optimizers import Goal, Result, make
for name in sys.argv[1:]:
    optimizer = make(name, 2, (Goal("a"), Goal("b")), 0, np.full(2, 0.5), {"workers": 9} if name == "cma_es" else {})
    for number in range(26):
        x = optimizer.ask(number)
        optimizer.tell(Result(number, x, np.array([x[0], -x[1]]), None))
import optuna
assert optuna.logging.get_verbosity() == optuna.logging.INFO, "the verbosity was not restored"
"""


def test_nothing_is_printed_or_warned() -> None:
    command = [sys.executable, "-W", "error::UserWarning", "-W", "error::FutureWarning", "-c", QUIET, *NAMES]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", NAMES)
def test_a_point_that_rounding_moved_out_of_the_cube_is_taken(name: str) -> None:
    optimizer = make(name, 2, UNIT, 0, np.full(2, 0.5))
    for number in range(30):
        x = np.array([1.0 + 1e-9, -1e-9]) if number % 2 else optimizer.ask(number)
        optimizer.tell(Result(number, x, np.array([x[0], -x[1]]), None))
    x = optimizer.ask(30)
    assert (x >= 0).all() and (x <= 1).all()
