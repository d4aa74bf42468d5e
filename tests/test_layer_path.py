"""Recipes of other stacks of layers in the live model: shared weights, the exported logits, and the way back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from evomerge.errors import CandidateFailure, ConfigError, NonFinite, RecipeError
from evomerge.export import merge
from evomerge.model import LiveModel, check_architecture
from evomerge.objectives import ObjectiveSpec, make_objective
from evomerge.recipe import Recipe, Slice, Source
from evomerge.scale_folding import fold_scales
from evomerge.weights import Weights

TOKENIZER = Path(__file__).parent / "golden" / "e2e" / "models" / "base" / "tokenizer.json"
N = 4
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": N, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
HEADS: dict[str, Any] = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}
MIXED: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 6}),
    "qwen2": ("Qwen2", MIXED),
    "qwen3": ("Qwen3", {"head_dim": 8, **MIXED}),
    "gemma2": ("Gemma2", HEADS),
    "gemma3": ("Gemma3", {**HEADS, "sliding_window_pattern": 3}),
    "phi3": ("Phi3", {}),
    "gpt2": ("GPT2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox": ("GPTNeoX", {}),
}
MORE: dict[str, tuple[str, dict[str, Any]]] = {  # families with one test each, in test_scale_folding
    "gemma": ("Gemma", {"head_dim": 8}),
    "smollm3": ("SmolLM3", {}),
    "olmo": ("Olmo", {}),
    "granite": ("Granite", {"residual_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 2.0}),
    "cohere": ("Cohere", {}),
    "stablelm": ("StableLm", {}),
    "stablelm_parallel": ("StableLm", {"use_parallel_residual": True}),
    "nemotron": ("Nemotron", {"attention_bias": True, "mlp_bias": True}),
    "glm": ("Glm", {"head_dim": 8}),
    "glm4": ("Glm4", {"head_dim": 8}),
    "phi": ("Phi", {}),
    "starcoder2": ("Starcoder2", {"use_bias": True}),
    "gpt_neox_serial": ("GPTNeoX", {"use_parallel_residual": False}),
    "llama_bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
}
IDS = torch.tensor([[5, 9, 31, 7, 2, 40, 11, 3, 17, 60, 21, 8]])


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("plain"))


def make(family: str, folder: Path, **changes: Any) -> Path:
    """A base of four random layers and two experts, as folders."""
    import transformers

    name, more = {**FAMILIES, **MORE}[family]
    config_class = getattr(transformers, f"{name}{'Text' if name == 'Gemma3' else ''}Config")
    model_class = getattr(transformers, f"{name}{'LMHeadModel' if name == 'GPT2' else 'ForCausalLM'}")
    sizes = {k: v for k, v in SMALL.items() if name != "GPT2" or k not in ("num_key_value_heads", "intermediate_size")}
    torch.manual_seed(0)
    model = model_class(config_class(**{**sizes, **more, **changes}))
    for label, size in (("base", 0.1), ("red", 0.02), ("blue", 0.02)):
        for parameter in model.parameters():
            parameter.data += size * torch.randn_like(parameter)
        model.save_pretrained(folder / label)
        shutil.copy(TOKENIZER, folder / label / "tokenizer.json")
        special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "!", "pad_token": "!"}
        (folder / label / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


def path(folder: Path, *pieces: tuple[str, int, int], scale: Any = None) -> Recipe:
    """A passthrough recipe of layers [first, past last) of models."""
    own = {} if scale is None else {"parameters": {"scale": scale}}
    slices = [
        {"sources": [{"model": str(folder / model), "layer_range": [first, past], **own}]}
        for model, first, past in pieces
    ]
    return Recipe.from_dict({"merge_method": "passthrough", "slices": slices, "compat": "paper"})


@torch.no_grad()
def logits(live: LiveModel, ids: Tensor = IDS) -> Tensor:
    return live.model(input_ids=ids).logits


@torch.no_grad()
def cached(live: LiveModel) -> Tensor:
    """The logits one token at a time, with a cache."""
    cache, found = None, []
    for i in range(IDS.shape[1]):
        out = live.model(input_ids=IDS[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, dim=1)


def layers(live: LiveModel) -> Any:
    return live.layers._layers


STACKS: dict[str, tuple[tuple[str, int, int], ...]] = {
    "repeat": (("base", 0, 3), ("base", 1, 4)),
    "skip": (("base", 0, 1), ("base", 2, 4)),
    "splice": (("base", 0, 2), ("red", 1, 3), ("blue", 1, 4)),
    "swap": (("base", 0, 1), ("base", 2, 3), ("base", 1, 2), ("base", 3, 4)),
    "thrice": (("base", 0, 4),) * 3,
}


def test_a_path_is_the_exported_model_and_the_way_back_is_exact(models: Path, tmp_path: Path) -> None:
    live, weights = LiveModel(str(models / "base")), Weights([str(models / "base")])
    assert check_architecture(live.checkpoint) == []
    ordinary = path(models, ("red", 0, N))
    before_config = json.dumps(live.model.config.to_dict(), sort_keys=True, default=str)
    live.install(ordinary, weights)
    before = logits(live)
    for name, stack in STACKS.items():
        recipe = path(models, *stack)
        live.install(recipe, weights)
        found = logits(live)
        merge(recipe, str(tmp_path / name))
        exported = LiveModel(str(tmp_path / name))
        assert torch.equal(found, logits(exported)), name
        assert len(layers(live)) == exported.model.config.num_hidden_layers == live.model.config.num_hidden_layers
        assert live.model.config.to_dict().get("layer_types") == exported.model.config.to_dict().get("layer_types")
        assert torch.allclose(cached(live), found, rtol=1e-4, atol=1e-5), name
        assert not torch.equal(found, before)
        live.install(ordinary, weights)
        assert torch.equal(logits(live), before), name
        assert json.dumps(live.model.config.to_dict(), sort_keys=True, default=str) == before_config


def test_generation_with_a_cache_goes_on_as_without(models: Path) -> None:
    live = LiveModel(str(models / "base"))
    live.install(path(models, *STACKS["repeat"]), Weights([str(models / "base")]))
    made = [
        live.model.generate(IDS, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=use)
        for use in (True, False)
    ]
    assert made[0].shape[1] == IDS.shape[1] + 8
    assert torch.equal(*made)


def test_layer_types_follow_their_layers(tmp_path: Path) -> None:
    folder = make("gemma2", tmp_path)  # sliding, full, sliding, full
    live = LiveModel(str(folder / "base"))
    live.install(path(folder, ("base", 1, 2), ("base", 1, 4)), Weights([str(folder / "base")]))
    sliding, full = "sliding_attention", "full_attention"
    assert live.model.config.layer_types == [full, full, sliding, full]
    assert [layer.self_attn.sliding_window for layer in layers(live)] == [None, None, 6, None]
    assert [layer.self_attn.layer_idx for layer in layers(live)] == [0, 1, 2, 3]


def test_positions_share_what_they_hold(llama: Path) -> None:
    live, weights = LiveModel(str(llama / "base")), Weights([str(llama / "base")])
    recipe = path(llama, ("base", 0, 4), ("base", 1, 3), ("red", 3, 4), ("red", 3, 4))
    live.install(recipe, weights)
    places = [{n: p.data_ptr() for n, p in layer.named_parameters()} for layer in layers(live)]
    assert places[1] == places[4] and places[2] == places[5] and places[6] == places[7]
    assert len({p["mlp.up_proj.weight"] for p in places}) == 5
    own = {t.data_ptr() for t in live._live.values()}
    assert sum(t not in own for t in {p["mlp.up_proj.weight"] for p in places}) == 1  # one more than the base has
    again = path(llama, ("base", 0, 3), ("base", 0, 4), ("blue", 0, 1))
    live.install(again, weights)
    assert len({layer.mlp.up_proj.weight.data_ptr() for layer in layers(live)}) == 5
    assert all(len(slots) <= N + 1 for slots in live.layers._slots.values())  # what was allocated serves again


def test_only_what_no_live_tensor_holds_is_written(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evomerge.methods import Merge

    live, weights = LiveModel(str(llama / "base")), Weights([str(llama / "base")])
    written: list[str] = []
    write = Merge.write
    monkeypatch.setattr(Merge, "write", lambda self, plan, to: (written.append(plan.name), write(self, plan, to))[1])
    live.install(path(llama, *STACKS["repeat"]), weights)
    assert len(written) == len(live.checkpoint.names)
    written.clear()
    live.install(path(llama, *STACKS["swap"]), weights)
    assert written == []
    live.install(path(llama, ("base", 0, 2), ("red", 1, 2), ("base", 3, 4), ("base", 2, 3)), weights)
    assert {name.split(".")[2] for name in written} == {"2"} and len(written) == 9
    written.clear()
    scaled = path(
        llama, ("base", 0, 1), ("base", 3, 4), ("base", 2, 4), scale=[{"filter": "o_proj", "value": 0.5}, {"value": 1}]
    )
    live.install(scaled, weights)
    assert {name.partition(".self_attn")[2] for name in written} == {".o_proj.weight"} and len(written) == 3


def test_after_an_ordinary_recipe_a_path_has_its_own_weights(llama: Path) -> None:
    live, weights = LiveModel(str(llama / "base")), Weights([str(llama / "base")])
    recipe, ordinary = path(llama, *STACKS["splice"]), path(llama, ("red", 0, N))
    live.install(recipe, weights)
    first = logits(live)
    live.install(ordinary, weights)
    live.install(recipe, weights)
    assert torch.equal(logits(live), first)


def merged(folder: Path, method: str, *ranges: tuple[int, int], **parameters: Any) -> Recipe:
    models = [str(folder / m) for m in ("base", "red", "blue")]
    slices = [{"sources": [{"model": m, "layer_range": list(r)} for m in models]} for r in ranges]
    data = {"merge_method": method, "base_model": models[0], "slices": slices, "parameters": parameters}
    return Recipe.from_dict({**data, "compat": "paper", "seed": 3})


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("task_arithmetic", {"weight": 0.4, "lines_beta": 0.5}), ("dare_ties", {"weight": 0.5, "density": 0.4})],
)
def test_merged_stacks_are_the_exported_model(
    llama: Path, tmp_path: Path, method: str, parameters: dict[str, Any]
) -> None:
    """Random masks and depth lines depend on the position: a repeated layer is then another one."""
    live, weights = LiveModel(str(llama / "base")), Weights([str(llama / "base")])
    recipe = merged(llama, method, (0, 3), (1, 4), **parameters)
    live.install(path(llama, *STACKS["thrice"]), weights)
    live.install(recipe, weights)
    merge(recipe, str(tmp_path / "out"))
    exported = LiveModel(str(tmp_path / "out"))
    assert torch.equal(logits(live), logits(exported))
    assert len({layer.mlp.up_proj.weight.data_ptr() for layer in layers(live)}) == 6


def test_hidden_states_and_attentions_are_those_of_the_exported_model(models: Path, tmp_path: Path) -> None:
    recipe = path(models, *STACKS["repeat"])
    live = LiveModel(str(models / "base"))
    live.install(recipe, Weights([str(models / "base")]))
    merge(recipe, str(tmp_path / "out"))
    with torch.no_grad():
        ours, theirs = (
            m.model(input_ids=IDS, output_hidden_states=True).hidden_states
            for m in (live, LiveModel(str(tmp_path / "out")))
        )
    assert len(ours) == len(theirs) == 7
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_failed_merge_does_not_spoil_the_next_path(llama: Path) -> None:
    live, weights = LiveModel(str(llama / "base")), Weights([str(llama / "base")])
    good = path(llama, *STACKS["repeat"])
    live.install(good, weights)
    expected = logits(live)
    for recipe in (
        merged(llama, "task_arithmetic", (0, 4), weight=1e38),
        merged(llama, "task_arithmetic", (0, 3), (2, 4), weight=1e38),
    ):
        with pytest.raises(NonFinite):
            live.install(
                Recipe.from_dict({**recipe.to_dict(), "parameters": {"weight": 1e38, "lambda": 1e38}}), weights
            )
        live.install(good, weights)
        assert torch.equal(logits(live), expected)
    fresh = LiveModel(str(llama / "base"))
    for tensor in fresh._live.values():
        tensor.fill_(float("nan"))
    fresh.install(good, weights)
    assert torch.equal(logits(fresh), expected)


def test_paths_that_make_no_sense_are_refused_by_name(llama: Path, tmp_path: Path) -> None:
    live, weights = LiveModel(str(llama / "base")), Weights([str(llama / "base")])
    base = str(llama / "base")
    for slices in ((), (Slice((Source(base, (1, 1)),)),)):
        with pytest.raises(CandidateFailure, match="empty"):
            live.install(Recipe("passthrough", slices), weights)
    with pytest.raises(CandidateFailure, match=r"13 layers, and the base 4.*\n.*at most 3 times"):
        live.install(path(llama, *STACKS["thrice"], ("base", 0, 1)), weights)
    wide = make("llama", tmp_path / "wide", hidden_size=40, num_attention_heads=5, num_key_value_heads=5)
    slices = [*path(llama, ("base", 0, 2)).slices, *path(wide, ("red", 1, 4)).slices]
    with pytest.raises(CandidateFailure, match=r"red: model\.embed_tokens.*\(64, 40\), but \(64, 32\)"):
        live.install(Recipe("passthrough", tuple(slices)), weights)
    live.install(path(llama, ("base", 0, N)), weights)
    assert len(layers(live)) == N


def test_layers_of_different_types_do_not_meet_at_a_position(tmp_path: Path) -> None:
    folder = make("gemma2", tmp_path)
    live = LiveModel(str(folder / "base"))
    sources = [
        {"model": str(folder / "base"), "layer_range": [0, 2]},
        {"model": str(folder / "red"), "layer_range": [1, 3]},
    ]
    data = {
        "merge_method": "linear",
        "slices": [{"sources": sources}],
        "parameters": {"weight": 0.5},
        "compat": "paper",
    }
    recipe = Recipe.from_dict(data)
    for refuse in (
        lambda: live.install(recipe, Weights([str(folder / "base")])),
        lambda: merge(recipe, str(tmp_path / "x")),
    ):
        with pytest.raises((CandidateFailure, ConfigError), match=r"layers 0, 1, .*sliding_attention, full_attention"):
            refuse()


def test_an_architecture_that_cannot_follow_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that do not take over their place in the cache give other logits with it."""
    live, weights = LiveModel(str(llama / "base")), Weights([str(llama / "base")])
    fill = type(live.layers)._fill

    def same_place(self: Any, module: Any, position: int, source: int, tensors: Any) -> None:
        fill(self, module, position, source, tensors)
        module.self_attn.layer_idx = source

    monkeypatch.setattr(type(live.layers), "_fill", same_place)
    with pytest.raises(CandidateFailure, match="cannot be stacked"):
        live.install(path(llama, *STACKS["repeat"]), weights)
    live.install(path(llama, ("base", 0, N)), weights)


def test_a_model_whose_lists_of_layers_have_a_fixed_form_is_refused(tmp_path: Path) -> None:
    """GPT-Neo's configuration fixes which layers attend locally, by a pattern that must fit their number."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 64}
    GPTNeoForCausalLM(GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 2]])).save_pretrained(
        tmp_path / "base"
    )
    shutil.copy(TOKENIZER, tmp_path / "base" / "tokenizer.json")
    live = LiveModel(str(tmp_path / "base"))
    with pytest.raises(CandidateFailure, match="GPTNeoForCausalLM cannot be"):
        live.install(path(tmp_path, *STACKS["repeat"]), Weights([str(tmp_path / "base")]))


SCALES = (1.0, 0.8, 1.0, 1.25, 1.5, 0.9)


def test_folded_scales_scale_the_hidden_state(models: Path, tmp_path: Path) -> None:
    live, weights = LiveModel(str(models / "base")), Weights([str(models / "base")])
    model_type = live.model.config.model_type
    stack = path(models, ("base", 0, 2), ("red", 1, 3), ("base", 2, 4))
    assert fold_scales(stack, (1.0,) * 6, model_type).plan(live.checkpoint.names, N) == stack.plan(
        live.checkpoint.names, N
    )
    folded = fold_scales(stack, SCALES, model_type)
    live.install(folded, weights)
    found = logits(live)
    assert Recipe.from_yaml(folded.to_yaml()) == folded and len(folded.to_mergekit()[0]["slices"]) == len(folded.slices)
    merge(folded, str(tmp_path / "out"))
    assert torch.equal(found, logits(LiveModel(str(tmp_path / "out"))))
    live.install(stack, weights)
    plain = logits(live)
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, w=w: (w * args[0], *args[1:]))
        for layer, w in zip(layers(live), SCALES, strict=True)
    ]
    unfolded = logits(live)
    for hook in hooks:
        hook.remove()
    apart = float((found - unfolded).abs().max() / unfolded.abs().max())
    assert apart < 1e-4, apart  # the epsilon of the norms
    assert float((plain - unfolded).abs().max() / unfolded.abs().max()) > 1e-2


def test_scales_that_cannot_be_are_refused_by_position(llama: Path) -> None:
    stack = path(llama, *STACKS["skip"])
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(RecipeError, match="scale of position 1 is"):
            fold_scales(stack, (1.0, bad, 1.0), "llama")
    with pytest.raises(RecipeError, match="2 scales for a path of 3 layers"):
        fold_scales(stack, (1.0, 1.0), "llama")
    with pytest.raises(RecipeError, match="`scale` already"):
        fold_scales(path(llama, ("base", 0, 1), scale=0.5), (1.0,), "llama")
    with pytest.raises(RecipeError, match="the recipe is a task_arithmetic"):
        fold_scales(merged(llama, "task_arithmetic", (0, 1), weight=1.0), (1.0,), "llama")


def test_objectives_score_a_path_as_they_score_the_exported_model(work: Path) -> None:
    stack = path(Path(), ("base", 0, 2), ("red", 0, 2), ("base", 1, 2))
    live = LiveModel("base")
    live.install(stack, Weights(["base"]))
    merge(stack, "out")
    exported = LiveModel("out")
    specs = (
        ObjectiveSpec("pick", "lm_eval", {"file": "pick.yaml"}),
        ObjectiveSpec("write", "lm_eval", {"file": "write.yaml", "metric": "exact_match"}),
        ObjectiveSpec("text", "perplexity", {"files": {"search": "text.search.txt"}}),
    )
    for spec in specs:
        objective = make_objective(spec)
        ours, theirs = objective.score(live, "search"), objective.score(exported, "search")
        assert np.array_equal(ours.items, theirs.items) and ours.value == theirs.value, spec.name


def piece(model: str, first: int, past: int, **parameters: Any) -> dict[str, Any]:
    own = {"parameters": parameters} if parameters else {}
    return {"sources": [{"model": model, "layer_range": [first, past], **own}]}


def types_meet() -> dict[str, Any]:
    sources = [{"model": "mixed/red", "layer_range": [0, 2]}, {"model": "mixed/blue", "layer_range": [1, 3]}]
    return {"merge_method": "linear", "slices": [{"sources": sources}], "parameters": {"weight": 0.5}}


BAD_PATHS: dict[str, tuple[Any, list[str]]] = {
    "empty": ([], ["r.yaml:2: slices is []: an empty path"]),
    "an empty piece": (
        [piece("llama/red", 0, 2), piece("llama/red", 2, 2)],
        ["r.yaml:10: layer_range is [2, 2]: an empty path"],
    ),
    "layers that are not there": (
        [piece("llama/red", 2, 5), piece("llama/blue", 4, 6)],
        ["r.yaml:5: layer_range is [2, 5], and llama/red has 4 layers", "r.yaml:10: layer_range is [4, 6]"],
    ),
    "too long": (
        [*(piece("llama/red", 0, 4) for _ in range(3)), piece("llama/blue", 0, 1)],
        ["r.yaml:2: the path of the recipe has 13 layers, and the base 4", "at most 3 times as many (12)"],
    ),
    "other sizes": (
        [piece("llama/red", 0, 2), piece("wide/red", 2, 4)],
        ["r.yaml:9: wide/red: config.json: hidden_size is 40, but 32 in the base", "shape (64, 40), but (64, 32)"],
    ),
    "types that meet": (types_meet, ["layers 0, 1, which are of different types", "sliding_attention, full_attention"]),
    "scales that are not positive": (
        [piece("llama/red", 0, 2, scale=0.0), piece("llama/blue", 0, 2, scale=[{"value": -1.0}])],
        ["r.yaml:3: passthrough: the scale of model.embed_tokens.weight is 0 (a positive", "r.yaml:10: ", "is -1 ("],
    ),
    "scales that are no numbers": (
        [piece("llama/red", 0, 2, scale=float("nan")), piece("llama/blue", 0, 2, shift=float("inf"))],
        ["r.yaml:9: scale is nan (a finite number)", "shift is inf (a finite number)"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of two sizes, and one with layers of two types."""
    folder = tmp_path_factory.mktemp("strange")
    make("llama", folder / "llama")
    make("llama", folder / "wide", hidden_size=40, num_attention_heads=5, num_key_value_heads=5)
    make("gemma2", folder / "mixed")
    return folder


@pytest.mark.parametrize("case", BAD_PATHS)
def test_bad_paths_are_refused_by_name_before_anything_is_written(
    work: Path, strange: Path, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    from evomerge.cli import main

    given, messages = BAD_PATHS[case]
    data = given() if callable(given) else {"merge_method": "passthrough", "slices": given}
    for name in ("llama", "wide", "mixed"):
        Path(name).symlink_to(strange / name)
    Path("r.yaml").write_text(yaml.safe_dump({**data, "compat": "paper"}, sort_keys=False))
    before = sorted(Path().iterdir())
    commands = [["merge", "r.yaml", "out"], ["eval", "r.yaml", "study.yaml"]]
    for command in commands if case in ("too long", "scales that are not positive") else commands[:1]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(command)
        out, err = capfd.readouterr()
        assert stopped.value.code == 2 and out == "" and "Traceback" not in err, err
        assert all(message in err for message in messages), err
        assert sorted(Path().iterdir()) == before
