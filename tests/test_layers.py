"""The architecture holds: modules import downwards only, and each outside engine is named in its own files."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "evomerge"

LAYERS = (
    {"errors", "registry", "strict_yaml", "faults", "recipe", "_recipe_form", "_recipe_plan", "_recipe_write",
     "spaces", "path_space", "_path_choices", "_path_edits", "_path_indicators", "_path_form", "_path_steps",
     "space", "_space_form", "_space_genes", "_space_levels", "_space_methods", "_space_parts",
     "methods", "optimizers", "surrogate", "optimum", "front", "testing",
     "scale_folding", "feasible", "fidelity", "racing", "rivals", "limits", "finite_split", "estimator", "intervals",
     "constraints"},
    {"weights", "family", "residency", "model", "layer_path", "prefix", "scoring", "decoding", "objectives", "storage",
     "storage_url", "leases", "spool", "study", "_study_rows", "_study_reads", "_study_writes"},
    {"worker", "moments", "pool", "local_pool", "ray_pool", "_ray_cluster", "_ray_worker", "search", "history",
     "events", "company", "nights"},
    {"config", "worker_entries", "objective_entries", "evolve_file", "prepare", "rungs", "study_space", "summary",
     "rescore", "rounds", "selection", "picking", "proposing", "gains", "results", "export", "card", "catalogue",
     "progress", "status", "output", "commands", "cli", "__main__"},
)  # fmt: skip
# Inside layer 2: search -> pool -> worker; history is read by search.
ORDER = {"worker": 0, "pool": 1, "local_pool": 1, "ray_pool": 1, "_ray_cluster": 1, "_ray_worker": 1, "search": 2}

# Outside libraries that only some files may name; lazily or not.
OWNERS = {
    "ray": {"ray_pool"},
    "transformers": {"model", "export"},
    "lm_eval": {"objectives"},
    "datasets": {"objectives"},
    "safetensors": {"weights", "export"},
    "sqlalchemy": {"storage", "storage_url", "leases", "study", "_study_reads", "_study_writes"},
    "optuna": {"storage", "leases", "study", "_study_rows", "_study_reads", "_study_writes", "optimizers"},
    "cma": {"optimizers"},
    "cmaes": {"optimizers"},
    "numba": {"methods"},
    "pydantic": {"config", "worker_entries", "objectives"},
    "typer": {"cli"},
    "rich": {"progress"},
    "pandas": {"study"},
    "yaml": {"strict_yaml", "objectives"},
}
PURE = {"numba", "numpy", "scipy", "torch", "yaml"}  # what layer 0 may import, beside the standard library


def imports(path: Path) -> list[tuple[str, int]]:
    """Every module that a file imports, anywhere in it, with its line; TYPE_CHECKING blocks are left out."""
    found = []
    skipped: set[int] = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            skipped |= {id(n) for n in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(a.name, node.lineno) for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if node.module == "evomerge":
                found += [(f"evomerge.{a.name}", node.lineno) for a in node.names]
            else:
                found.append((node.module, node.lineno))
    return found


def unit(path: Path) -> str:
    """The module or sub-package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def layer(name: str) -> int:
    for index, names in enumerate(LAYERS):
        if name in names:
            return index
    raise AssertionError(f"evomerge/{name} is in no layer: add it to LAYERS and to CONTRIBUTING.md")


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py" or p.parent != PACKAGE)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downwards_and_engines_have_owners(path: Path) -> None:
    own = unit(path)
    for module, line in imports(path):
        top, *rest = module.split(".")
        where = f"{path.name}:{line} imports {module}"
        if top == "evomerge" and rest:
            assert layer(rest[0]) <= layer(own), f"{where}: from a higher layer"
            if own in ORDER and rest[0] in ORDER:
                assert ORDER[rest[0]] <= ORDER[own], f"{where}: search -> pool -> worker"
        elif top in OWNERS:
            assert own in OWNERS[top], f"{where}: only {sorted(OWNERS[top])} may"
        if layer(own) == 0 and own != "optimizers" and top != "evomerge":
            import sys

            assert top in PURE or top in sys.stdlib_module_names or top == "hypothesis", f"{where}: layer 0 is pure"


def test_the_reader_of_imports_sees_what_it_should() -> None:
    assert ("ray", imports_of("def f():\n    import ray\n")[0][1]) == ("ray", 2)
    assert imports_of("from evomerge import front\n")[0][0] == "evomerge.front"
    assert imports_of("if TYPE_CHECKING:\n    import ray\n") == []


def imports_of(text: str) -> list[tuple[str, int]]:
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(text)
        file.flush()
        return imports(Path(file.name))


def test_modules_stay_readable() -> None:
    long = {str(p): n for p in FILES if (n := len(p.read_text().splitlines())) > 450}
    assert not long, f"modules above 450 lines: {long}"


def test_search_is_the_file_to_read_first() -> None:
    assert len((PACKAGE / "search.py").read_text().splitlines()) < 300
