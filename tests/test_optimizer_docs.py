"""docs/optimizers.md: its table names every optimizer with its options, and its examples work."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from evomerge import registry
from evomerge.config import parse_study
from evomerge.optimizers import Goal, make
from evomerge.optimizers._core import option_defaults
from evomerge.space import SearchSpace
from evomerge.strict_yaml import load_yaml
from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "optimizers.md").read_text()
ROWS = {
    cells[0].strip("`"): cells
    for cells in ([c.strip() for c in row[1:-1].split("|")] for row in re.findall(r"^\| `.*", TEXT, re.M))
    if len(cells) == 6
}


def test_every_optimizer_is_in_the_table_with_its_options_and_defaults() -> None:
    assert sorted(ROWS) == sorted(registry.names("optimizers"))
    for name, cells in ROWS.items():
        defaults = option_defaults(registry.get("optimizers", name))
        assert re.findall(r"`(\w+)`", cells[5].split(":")[0] if name == "coarse_to_fine" else cells[5]) == list(
            defaults
        )
        for option, default in defaults.items():
            if default is not None:
                assert f"`{option}` {default}" in cells[5], (name, option)


def test_the_examples_of_studies_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each yaml block, in place of the demo study's own keys, for a model of 32 layers."""
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) > 3
    for block in blocks:
        study = load_yaml(Path("zoo/demo.yaml").read_text()).data | load_yaml(block).data
        config = parse_study(json.dumps(study), "study.yaml")
        space = SearchSpace.from_dict(config.space, config.base, config.experts, n_layers=32)
        goals = [Goal(o.name, 0.0, 1.0) for o in config.objectives]
        facts = space.facts(2, config.budget.evaluations)
        start = space.encode(space.start())
        optimizer = make(str(config.optimizer), space.dim, goals, 0, start, config.optimizer_options, facts)
        assert space.decode(optimizer.ask(0))


def test_the_example_of_an_optimizer_keeps_the_contract() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    try:
        exec(compile(code, "docs/optimizers.md", "exec"), {"__name__": "walk"})
    finally:
        registry._entries["optimizers"].pop("walk", None)
