"""Scales folded into weights: each family's folded model beside one whose hidden state is scaled by hooks."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge import registry, scale_folding
from evomerge.errors import CandidateFailure, RecipeError
from evomerge.export import merge
from evomerge.methods import Inputs, merge_tensor
from evomerge.model import LiveModel, check_architecture
from evomerge.recipe import Recipe, Slice, Source
from evomerge.scale_folding import UNFOLDABLE, WRITERS, Writers, fold_scales, foldable
from evomerge.weights import Weights
from tests import slow_methods as slow
from tests.conftest import ROOT
from tests.test_layer_path import FAMILIES, MORE, SCALES, cached, layers, logits, make, path

PASSTHROUGH = registry.get("methods", "passthrough")
SPLICE = (("base", 0, 2), ("red", 1, 3), ("base", 2, 4))
LOSS = 5e-5  # of the range of the logits: the largest difference between folded and unfolded that is allowed


def unfolded(live: LiveModel, scales: tuple[float, ...] = SCALES) -> Tensor:
    """The logits when the hidden state itself is multiplied before each layer."""
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, w=w: (w * args[0], *args[1:]))
        for layer, w in zip(layers(live), scales, strict=True)
    ]
    found = logits(live)
    for hook in hooks:
        hook.remove()
    return found


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the range of `b`."""
    return float((a - b).abs().max() / (b.max() - b.min()))


def fold_and_compare(folder: Path) -> tuple[LiveModel, Recipe, float, float]:
    """The live model with the folded path; how far it is from the unfolded one, and that one from no scales."""
    live, weights = LiveModel(str(folder / "base")), Weights([str(folder / "base")])
    stack = path(folder, *SPLICE)
    live.install(stack, weights)
    plain, wanted = logits(live), unfolded(live)
    folded = fold_scales(stack, SCALES, live.model.config.model_type)
    live.install(folded, weights)
    return live, folded, apart(logits(live), wanted), apart(plain, wanted)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_the_folded_model_is_the_scaled_one(family: str, tmp_path: Path) -> None:
    """And for families that test_layer_path does not know: cached logits, and those of the exported checkpoint."""
    live, folded, lost, moved = fold_and_compare(make(family, tmp_path))
    assert foldable(live.model.config.model_type) and check_architecture(live.checkpoint) == []
    assert lost < LOSS and moved > 0.05, (lost, moved)
    if family in MORE:
        found = logits(live)
        assert torch.allclose(cached(live), found, rtol=1e-4, atol=1e-5)
        merge(folded, str(tmp_path / "out"))
        assert torch.equal(found, logits(LiveModel(str(tmp_path / "out"))))


def test_every_family_on_the_list_is_tried() -> None:
    import transformers

    tried = set()
    for name, _ in {**FAMILIES, **MORE}.values():
        text = "TextConfig" if name == "Gemma3" else "Config"
        tried.add(getattr(transformers, f"{name}{text}").model_type)
    assert tried == set(WRITERS)
    assert not set(WRITERS) & set(UNFOLDABLE)
    listed = (ROOT / "docs" / "paths.md").read_text()
    assert all(f"`{name}`" in listed for name in (*WRITERS, *UNFOLDABLE))


@pytest.mark.parametrize("family", ["gemma2", "llama_bias"])
def test_in_bfloat16_the_folded_model_is_as_near_as_rounding_lets_it(family: str, tmp_path: Path) -> None:
    folder = make(family, tmp_path)
    stack = path(folder, *SPLICE)
    wide, narrow = (LiveModel(str(folder / "base"), dtype=dtype) for dtype in (None, torch.bfloat16))
    weights = Weights([str(folder / "base")])
    for live in (wide, narrow):
        live.install(stack, weights)
    wanted = unfolded(wide)
    noise = apart(unfolded(narrow).float(), wanted)
    narrow.install(fold_scales(stack, SCALES, wide.model.config.model_type), weights)
    assert apart(logits(narrow).float(), wanted) < 3 * noise, noise


def test_layers_that_read_the_state_without_a_norm_do_not_fold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OLMo 2: with its norms' gains divided the model is another one, so it is refused."""
    from tests import test_layer_path

    monkeypatch.setitem(test_layer_path.MORE, "olmo2", ("Olmo2", {}))
    folder = make("olmo2", tmp_path)
    assert not foldable("olmo2")
    with pytest.raises(RecipeError, match=r"olmo2 model cannot be folded into its weights: .*without a norm"):
        fold_scales(path(folder, *SPLICE), SCALES, "olmo2")
    forced = Writers(("post_attention_layernorm", "post_feedforward_layernorm"))
    monkeypatch.setitem(scale_folding.WRITERS, "olmo2", forced)
    _, _, lost, _ = fold_and_compare(folder)
    assert lost > 100 * LOSS


def test_a_family_that_nobody_has_tried_is_refused(tmp_path: Path) -> None:
    stack = path(tmp_path, ("base", 0, 2))
    with pytest.raises(RecipeError, match=r"mamba model cannot be folded.*nobody has tried it.*llama"):
        fold_scales(stack, (1.0, 2.0), "mamba")
    assert fold_scales(stack, (1.0, 1.0), "mamba") == stack
    assert not foldable("mamba") and not foldable("gemma3") and foldable("gemma3_text")


def test_all_problems_of_scales_are_named_at_once(tmp_path: Path) -> None:
    stack = path(tmp_path, ("base", 0, 3))
    with pytest.raises(RecipeError) as caught:
        fold_scales(stack, (0.0, float("nan"), -2.0), "mamba")
    said = [problem.message for problem in caught.value.problems]
    assert [text.partition(" is ")[2] for text in said[:3]] == ["0.0", "nan", "-2.0"] and "mamba" in said[3]
    with pytest.raises(RecipeError, match=r"positions 0 to 1 multiply to 1e\+16"):
        fold_scales(stack, (1e8, 1e8, 1.0), "llama")
    with pytest.raises(RecipeError, match="the path of the recipe is empty"):
        fold_scales(Recipe("passthrough", ()), (), "llama")
    folded = fold_scales(stack, (1.0, 2.0, 1.0), "gemma2")
    with pytest.raises(RecipeError, match=r"have a `s(cale|hift)` already"):
        fold_scales(folded, (1.0, 1.0, 1.0), "gemma2")


def test_shifts_are_read_written_and_part_of_the_fingerprint(tmp_path: Path) -> None:
    folded = fold_scales(path(tmp_path, ("base", 0, 2)), (1.0, 0.8), "gemma2")
    assert Recipe.from_yaml(folded.to_yaml()) == folded
    (_, scaled) = folded.slices
    values = dict(scaled.sources[0].parameters)
    assert [c.value for c in values["scale"]] == [1.25, 1.25, 1.0]  # type: ignore[union-attr]
    assert [c.value for c in values["shift"]] == [0.25, 0.25, 0.0]  # type: ignore[union-attr]
    bare = Source(scaled.sources[0].model, scaled.sources[0].layers, (("scale", values["scale"]),))
    assert replace(folded, slices=(folded.slices[0], Slice((bare,)))).fingerprint != folded.fingerprint


DYADIC = st.integers(-24, 24).map(lambda v: v / 8)


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(
    st.lists(DYADIC, min_size=1, max_size=30),
    st.sampled_from([0.125, 0.5, 1.0, 1.25, 2.0]),
    DYADIC,
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_passthrough_is_the_slow_restatement(
    values: list[float], scale: float, shift: float, dtype: torch.dtype
) -> None:
    tensor = torch.tensor(values, dtype=dtype)
    result = PASSTHROUGH(Inputs("w", None, (tensor,)), scale=scale, shift=shift)
    assert result.double().tolist() == slow.passthrough(values, scale, shift)  # exact in float32
    assert (result is tensor) == (scale == 1.0 and shift == 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_loop_and_torch_give_the_same_bits_with_one_rounding(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evomerge.methods import _fused

    tensor = torch.randn(1000, 1100, generator=torch.Generator().manual_seed(3)).to(dtype)  # more than one chunk
    tensor.view(-1)[:3] = torch.tensor([-0.0, 0.0, 1e-40]).to(dtype)
    models = {"m": tensor}
    found = []
    for usable in (True, False):
        if not usable:
            monkeypatch.setattr(_fused, "usable", lambda x: False)
        for own in ({"scale": 0.7, "shift": 0.3}, {"scale": 1.0, "shift": -0.1}, {"scale": 0.7}):
            recipe = Recipe.build("passthrough", None, {"m": own})
            (plan,) = recipe.plan(["model.layers.0.w"], 1)
            found.append(merge_tensor(plan, lambda model, name: models[model], recipe))
    kind = {4: torch.int32, 2: torch.int16}[tensor.element_size()]
    assert all(torch.equal(a.view(kind), b.view(kind)) for a, b in zip(found[:3], found[3:], strict=True))
    assert torch.equal(found[0], (tensor.float() * 0.7 + 0.3).to(dtype))
    assert torch.signbit(found[2].view(-1)[0])  # without a shift -0.0 keeps its sign


def test_a_scale_that_is_not_positive_is_refused_where_a_model_is_made(tmp_path: Path) -> None:
    folder = make("llama", tmp_path)
    live, weights = LiveModel(str(folder / "base")), Weights([str(folder / "base")])

    def install(**own: Any) -> None:
        source = Source(str(folder / "base"), (0, 3), tuple(own.items()))
        live.install(Recipe("passthrough", (Slice((source,)),)), weights)

    for bad in (0.0, -1.0):
        with pytest.raises(CandidateFailure, match=rf"the scale of model\..* is {bad:g}") as caught:
            install(scale=bad)
        assert caught.value.reason == "bad_scale"
    for name in ("scale", "shift"):
        for bad in (float("nan"), float("inf")):
            with pytest.raises(RecipeError, match=rf"parameters\.{name}: {bad} in the recipe"):
                install(**{name: bad})
            with pytest.raises(CandidateFailure, match=f"the {name} of w is {bad}"):
                PASSTHROUGH(Inputs("w", None, (torch.ones(2),)), **{name: bad})
    install(scale=0.5)


def test_mergekits_own_recipes_may_silence_a_block() -> None:
    """Block expansion as people write it for mergekit: new layers whose output projections are 0."""
    tensor: Any = torch.ones(3)
    assert PASSTHROUGH(Inputs("w", None, (tensor,), compat="mergekit"), scale=0.0).tolist() == [0.0] * 3


def test_the_page_gives_the_measured_differences() -> None:
    """Each row of the table in docs/paths.md is a family that the tests try, with a figure below their limit."""
    rows = re.findall(r"^\| ([a-z]\w+) \|.*\| ([\d.e-]+) \|$", (ROOT / "docs" / "paths.md").read_text(), re.MULTILINE)
    assert {name for name, _ in rows} == {*FAMILIES, *MORE}
    assert all(0 < ast.literal_eval(figure) < LOSS for _, figure in rows)


def test_the_card_reads_a_path_in_one_line() -> None:
    from evomerge.card import _layers

    stack = path(Path(), ("base", 0, 2), ("red", 1, 2))
    line = _layers(stack)
    assert line.startswith("A path of 3 layers: base 0-1, red 1. The checkpoint") and "folded" not in line
    assert "are folded into the weights" in _layers(fold_scales(stack, (1.0, 1.0, 2.0), "llama"))
    assert _layers(Recipe.build("passthrough", None, {"red": {}})) == ""
    assert _layers(Recipe.build("linear", None, {"red": {}, "base": {}})) == ""
