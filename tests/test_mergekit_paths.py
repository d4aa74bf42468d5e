"""Exported paths with scales beside mergekit's own passthrough: tensors bit for bit, logits of plain transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evomerge.export import merge, mergekit_form
from evomerge.model import LiveModel
from evomerge.recipe import Recipe
from evomerge.scale_folding import fold_scales
from evomerge.strict_yaml import dump_yaml, load_yaml
from tests.golden.paths.make import FROZEN, HERE, MERGEKIT, SCALES, add_legacy_buffers, recipe, run_mergekit
from tests.test_layer_path import FAMILIES, MORE, logits, make, path

real = pytest.mark.skipif(not MERGEKIT.exists(), reason="mergekit is not installed (make bench-setup)")


def agree(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype, name
        assert torch.equal(ours[name].view(torch.uint8), expected.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("family", FROZEN)
def test_a_path_is_mergekits_to_the_bit(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the frozen outputs: from our form and from mergekit's, which is the one that mergekit was given."""
    shutil.copytree(HERE / family, tmp_path / family)
    monkeypatch.chdir(tmp_path / family)
    expected = load_file("expected.safetensors")
    made = recipe(family)
    assert Recipe.from_yaml(Path("recipe.yaml").read_text()) == made
    data, lost = mergekit_form(made)
    assert lost == [] and data == load_yaml(Path("mergekit.yml").read_text(), "mergekit.yml").data
    for file in ("recipe.yaml", "mergekit.yml"):
        read = Recipe.from_yaml(Path(file).read_text())
        merge(read, f"out-{file}")
        agree(load_file(f"out-{file}/model.safetensors"), expected)
    assert Path("out-recipe.yaml/mergekit_config.yml").read_text() == Path("mergekit.yml").read_text()
    assert any(not torch.equal(t, load_file("red/model.safetensors").get(n, t)) for n, t in expected.items())
    shutil.copytree("out-recipe.yaml", "theirs")
    shutil.copy("expected.safetensors", "theirs/model.safetensors")
    shutil.copy("expected.config.json", "theirs/config.json")
    assert torch.equal(logits(LiveModel("out-recipe.yaml")), logits(LiveModel("theirs")))


def both(
    family: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, lenient: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Merge a family's path with evomerge and with mergekit, compare tensors; returns both configurations."""
    make(family, folder)
    monkeypatch.chdir(folder)
    model_type = json.loads(Path("red/config.json").read_text())["model_type"]
    merge(recipe(model_type), "ours")
    for label in ("red", "blue") if model_type == "gpt_neox" else ():
        add_legacy_buffers(Path(label))
    theirs = run_mergekit(Path("ours/mergekit_config.yml"), Path("theirs"), folder, lenient=lenient)
    save_file(theirs, "theirs/model.safetensors", metadata={"format": "pt"})
    agree(load_file("ours/model.safetensors"), theirs)
    ours, other = (json.loads(Path(name, "config.json").read_text()) for name in ("ours", "theirs"))
    assert ours["n_layer" if family == "gpt2" else "num_hidden_layers"] == len(SCALES)
    return ours, other


def same_logits() -> bool:
    return torch.equal(logits(LiveModel("ours")), logits(LiveModel("theirs")))


# What mergekit 0.1.5 does with the exported recipes; docs/paths.md says the same.
SAME = (
    *("llama", "mistral", "phi3", "gpt2", "gpt_neox", "gemma", "granite", "stablelm", "glm4", "phi", "starcoder2"),
    "gpt_neox_serial",
)
TOO_FEW = ("smollm3", "olmo", "nemotron", "glm")  # it guesses their architecture, and leaves `num_hidden_layers`
LISTS = ("qwen2", "qwen3")
FAILS = {"cohere": "q_norm.weight required but not present", "stablelm_parallel": "required but not present"}
LOSES = ("llama_bias",)
NONE = ("gemma2", "gemma3")


def slow_but(family: str, *names: str) -> list[Any]:
    return [family, *(pytest.param(name, marks=pytest.mark.slow) for name in names if name != family)]


def test_no_family_is_forgotten() -> None:
    assert {*SAME, *TOO_FEW, *LISTS, *FAILS, *LOSES, *NONE} == {*FAMILIES, *MORE}


@real
@pytest.mark.parametrize("family", slow_but("llama", *SAME))
def test_mergekit_runs_what_is_exported(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = both(family, tmp_path, monkeypatch)
    assert ours == theirs and same_logits()
    assert "cannot express" not in Path("ours/mergekit_config.yml").read_text()


@real
@pytest.mark.parametrize("family", slow_but("qwen2", *LISTS))
def test_mergekit_forgets_the_lists_of_layer_types(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops; let go on, it makes the same tensors and a config.json that nothing loads. The exporter says so."""
    ours, theirs = both(family, tmp_path, monkeypatch, lenient=True)
    assert len(ours["layer_types"]) == len(SCALES) and len(theirs["layer_types"]) == 4
    assert "mergekit cannot express: layer_types of config.json" in Path("ours/mergekit_config.yml").read_text()
    with pytest.raises(RuntimeError, match="must be equal to the number of `layer_types`"):
        run_mergekit(Path("ours/mergekit_config.yml"), Path("again"), tmp_path)
    shutil.copy("ours/config.json", "theirs/config.json")
    assert same_logits()


@real
@pytest.mark.slow
@pytest.mark.parametrize("family", TOO_FEW)
def test_mergekit_forgets_the_number_of_layers(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, theirs = both(family, tmp_path, monkeypatch)
    assert theirs["num_hidden_layers"] == 4
    shutil.copy("ours/config.json", "theirs/config.json")
    assert same_logits()


@real
@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAILS, *LOSES])
def test_mergekit_does_not_know_all_their_tensors(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if family in FAILS:
        with pytest.raises(RuntimeError, match=FAILS[family]):
            both(family, tmp_path, monkeypatch)
        return
    with pytest.raises(AssertionError):
        both(family, tmp_path, monkeypatch)
    ours, theirs = load_file("ours/model.safetensors"), load_file("theirs/model.safetensors")
    assert {name.rpartition(".")[2] for name in ours.keys() - theirs.keys()} == {"bias"}
    agree({name: ours[name] for name in theirs}, theirs)


@pytest.mark.parametrize("family", NONE)
def test_where_mergekit_has_no_such_recipe_none_is_written(family: str, tmp_path: Path) -> None:
    """The checkpoint is, and plain transformers loads it; without scales mergekit's form is there too."""
    folder = make(family, tmp_path)
    stack = path(folder, ("red", 0, 2), ("blue", 1, 4))
    folded = fold_scales(stack, (1.0, 1.0, 0.5, 1.0, 1.0), "gemma2")
    merge(folded, str(tmp_path / "scaled"))
    merge(stack, str(tmp_path / "plain"))
    assert not (tmp_path / "scaled" / "mergekit_config.yml").exists()
    data, lost = mergekit_form(folded)
    assert data is None and len(lost) == 1 and "`shift`" in lost[0] and "another model" in lost[0]
    assert (tmp_path / "plain" / "mergekit_config.yml").read_text().endswith(dump_yaml(mergekit_form(stack)[0]))
    assert not torch.equal(logits(LiveModel(str(tmp_path / "scaled"))), logits(LiveModel(str(tmp_path / "plain"))))
    assert any("`shift`" in line for line in folded.to_mergekit()[1])
