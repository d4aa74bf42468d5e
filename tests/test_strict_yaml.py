from __future__ import annotations

import math
import pickle

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import (
    CandidateFailure,
    ConfigError,
    EvomergeError,
    NonFinite,
    Problem,
    RecipeError,
)
from evomerge.strict_yaml import MAX_BYTES, dump_yaml, load_yaml

QUIET = settings(max_examples=150, derandomize=True, deadline=None, database=None)


def load(text: str) -> object:
    return load_yaml(text, "r.yaml").data


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        ("-2.5e+3", -2500.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("7", 7),
        ("-0", 0),
        ("+12", 12),
        ("true", True),
        ("FALSE", False),
        ("", None),
        ("~", None),
        ("null", None),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        ("no", "no"),
        ("on", "on"),
        ("y", "y"),
        ("0123456", "0123456"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("0x1F", "0x1F"),
        ("2020-01-01", "2020-01-01"),
        ("'1e-4'", "1e-4"),
        ('"true"', "true"),
        ("1e", "1e"),
        ("v1.0", "v1.0"),
    ],
)
def test_scalars_follow_the_core_schema(text: str, value: object) -> None:
    found = load(text)
    assert found == value and type(found) is type(value)


def test_nan() -> None:
    assert math.isnan(load(".nan"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "twice"),
        ("a: 1\nb: {c: 1,\n  c: 2}\n", 3, "twice"),
        ("a: &x 1\nb: 2\n", 1, "anchor"),
        ("a: &x [1]\nb:\n- *x\n", 3, "alias"),
        ("a:\n- !!python/object/apply:os.system [ls]\n", 2, "tag"),
        ("a: !!str 1\n", 1, "tag"),
        ("a: ! x\n", 1, "tag"),
        ("x: 1\n1: a\n", 2, "not a string"),
        ("true: a\n", 1, "not a string"),
        ("? [a]\n: 1\n", 1, "not a string"),
        ("a: 1\n---\nb: 2\n", 2, "second"),
        ("a: [1, 2\nb: 3\n", 2, "not valid"),
        ("a: 1\n  b: 2\n", 2, "not valid"),
        ("a: 1\nb: \x00\n", 2, "character"),
        ("a: 1\nb: 1234567890123456789\n", 2, "18 digits"),
    ],
)
def test_refusals_name_the_line(text: str, line: int, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert any(problem.where == f"r.yaml:{line}" and word in problem.message for problem in caught.value.problems), (
        caught.value.problems
    )
    assert caught.value.exit_code == 2


def test_every_problem_is_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load("a: 1\na: 2\n3: x\nb: {c: 1, c: 2}\n")
    places = [problem.where for problem in caught.value.problems]
    assert places == ["r.yaml:2", "r.yaml:3", "r.yaml:4"]
    assert str(caught.value).count("\n  - ") == 3


def test_size_and_depth_are_bounded() -> None:
    with pytest.raises(ConfigError, match="bytes"):
        load("é" * (MAX_BYTES // 2 + 1))
    with pytest.raises(ConfigError, match="deep"):
        load("[" * 5000)
    with pytest.raises(ConfigError, match="deep"):
        load("\n".join(" " * i + "a:" for i in range(200)))


def test_lines_and_nearest_known_line() -> None:
    document = load_yaml("a: 1\n\nb:\n- x: 1\n  y: 2\n- z\n", "r.yaml")
    assert document.line(("a",)) == 1
    assert document.line(("b",)) == 3
    assert document.line(("b", 0, "y")) == 5
    assert document.line(("b", 1)) == 6
    assert document.line(("b", 1, "missing", 4)) == 6
    assert document.line(("nothing",)) == 1
    assert document.where(("b", 0, "y")) == "r.yaml:5"


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**17), 10**17)
    | st.floats(allow_nan=False)
    | st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\ufeff"), max_size=12)
    | st.from_regex(r"[-+]?[0-9.]{1,4}([eE][-+]?[0-9]{1,2})?", fullmatch=True)
    | st.sampled_from(["yes", "NULL", "0o17", "12:30", "1e-4", "<<", "=", "2020-01-01", "a\nb\n"])
)
DATA = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(codec="ascii"), max_size=6), inner, max_size=4)
    ),
    max_leaves=12,
)


def same(a: object, b: object) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@QUIET
@given(DATA)
def test_dump_round_trips_here_and_in_yaml_1_1(data: object) -> None:
    text = dump_yaml(data)
    assert same(load(text), data)
    assert same(yaml.safe_load(text), data)
    assert dump_yaml(load(text)) == text


def test_dump_is_block_style_with_repr_floats() -> None:
    shared = [1e-05, 0.1]
    text = dump_yaml({"b": shared, "a": {"t": shared, "s": (1, 2)}})
    assert text == "b:\n- 1.0e-05\n- 0.1\na:\n  t:\n  - 1.0e-05\n  - 0.1\n  s:\n  - 1\n  - 2\n"


def test_errors_survive_pickling_with_their_hints() -> None:
    problems = (Problem("bad", "r.yaml:3", "mend it"),)
    for error in (
        EvomergeError("m", "h"),
        RecipeError.of(problems),
        ConfigError("m", "h", problems),
        CandidateFailure("m", "h", "oom"),
        NonFinite("m"),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error) and vars(copy) == vars(error)
        assert str(copy) == str(error)
    assert str(problems[0]) == "r.yaml:3: bad (mend it)"
    assert NonFinite("m").reason == "non_finite"
    assert "\n" not in str(Problem("two\nlines", "a"))
