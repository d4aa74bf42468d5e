from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from evomerge import registry
from evomerge.errors import ConfigError, EnvironmentProblem


@pytest.fixture(autouse=True)
def clean_registry() -> Iterator[None]:
    for name in registry.names("methods"):
        registry.get("methods", name)  # a module is imported once: its entry must be put back
    before = {kind: dict(table) for kind, table in registry._entries.items()}
    yield
    for kind, table in registry._entries.items():
        table.clear()
        table.update(before[kind])


def test_builtins_are_found_by_file_name() -> None:
    known = registry.names("methods")
    assert {"linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties"} <= set(known)
    assert list(known) == sorted(known) and not any(name.startswith("_") for name in known)
    assert registry.get("methods", "ties").name == "ties"
    assert registry.get("methods", "ties") is registry.get("methods", "ties")


def test_every_builtin_registers_its_file_name() -> None:
    for name in registry.names("methods"):
        assert registry.get("methods", name).name == name


def test_importing_the_registry_and_listing_names_imports_no_torch() -> None:
    code = (
        "import sys, evomerge.registry as r; r.names('methods'); "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_names_give_close_matches() -> None:
    with pytest.raises(ConfigError) as caught:
        registry.get("methods", "tie")
    assert "ties" in caught.value.hint
    with pytest.raises(ConfigError) as caught:
        registry.get("methods", "zzzzzz")
    assert "known:" in caught.value.hint and "linear" in caught.value.hint
    with pytest.raises(ConfigError, match="unknown registry"):
        registry.names("method")


def test_a_name_belongs_to_one_module() -> None:
    registry.register("methods", "mine", object(), module="a")
    replacement = object()
    registry.register("methods", "mine", replacement, module="a")
    assert registry.get("methods", "mine") is replacement
    with pytest.raises(ConfigError, match="already defines"):
        registry.register("methods", "mine", object(), module="b")
    with pytest.raises(ConfigError, match="already defines"):  # even before ties.py is imported
        registry._entries["methods"].pop("ties", None)
        registry.register("methods", "ties", object(), module="b")


def test_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        importlib.metadata.EntryPoint("by_load", "collections:OrderedDict", "evomerge.methods"),
        importlib.metadata.EntryPoint("broken", "no_such_package_x:thing", "evomerge.methods"),
        importlib.metadata.EntryPoint("ties", "collections:OrderedDict", "evomerge.methods"),
    ]

    def entry_points(group: str) -> list[importlib.metadata.EntryPoint]:
        return [point for point in points if point.group == group]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    assert {"by_load", "broken"} <= set(registry.names("methods"))
    assert "by_load" not in registry.names("objectives")
    assert registry.get("methods", "by_load").__name__ == "OrderedDict"
    registry._entries["methods"].pop("ties")
    monkeypatch.delitem(sys.modules, "evomerge.methods.ties")
    assert registry.get("methods", "ties").name == "ties"  # a built-in file wins
    with pytest.raises(EnvironmentProblem, match="no_such_package_x") as caught:
        registry.get("methods", "broken")
    assert "no_such_package_x" in caught.value.hint and caught.value.exit_code == 3


LOCAL = """
from evomerge.registry import register
class Thing: pass
register("objectives", "local_thing", Thing)
"""


def test_local_file(tmp_path: Path) -> None:
    file = tmp_path / "plugin.py"
    file.write_text(LOCAL)
    assert registry.load_local_file(file) == (("objectives", "local_thing"),)
    thing = registry.get("objectives", "local_thing")
    assert registry.load_local_file(file) == (("objectives", "local_thing"),)
    assert registry.get("objectives", "local_thing") is thing  # not run twice


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("x = 1\n", "registers no"),
        ("x = 1\ny = 1 / 0\n", "plugin.py:2 failed: ZeroDivisionError"),
        ("x = (\n", "plugin.py:1 failed: SyntaxError"),
        (LOCAL.replace("objectives", "methods").replace("local_thing", "ties"), "already defines"),
        (LOCAL + "raise RuntimeError('late')\n", "late"),
    ],
)
def test_bad_local_files(tmp_path: Path, content: str, expected: str) -> None:
    file = tmp_path / "plugin.py"
    file.write_text(content)
    with pytest.raises(ConfigError, match=expected):
        registry.load_local_file(file)
    assert "local_thing" not in registry.names("objectives")


def test_missing_local_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        registry.load_local_file(tmp_path / "no.py")
