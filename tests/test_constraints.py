"""Constraints: what a line may say, what is refused, and which values are too bad."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.constraints import Constraint, floors, read_constraints, shortfalls
from evomerge.errors import ConfigError
from evomerge.recipe import Recipe
from evomerge.space import known_recipes

OBJECTIVES = {"qa": True, "ppl": False, "math": True}
EXPERTS = ("math-1", "code")
KNOWN = {
    "base": (0.5, 8.0, 0.1),
    "math-1": (0.4, 9.0, 0.6),
    "code": (0.45, 7.0, 0.2),
    "uniform soup": (0.6, 7.5, 0.4),
    "task arithmetic 0.3": (0.55, 7.2, 0.3),
}


@pytest.mark.parametrize(
    ("text", "floor"),
    [
        ("qa >= base", (0.5, -np.inf, -np.inf)),
        ("qa>=base-0.01", (0.49, -np.inf, -np.inf)),
        ("qa >= 0.9 * base + 1e-1", (0.55, -np.inf, -np.inf)),
        ("qa >= 0.6", (0.6, -np.inf, -np.inf)),
        ("qa >= .6", (0.6, -np.inf, -np.inf)),
        ("ppl <= 1.05 * base", (-np.inf, -8.4, -np.inf)),
        ("ppl <= 7", (-np.inf, -7.0, -np.inf)),
        ("ppl <= best expert", (-np.inf, -7.0, -np.inf)),
        ("math >= best expert", (-np.inf, -np.inf, 0.6)),
        ("math >= math-1", (-np.inf, -np.inf, 0.6)),
        ("math >= math-1 - 0.1", (-np.inf, -np.inf, 0.5)),
        ("math >= uniform soup", (-np.inf, -np.inf, 0.4)),
        ("math >= 2 * task arithmetic 0.3", (-np.inf, -np.inf, 0.6)),
        ("math >= ties 0.2", (-np.inf, -np.inf, -np.inf)),  # not scored yet
    ],
)
def test_a_line_gives_a_floor(text: str, floor: tuple[float, ...]) -> None:
    read = read_constraints([text], OBJECTIVES, EXPERTS)
    assert floors(read, OBJECTIVES, KNOWN) == pytest.approx(np.array(floor))


def test_the_highest_of_several_floors_counts() -> None:
    read = read_constraints(["qa >= 0.4", "qa >= base", "qa >= code", "ppl <= 9", "ppl <= 8"], OBJECTIVES, EXPERTS)
    assert floors(read, OBJECTIVES, KNOWN) == pytest.approx([0.5, -8.0, -np.inf])
    assert floors(read, OBJECTIVES, {}) == pytest.approx([0.4, -8.0, -np.inf])
    assert floors((), OBJECTIVES, KNOWN) == pytest.approx([-np.inf] * 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("qa", "is no constraint (as in `qa >= base - 0.01`"),
        ("qa > 0.5", "is no constraint"),
        ("qa = 0.5", "is no constraint"),
        ("maths >= 0.5", "there is no objective 'maths' (did you mean math?)"),
        ("qa >= bse", "'bse' is neither a number nor a known recipe (did you mean base?)"),
        ("qa >= base * 1.1", "is neither a number nor a known recipe"),
        ("qa >= -2 * base", "is not above 0"),
        ("qa >= 1e999", "no finite number"),
        ("qa <= 0.5", "would forbid good values: larger values of qa are better (only limits on the bad side: use >="),
        ("ppl >= 3", "use <="),
        ("qa >= 1.01", "the best possible qa is 1"),
        ("ppl <= 0.5", "the best possible ppl is 1"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(text: str, message: str) -> None:
    bounds = {"qa": (0.0, 1.0), "ppl": (1.0, None)}
    with pytest.raises(ConfigError) as error:
        read_constraints([text], OBJECTIVES, EXPERTS, bounds=bounds)
    assert message in str(error.value)


def test_contradictions_name_both() -> None:
    for pair in (["qa >= 0.7", "qa <= 0.5"], ["qa >= base", "qa <= base - 0.1"]):
        with pytest.raises(ConfigError, match="contradict each other") as error:
            read_constraints(pair, OBJECTIVES, EXPERTS)
        assert all(repr(text) in str(error.value) for text in pair)


def test_all_problems_come_at_once_with_their_places() -> None:
    with pytest.raises(ConfigError) as error:
        read_constraints(["x >= 1", "qa >= 0.1", "qa <= 2", "qa ~ 3"], OBJECTIVES, EXPERTS)
    assert [p.where for p in error.value.problems] == ["constraints[0]", "constraints[3]", "constraints[2]"]


def test_a_reference_needs_the_known_recipes() -> None:
    with pytest.raises(ConfigError, match="the study evaluates none"):
        read_constraints(["qa >= base"], OBJECTIVES, EXPERTS, known_recipes=False)
    assert read_constraints(["qa >= 0.5"], OBJECTIVES, EXPERTS, known_recipes=False)


def test_the_soup_of_one_expert_is_the_expert() -> None:
    assert read_constraints(["qa >= uniform soup"], OBJECTIVES, ["red"])[0].labels == ("red",)


def test_every_known_recipe_can_be_named() -> None:
    labels = [label for label, _ in known_recipes("base", {"a": "a", "b": "b"})]
    assert isinstance(known_recipes("base", {"a": "a"})[0][1], Recipe)
    read = read_constraints([f"qa >= {label}" for label in labels], OBJECTIVES, ["a", "b"])
    assert [c.labels for c in read] == [(label,) for label in labels]


NUMBERS = st.floats(-100, 100)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=5), NUMBERS, NUMBERS)
def test_a_value_is_feasible_exactly_if_it_meets_the_limit(
    rows: list[tuple[float, float]], low: float, high: float
) -> None:
    objectives = {"up": True, "down": False}
    read = (Constraint("", "up", True, offset=low), Constraint("", "down", False, offset=high))
    oriented = np.array(rows) * [1, -1]
    missed = shortfalls(oriented, floors(read, objectives, {}))
    assert missed.shape == (len(rows), 2) and (missed >= 0).all()
    assert ((missed == 0) == [[up >= low, down <= high] for up, down in rows]).all()
    assert missed[:, 0] == pytest.approx([max(0.0, low - up) for up, _ in rows])
