"""Recipes are written into the live model exactly, and nothing that is not finite gets past it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.errors import NonFinite, WeightsError
from evomerge.model import LiveModel
from evomerge.recipe import Recipe
from evomerge.weights import Weights

EXPERTS = ("red", "green", "blue")


def recipe(*weights: float, method: str = "task_arithmetic", **parameters: float) -> Recipe:
    experts = {e: {"weight": w} for e, w in zip(EXPERTS, weights, strict=True)}
    return Recipe.build(method, "base", experts, parameters=parameters)


def bits(live: LiveModel) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone().view(torch.uint8) for n, p in live.model.named_parameters()}


@pytest.mark.parametrize(("weights", "source"), [((0, 0, 0), "base"), ((1, 0, 0), "red"), ((0, 0, 1), "blue")])
def test_identity_recipes_are_copies_to_the_bit(work: Path, weights: tuple[float, ...], source: str) -> None:
    for name in ("base", *EXPERTS):  # signed zeros must survive
        tensors = load_file(work / name / "model.safetensors")
        tensors["model.norm.weight"][::2] = -0.0
        save_file(tensors, work / name / "model.safetensors", metadata={"format": "pt"})
    live = LiveModel("base")
    live.install(recipe(0.3, 0.4, 0.5), Weights(["base"]))
    live.install(recipe(*weights), Weights(["base"]))
    stored = load_file(work / source / "model.safetensors")
    for name, parameter in bits(live).items():
        assert torch.equal(parameter, stored[name].view(torch.uint8)), name


def test_the_same_recipe_gives_the_same_bits_whatever_was_installed_before(work: Path) -> None:
    live, weights = LiveModel("base"), Weights(["base"])
    live.install(recipe(0.2, 0.9, -0.4), weights)
    first = bits(live)
    for method in ("ties", "dare_ties", "dare_linear"):
        live.install(recipe(0.7, 0.1, 0.3, method=method), weights)
    live.install(recipe(0.2, 0.9, -0.4), weights)
    assert all(torch.equal(first[n], b) for n, b in bits(live).items())


def test_tied_weights_stay_tied(work: Path) -> None:
    live = LiveModel("base")
    live.install(recipe(0.2, 0.2, 0.2), Weights(["base"]))
    assert live.model.lm_head.weight.data_ptr() == live.model.model.embed_tokens.weight.data_ptr()


def test_resident_weights_are_never_written(work: Path) -> None:
    before = {e: load_file(work / e / "model.safetensors") for e in ("base", *EXPERTS)}
    weights = Weights(["base", *EXPERTS])
    live = LiveModel("base")
    for method in ("task_arithmetic", "ties", "dare_linear", "dare_ties"):
        live.install(recipe(0.3, 0.4, 0.5, method=method), weights)
    for model, tensors in before.items():
        for name, tensor in tensors.items():
            assert torch.equal(weights(model, name), tensor)


def test_non_finite_merged_weights_are_refused_by_tensor(work: Path) -> None:
    live, weights = LiveModel("base"), Weights(["base"])
    with pytest.raises(NonFinite, match=r"model\.embed_tokens\.weight"):
        live.install(recipe(1e38, 1e38, 1e38, **{"lambda": 1e38}), weights)
    live.install(recipe(0, 0, 0), weights)  # and the next candidate is whole again
    assert torch.equal(live.model.model.norm.weight, load_file("base/model.safetensors")["model.norm.weight"])


def test_non_finite_logits_are_noticed(work: Path) -> None:
    live = LiveModel("base")
    ids = torch.tensor([[1, 2, 3]])
    live.model(input_ids=ids)
    live.require_finite_logits()
    live.model.model.norm.weight.data[0] = float("nan")
    live.model(input_ids=ids)
    with pytest.raises(NonFinite, match="logits"):
        live.require_finite_logits()
    live.forget_logits()
    live.require_finite_logits()


def test_a_checkpoint_that_would_leave_random_layers_is_refused(work: Path) -> None:
    tensors = load_file(work / "base" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, work / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"up_proj"):
        LiveModel("base")
