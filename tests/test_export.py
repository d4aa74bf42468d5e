"""What was scored is what is exported: tensors, bytes and scores, and mergekit's own results for its files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from evomerge import registry
from evomerge.errors import ConfigError, EnvironmentProblem, NonFinite
from evomerge.export import merge
from evomerge.model import LiveModel
from evomerge.objectives import ObjectiveSpec, make_objective
from evomerge.recipe import Recipe
from evomerge.weights import Weights

GOLDEN = Path(__file__).parent / "golden" / "e2e"
INDEX = json.loads((GOLDEN / "index.json").read_text())["recipes"]
EXPERTS = ("red", "green", "blue")


def command(*args: str, cwd: Path | None = None, seed: str = "0") -> None:
    env = {**os.environ, "PYTHONHASHSEED": seed}
    subprocess.run([sys.executable, "-m", "evomerge", *args], check=True, capture_output=True, cwd=cwd, env=env)


@pytest.mark.parametrize("case", INDEX, ids=lambda c: c["name"])
def test_mergekits_own_configurations_give_mergekits_tensors(case: dict, tmp_path: Path) -> None:
    if case["method"] not in registry.names("methods"):
        pytest.skip(f"the method {case['method']} does not exist yet")
    out = tmp_path / "out"
    command("merge", case["config"], str(out), cwd=GOLDEN)
    ours, theirs = load_file(out / "model.safetensors"), load_file(GOLDEN / case["expected"])
    assert list(ours) == list(theirs)
    fragile = load_file(GOLDEN / case["fragile"]) if "fragile" in case else {}
    unequal = total = 0
    for name, expected in theirs.items():
        got = ours[name]
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype), name
        keep = torch.ones(expected.numel(), dtype=torch.bool)
        keep[fragile.get(name, torch.zeros(0)).long()] = False
        a, b = got.flatten()[keep].double(), expected.flatten()[keep].double()
        assert ((a - b).abs() <= case["atol"] + case["rtol"] * b.abs()).all(), name
        unequal += int((a != b).sum())
        total += a.numel()
    assert unequal <= case["max_unequal_fraction"] * total
    config = json.loads((out / "config.json").read_text())
    expected_config = json.loads((GOLDEN / Path(case["expected"]).parent / "config.json").read_text())
    for key in ("num_hidden_layers", "dtype", "vocab_size", "hidden_size", "tie_word_embeddings"):
        assert config[key] == expected_config[key], key


def recipe(method: str = "task_arithmetic", **parameters: float) -> Recipe:
    experts = {e: {"weight": 0.2 + 0.3 * i} for i, e in enumerate(EXPERTS)}
    if method in ("ties", "dare_ties"):
        experts = {e: {**p, "density": 0.4} for e, p in experts.items()}
    return Recipe.build(method, "base", experts, parameters=parameters, seed=5)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "linear"])
@pytest.mark.parametrize("shard", [5_000_000_000, 3_000])
def test_the_written_model_is_the_live_model(work: Path, method: str, shard: int) -> None:
    made = recipe(method)
    merge(made, "out", shard_bytes=shard)
    live = LiveModel("base")
    live.install(made, Weights(["base"]))
    files = list(Path("out").glob("*.safetensors"))
    assert (len(files) > 1) == (shard < 10_000)
    stored = {k: v for f in files for k, v in load_file(f).items()}
    tensors = dict(live.model.named_parameters())
    assert set(stored) == set(tensors)
    for name, parameter in tensors.items():
        assert torch.equal(stored[name].view(torch.uint8), parameter.view(torch.uint8)), name
    assert max(f.stat().st_size for f in files) < shard + 40_000
    loaded = LiveModel("out")  # through plain transformers
    for spec in OBJECTIVES:
        objective = make_objective(spec)
        ours, theirs = objective.score(live, "search"), objective.score(loaded, "search")
        assert np.array_equal(ours.items, theirs.items) and ours.value == theirs.value


OBJECTIVES = (
    ObjectiveSpec("pick", "lm_eval", {"file": "pick.yaml"}),
    ObjectiveSpec("write", "lm_eval", {"file": "write.yaml", "metric": "exact_match"}),
    ObjectiveSpec("text", "perplexity", {"files": {"search": "text.search.txt"}}),
)


def test_two_processes_write_identical_bytes(work: Path) -> None:
    Path("r.yaml").write_text(recipe("dare_ties").to_yaml())
    command("merge", "r.yaml", "one", seed="1")
    command("merge", "r.yaml", "two", seed="2")
    for file in sorted(Path("one").iterdir()):
        assert file.read_bytes() == Path("two", file.name).read_bytes(), file.name
    again = Recipe.from_yaml(Path("one/recipe.yaml").read_text())
    assert again == recipe("dare_ties")
    yaml.safe_load(Path("one/mergekit_config.yml").read_text())


def test_a_failed_merge_leaves_nothing(work: Path) -> None:
    before = sorted(Path().iterdir())
    with pytest.raises(NonFinite):
        merge(overflowing(), "out")
    assert sorted(Path().iterdir()) == before
    shutil.rmtree("green")
    with pytest.raises(EnvironmentProblem, match="green"):
        merge(recipe(), "out")
    Path("taken").mkdir()
    Path("taken", "file").touch()
    with pytest.raises(ConfigError, match="exists already"):
        merge(recipe(), "taken")
    assert not Path("out").exists()


def overflowing() -> Recipe:
    return Recipe.build("task_arithmetic", "base", {e: {"weight": 1e38} for e in EXPERTS}, parameters={"lambda": 1e38})


def test_what_a_killed_merge_left_is_cleared_by_the_next(work: Path) -> None:
    stale = Path(".out.partial-999999")
    stale.mkdir()
    (stale / "part-1").touch()
    merge(recipe(), "out")
    assert not stale.exists()
    assert not list(Path().glob(".out.partial-*"))


def test_layer_stacks_get_a_configuration_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(GOLDEN / "models", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "models" / "base" / "config.json"
    config = json.loads(path.read_text())
    config["layer_types"] = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    path.write_text(json.dumps(config))
    stack = [{"sources": [{"model": "models/base", "layer_range": r}]} for r in ([0, 3], [1, 4])]
    merge(Recipe.from_dict({"merge_method": "passthrough", "slices": stack}), "out")
    written = json.loads(Path("out/config.json").read_text())
    full, sliding = "full_attention", "sliding_attention"
    assert written["num_hidden_layers"] == 6
    assert written["layer_types"] == [full, full, sliding, full, sliding, full]


def test_a_tokenizer_that_would_be_ignored_is_refused(work: Path) -> None:
    data = recipe().to_mergekit()[0] | {"tokenizer_source": "union"}
    with pytest.raises(ConfigError, match="tokenizer_source"):
        merge(Recipe.from_dict(data), "out")
    merge(Recipe.from_dict(data | {"tokenizer_source": "base"}), "out")
    assert Path("out/model.safetensors").stat().st_mode & 0o777 == Path("out/config.json").stat().st_mode & 0o777
