"""The catalogue of methods: what `evomerge ls methods` prints, and docs/methods.md, which must not go stale."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import pytest
from torch import Tensor

from evomerge import catalogue, registry, testing
from evomerge.cli import main
from evomerge.methods import EXTENSION, Inputs, Method, PerExpert, Range, method

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "methods.md"
NAMES = registry.names("methods")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; returns exit code, stdout and stderr."""

    def call(*args: str) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            main(list(args))
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        out, err = capfd.readouterr()
        return code, out, err

    return call


@pytest.fixture
def local_method() -> Iterator[Method]:
    """A method with every kind of parameter, registered for one test."""

    @method("local_odd", source="nobody", n_experts=(2, 4), symmetric=False, mergekit=True)
    def local_odd(
        x: Inputs,
        *,
        share: Annotated[PerExpert, Range(0.01, 2.0, log=True, limits=(0.0, 3.0))],
        steps: Annotated[int, Range(1, 9)] = 3,
        cut: float = 0.5,
        mode: Annotated[bool | Literal["a", "b|c"], EXTENSION] = "b|c",
    ) -> Tensor:
        """One line on it.

        What else there is to say.
        """
        return x.reference

    yield local_odd
    del registry._entries["methods"]["local_odd"]


def test_the_page_is_what_the_methods_say_today() -> None:
    command = [sys.executable, "-m", "evomerge.catalogue"]
    made = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    if PAGE.read_text(encoding="utf-8") != made:
        pytest.fail("docs/methods.md is not what the methods say now: run `make docs` and commit it", pytrace=False)


def test_the_page_has_every_method_and_no_one_elses(local_method: Method) -> None:
    page = catalogue.coverage_page()
    for name in NAMES:
        assert page.count(f"\n| `{name}` | ") >= 2, name
    assert "local_odd" not in page
    assert all(f"`{p.name}`" in page for n in NAMES for p in registry.get("methods", n).parameters)


def test_the_page_counts_recorded_results() -> None:
    index = json.loads((ROOT / "tests/golden/public/index.json").read_text())
    ties = sum(entry["method"] == "ties" for entry in [*index["cases"], *index["statistics"]])
    (row,) = [line for line in catalogue.coverage_page().splitlines() if line.startswith("| `ties` | yes")][:1]
    assert row.endswith(f"| {ties} |")


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_listed_once(name: str) -> None:
    made: Method = registry.get("methods", name)
    row = catalogue.method_row(made)
    own = [p["name"] for p in row["parameters"]]
    shared = [p["name"] for p in catalogue.modifier_row()["parameters"]] if made.needs_base else []
    assert sorted([*own, *(p for p in shared if p not in own)]) == sorted(p.name for p in made.parameters)
    json.dumps(catalogue.method_details(name), allow_nan=False)


def test_a_parameter_in_one_line(local_method: Method) -> None:
    texts = {p["name"]: p["text"] for p in catalogue.method_row(local_method)["parameters"]}
    assert texts == {
        "share": "number, one per expert; required; searched 0.01 to 2 on a log scale; allowed 0 to 3",
        "steps": "whole number; default 3; searched 1 to 9",
        "cut": "number; default 0.5",
        "mode": "true, false, a or b|c; default b|c; not in mergekit",
    }


def test_checks_that_concern_a_method() -> None:
    def concerned(name: str) -> set[str]:
        found = registry.get("methods", name)
        return {c.__name__ for c in testing.METHOD_CHECKS if catalogue.concerns(c, found)}

    everything = {c.__name__ for c in testing.METHOD_CHECKS}
    assert everything - concerned("ties") == set()
    assert everything - concerned("linear") == {"check_zero_lambda", "check_zero_deltas"}  # no lambda, no base


def test_ls_methods_shows_parameters_and_the_modifier_once(run: Run) -> None:
    code, out, _ = run("ls", "methods")
    assert code == 0
    blocks = out.strip().split("\n\n")
    assert [block.split(":", 1)[0] for block in blocks] == [*NAMES, catalogue.EVERY]
    assert out.count("lines_alpha") == 1 and "lines_alpha" in blocks[-1]
    ties = blocks[NAMES.index("ties")].splitlines()
    assert ties[1].strip() == registry.get("methods", "ties").source
    assert "density number, one per expert; default 1; searched 0.05 to 1; allowed 0 to 1" in [
        " ".join(line.split()) for line in ties
    ]


def test_ls_methods_as_data(run: Run) -> None:
    rows = json.loads(run("ls", "methods", "-f", "json")[1])
    assert [row["name"] for row in rows] == [*NAMES, catalogue.EVERY]
    density = next(p for p in rows[NAMES.index("ties")]["parameters"] if p["name"] == "density")
    assert density["search"] == [0.05, 1.0] and density["limits"] == [0.0, 1.0] and density["per_expert"] is True
    flat = list(csv.DictReader(io.StringIO(run("ls", "methods", "-f", "csv")[1])))
    assert [(r["method"], r["name"]) for r in flat] == [(r["name"], p["name"]) for r in rows for p in r["parameters"]]


def test_ls_shows_one_method_in_full(run: Run, local_method: Method) -> None:
    code, out, _ = run("ls", "methods", "ties")
    assert code == 0 and "max(1, floor(density * n))" in out and "lines_alpha" in out
    assert out.count(registry.get("methods", "ties").summary) == 1
    shown = run("ls", "methods", "local_odd")[1]
    assert (
        "merges 2 to 4 beside the base; the order of the experts counts; mergekit has it too" in shown
        and "What else" in shown
    )
    assert "lines_alpha" not in run("ls", "methods", "linear")[1]
    assert json.loads(run("ls", "methods", "ties", "-f", "json")[1])["doc"].startswith("Trims")
    assert "doc" not in run("ls", "methods", "ties", "-f", "csv")[1].splitlines()[0]


def test_ls_of_names_that_are_not_there(run: Run) -> None:
    code, out, err = run("ls", "methods", "tise")
    assert code == 2 and out == "" and "ties" in err
    assert run("ls", "optimizers", "map")[0] == 2
