"""Tests of evomerge.path_space: three encodings of layer orders, matched scales, recipes, and refusals by key."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge._path_edits import Edits
from evomerge.errors import ConfigError
from evomerge.export import merge
from evomerge.model import LiveModel
from evomerge.path_space import FARTHEST, PathSpace, Step, is_path_spec
from evomerge.recipe import Recipe
from evomerge.scale_folding import fold_scales
from evomerge.space import Natural, known_recipes
from evomerge.strict_yaml import load_yaml
from evomerge.weights import Weights

from .test_layer_path import N, logits, make

ROOT = Path(__file__).parent.parent
QUIET = settings(deadline=None, derandomize=True, max_examples=25)
BASE, MERGED = "models/base", "runs/ps/merged"
EXPERTS = {"math": "models/math", "code": "models/code"}
WHERE = {"base": BASE, "merged": MERGED, **EXPERTS}
SHIPPED = sorted((ROOT / "search_spaces").glob("path_*.yaml"))
Params = dict[str, Natural]
Triple = tuple[str, int, float]


def space(
    spec: Mapping[str, Any],
    n_layers: int = 8,
    experts: Mapping[str, str] = EXPERTS,
    model_type: str = "llama",
    merged: str | None = MERGED,
    seed: int = 3,
) -> PathSpace:
    return PathSpace.from_dict(spec, BASE, experts, n_layers, model_type=model_type, merged=merged, seed=seed)


def moments(made: PathSpace) -> dict[str, list[float]]:
    """Made-up root mean squares, no two alike."""
    return {
        name: [round((1.0 + 0.3 * i) * 1.4**k, 4) for k in range(made.n_layers + 1)]
        for i, (name, _) in enumerate(made.sources)
    }


def tensors(n_layers: int) -> list[str]:
    parts = ("self_attn.o_proj", "mlp.down_proj", "mlp.up_proj", "input_layernorm")
    names = [f"model.layers.{d}.{part}.weight" for d in range(n_layers) for part in parts]
    return ["model.embed_tokens.weight", *names, "model.norm.weight", "lm_head.weight"]


ALL = ["repeat", "skip", "splice", "swap", "share"]
CHOICES: list[dict[str, Any]] = [
    {"path": "choices"},
    {"path": "choices", "sources": ["math", "code", "base"], "frozen": [1, 0]},
    {"path": "choices", "passes": 2, "longest": 1.3, "match": False},
    {"path": "choices", "passes": 2, "backbone": "search", "frozen": [0, 2], "scales": "off"},
]
EDITS: list[dict[str, Any]] = [
    {"path": "edits"},
    {"path": "edits", "kinds": ALL, "edits": 5, "block": "all", "frozen": [1, 0], "longest": 2},
    {"path": "edits", "kinds": ALL, "sources": ["math", "code"], "scales": [0.25, 3.0], "longest": 3},
    {"path": "edits", "kinds": ALL, "backbone": "search", "frozen": [0, 1], "longest": 1.2, "block": 2},
]
INDICATORS: list[dict[str, Any]] = [
    {"path": "indicators", "repeats": 2},
    {"path": "indicators", "sources": ["math", "code"], "repeats": 1, "longest": 1},
    {"path": "indicators", "matrix": False, "backbone": "search", "frozen": [1, 0], "longest": 2},
    {"path": "indicators", "sources": ["code", "base"], "frozen": [0, 2], "repeats": 2, "longest": 3},
]
SPECS = [*CHOICES, *EDITS, *INDICATORS]
SPACES = [space(spec) for spec in SPECS]
MATCHED = [made.with_moments(moments(made)) if made.wants_moments else made for made in SPACES]
IDS = [f"{spec['path']}{i % 4}" for i, spec in enumerate(SPECS)]
every = pytest.mark.parametrize("made", MATCHED, ids=IDS)
seeds = st.integers(0, 2**32 - 1)


def draw(made: PathSpace, seed: int) -> Params:
    """A random point. Half of the genes of a point are at their start, or hardly any: few edits, and many."""
    rng = np.random.default_rng(seed)
    x = np.where(rng.random(made.dim) < rng.choice([0.0, 0.5, 0.9]), made.encode(made.start()), rng.random(made.dim))
    return made.decode(x)


def triples(path: Sequence[Step]) -> list[Triple]:
    return [(step.source, step.layer, step.scale) for step in path]


def backbone_of(made: PathSpace, params: Mapping[str, Natural]) -> str:
    return str(params.get("backbone", made.ground.backbones[0]))


# ------------------------------------------------------------------------------------- every point is a valid path


@every
@QUIET
@given(seeds)
def test_every_point_is_a_valid_path_and_a_recipe_that_plans(made: PathSpace, seed: int) -> None:
    params = draw(made, seed)
    assert made.decode(made.encode(params)) == params
    path, ground, backbone = made.path(params), made.ground, backbone_of(made, params)
    n = made.n_layers
    assert 1 <= len(path) <= ground.longest <= 3 * n
    head, tail = path[: ground.head], path[len(path) - ground.tail :]
    assert [(s.source, s.layer) for s in head] == [(backbone, d) for d in range(ground.head)]
    assert [(s.source, s.layer) for s in tail] == [(backbone, d) for d in range(n - ground.tail, n)]
    assert all(0 <= s.layer < n and s.scale > 0 for s in path)
    recipe = made.recipe(params)
    plans = recipe.plan(tensors(n), n)
    assert len(plans) == 3 + 4 * len(path) and recipe.method in made.methods
    taken = [plan.inputs[0] for plan in plans if "up_proj" in plan.name]
    assert taken == [(WHERE[s.source], f"model.layers.{s.layer}.mlp.up_proj.weight") for s in path]
    assert Recipe.from_yaml(recipe.to_yaml()).fingerprint == recipe.fingerprint


@every
@QUIET
@given(seeds)
def test_recipes_are_the_folded_scales_of_their_path(made: PathSpace, seed: int) -> None:
    params = draw(made, seed)
    path = made.path(params)
    slices = [{"sources": [{"model": WHERE[s.source], "layer_range": [s.layer, s.layer + 1]}]} for s in path]
    head = {"merge_method": "passthrough", "base_model": made.base, "compat": "paper", "seed": 3}
    plain = Recipe.from_dict({**head, "slices": slices})
    # Tokenizer and configuration come from the first model: the base, with whose tokenizer candidates are scored.
    assert made.recipe(params).models[0] == made.base
    assert made.recipe(params).fingerprint == fold_scales(plain, [s.scale for s in path], "llama").fingerprint


@every
def test_a_search_starts_from_identity_paths(made: PathSpace) -> None:
    n, found = made.n_layers, made.starts()
    assert made.start() == found[0] and len(found) == len(made.ground.backbones)
    for backbone, start in zip(made.ground.backbones, found, strict=True):
        assert triples(made.path(start)) == [(backbone, d, 1.0) for d in range(n)]
        recipe = made.recipe(start)
        assert [source.layers for piece in recipe.slices for source in piece.sources] == [(0, n)]
        assert made.point_of(recipe) == start
        if made.encoding.name != "indicators":  # every source's identity path is one gene away
            assert sum(start[name] != value for name, value in found[0].items()) <= 1


# ------------------------------------------------------------------------------------- the encodings, written plainly


def scaled(made: PathSpace, path: Sequence[Triple]) -> list[Triple]:
    """Final scales by the formula: matched times the gene's at seams, 1 elsewhere."""
    rms = dict(made.moments)
    found: list[Triple] = []
    for k, (source, layer, s) in enumerate(path):
        before = path[k - 1] if k else None
        natural = (before is None and layer == 0) or (before is not None and (source, layer - 1) == before[:2])
        scale = 1.0
        if not natural and made.ground.scales is not None:
            if rms:
                s *= rms[source][layer] / (rms[source][0] if before is None else rms[before[0]][before[1] + 1])
            scale = float(f"{s:.6g}")
        found.append((source, layer, scale))
    return found


def slow_choices(made: PathSpace, params: Params) -> list[Triple]:
    backbone, n = backbone_of(made, params), made.n_layers
    passes: list[list[Triple]] = [[], []]
    for d in range(n):
        frozen = d < made.ground.head or d >= n - made.ground.tail
        first = backbone if frozen or params[f"layer.{d}"] == "own" else str(params[f"layer.{d}"])
        again = "skip" if frozen else str(params.get(f"again.{d}", "skip"))
        skipped = "skip" if d == 0 else str(params.get(f"layer.{d - 1}", backbone)) == "skip"
        s = (
            params.get(f"scale.{d}", 1.0)
            if first != backbone
            else params.get(f"scale.{d - 1}", 1.0)
            if skipped
            else 1.0
        )
        if first != "skip":
            passes[0].append((first, d, float(s)))
        if again != "skip":
            source = backbone if again == "own" else again
            passes[1].append((source, d, float(params.get(f"again_scale.{d}", 1.0))))
    tail = made.ground.tail
    start, end = passes[0][: len(passes[0]) - tail], passes[0][len(passes[0]) - tail :]
    while len(start) + len(passes[1]) + len(end) > made.ground.longest:
        passes[1].pop()
    if passes[1] and end:
        end[0] = (*end[0][:2], 1.0)
    return [*start, *passes[1], *end]


def slow_edits(made: PathSpace, params: Params) -> list[Triple]:
    """Every place is a list of layers: empty once skipped, with copies behind once repeated."""
    n, head, past = made.n_layers, made.ground.head, made.n_layers - made.ground.tail
    backbone, sources = backbone_of(made, params), [name for name, _ in made.sources]
    layer = [(backbone, d) for d in range(n)]
    enters: list[float | None] = [None] * n
    skips: list[float | None] = [None] * n
    copies: list[list[Triple]] = [[] for _ in range(n)]

    def walk(places: Sequence[int], copied: bool) -> list[Triple]:
        found, open_jump = [], 1.0
        for p in places:
            jumped = skips[p]
            if jumped is None:
                enter = enters[p]
                found.append((*layer[p], open_jump if enter is None else enter))
                open_jump = 1.0
            else:
                open_jump = jumped
            found += copies[p] if copied else []
        return found

    found = []
    for k in itertools.count():
        kind = params.get(f"edit{k}.kind")
        if kind is None:
            break
        a, size = int(params[f"edit{k}.first"]), int(params.get(f"edit{k}.length", 1))
        other = "" if kind != "splice" else str(params.get(f"edit{k}.source", ""))
        if kind == "splice" and other in ("", backbone):
            behind = sources[sources.index(backbone) + 1 :] + sources
            other = next(name for name in behind if name != backbone)
        a = min(a, past - 2) if kind in ("swap", "share") else a
        b = min(past, a + (2 if kind == "swap" else size + 1 if kind == "share" else size))
        found.append((a, b, sources.index(other) if other else -1, float(params.get(f"edit{k}.scale", 1.0)), str(kind)))
    found.sort()
    for wanted in ("splice", "share", "swap", "skip", "repeat"):
        done = set()
        for a, b, other_, s, kind in found:
            if kind != wanted or (kind == "swap" and a in done):
                continue
            done.add(a)
            if kind == "splice":
                layer[a:b] = [(sources[other_], d) for d in range(a, b)]
                enters[a] = s
            elif kind == "share":
                layer[a:b] = [layer[a]] * (b - a)
                enters[a + 1] = s
            elif kind == "swap":
                layer[a], layer[a + 1] = layer[a + 1], layer[a]
                enters[a] = s
            elif kind == "skip":
                skips[a:b] = [s] * (b - a)
            else:
                block = walk(range(a, b), copied=False)
                if block and len(walk(range(n), copied=True)) + len(block) <= made.ground.longest:
                    copies[b - 1] += [(*block[0][:2], s), *block[1:]]
    assert all(skips[d] is None for d in [*range(head), *range(past, n)])
    return walk(range(n), copied=True)


def slow_indicators(made: PathSpace, params: Params) -> list[Triple]:
    backbone, n, ground = backbone_of(made, params), made.n_layers, made.ground
    on = [name.split(".") for name, value in params.items() if value == "on"]  # genes are in the order of execution
    room = ground.longest - ground.head - ground.tail
    path = [(backbone, d) for d in range(ground.head)]
    path += [(source, int(d)) for _, _, source, d in on[:room]]
    path += [(backbone, d) for d in range(n - ground.tail, n)]
    slots = [f"scale.{r}.{source}.{d}" for _, r, source, d in on[:room]]
    found: list[Triple] = []
    for k, (source, d) in enumerate(path):
        slot = slots[k - ground.head] if 0 <= k - ground.head < len(slots) else ""
        pair = f"scale.{path[k - 1][0]}.{path[k - 1][1]}.{source}.{d}" if k else ""
        found.append((source, d, float(params.get(slot, params.get(pair, 1.0)))))
    return found


SLOW = {"choices": slow_choices, "edits": slow_edits, "indicators": slow_indicators}


@every
@settings(QUIET, max_examples=80)
@given(seeds)
def test_paths_are_those_of_a_plain_restatement(made: PathSpace, seed: int) -> None:
    params = draw(made, seed)
    assert triples(made.path(params)) == scaled(made, SLOW[made.encoding.name](made, params))


def test_the_papers_indicators_by_hand() -> None:
    """Two models of two layers between frozen ends, twice over: slots A1 A2 B1 B2 A1 A2 B1 B2."""
    spec = {"path": "indicators", "repeats": 2, "backbone": "math", "longest": 3}
    made = space(spec, n_layers=4, merged=None)
    on = ["on.1.math.1", "on.1.code.2", "on.2.math.1", "on.2.math.2"]
    params = made.start() | {"on.1.math.2": "off"} | dict.fromkeys(on, "on")
    params |= {"scale.math.1.code.2": 0.8, "scale.code.2.math.1": 1.5, "scale.math.1.math.1": 0.6}
    assert len([g for g in made.genes if g.name.startswith("on.")]) == 8
    expected = [("math", 0, 1), ("math", 1, 1), ("code", 2, 0.8), ("math", 1, 1.5), ("math", 2, 1), ("math", 3, 1)]
    assert triples(made.path(params)) == expected
    pairs = {g.name for g in made.genes if g.name.startswith("scale.")}
    nodes = [(m, d) for m in ("math", "code") for d in (1, 2)]
    wanted = {(a, b) for a in [("math", 0), *nodes] for b in [*nodes, ("math", 3)] if b != (a[0], a[1] + 1)}
    assert pairs == {f"scale.{a[0]}.{a[1]}.{b[0]}.{b[1]}" for a, b in wanted}
    once = space({**spec, "repeats": 1}, n_layers=4, merged=None)  # nothing comes back to an earlier slot
    wanted = {(a, b) for a, b in wanted if a not in nodes or b not in nodes or nodes.index(a) < nodes.index(b)}
    names = {g.name for g in once.genes if g.name.startswith("scale.")}
    assert names == {f"scale.{a[0]}.{a[1]}.{b[0]}.{b[1]}" for a, b in wanted} and len(names) < len(pairs)


def edited(made: PathSpace, *edits: Mapping[str, Natural]) -> list[str]:
    """A path as text: the source's initial and the number, for edits of a space."""
    params = made.start()
    for k, edit in enumerate(edits):
        params |= {f"edit{k}.{key}": value for key, value in edit.items()}
    return [f"{step.source[0]}{step.layer}" for step in made.path(params)]


def test_edits_by_hand() -> None:
    made = space({"path": "edits", "kinds": ALL, "backbone": "math", "longest": 1.5, "block": 3}, merged=None)
    skip, swap = {"kind": "skip", "first": 2, "length": 2}, {"kind": "swap", "first": 4}
    splice = {"kind": "splice", "first": 5, "length": 3}  # reaches into the frozen end
    repeat = {"kind": "repeat", "first": 1, "length": 3}
    share = {"kind": "share", "first": 1, "length": 2}
    assert edited(made, skip) == ["m0", "m1", "m4", "m5", "m6", "m7"]
    assert edited(made, swap) == ["m0", "m1", "m2", "m3", "m5", "m4", "m6", "m7"]
    assert edited(made, swap, swap | {"length": 3}) == edited(made, swap)  # equal swaps count once
    assert edited(made, {"kind": "swap", "first": 6}) == ["m0", "m1", "m2", "m3", "m4", "m6", "m5", "m7"]  # 7 is frozen
    assert edited(made, splice) == ["m0", "m1", "m2", "m3", "m4", "c5", "c6", "m7"]
    assert edited(made, share) == ["m0", "m1", "m1", "m1", "m4", "m5", "m6", "m7"]
    assert edited(made, repeat) == ["m0", "m1", "m2", "m3", "m1", "m2", "m3", "m4", "m5", "m6", "m7"]
    assert edited(made, repeat, repeat) == edited(made, repeat)  # 14 would be more than 12
    assert edited(made, repeat, skip) == ["m0", "m1", "m1", "m4", "m5", "m6", "m7"]
    assert edited(made, skip, splice, repeat, swap) == ["m0", "m1", "m1", "c5", "m4", "c6", "m7"]


def test_a_scale_acts_where_its_choice_makes_the_seam() -> None:
    made = space({"path": "choices", "backbone": "math", "passes": 2}, merged=None)
    scales: Params = {f"scale.{d}": 1.0 + d / 10 for d in range(1, 7)}
    scales |= {f"again_scale.{d}": 0.5 + d / 100 for d in range(1, 7)}

    def found(**choices: str) -> dict[str, float]:
        genes = {name.replace("_", "."): value for name, value in choices.items()}
        path = made.path(made.start() | scales | genes)
        return {f"{s.source[0]}{s.layer}": s.scale for s in path if s.scale != 1.0}

    assert found() == {}
    assert found(layer_3="code", layer_4="code") == {"c3": 1.3}  # 4 follows 3; back at 5 by itself
    assert found(layer_3="skip", layer_4="skip") == {"m5": 1.4}  # the last one's
    assert found(layer_3="skip", layer_4="code") == {"c4": 1.4}
    assert found(layer_6="skip") == {"m7": 1.6}  # also where the frozen end begins
    assert found(again_2="math", again_3="math", again_5="code") == {"m2": 0.52, "c5": 0.55}
    assert found(layer_6="skip", again_2="math") == {"m2": 0.52}


# ------------------------------------------------------------------------------------- what must not matter


@every
@QUIET
@given(seeds, seeds)
def test_parts_at_neutral_change_nothing_whatever_their_other_genes(made: PathSpace, seed: int, other: int) -> None:
    facts = made.facts(workers=2, evaluations=50)
    assert facts.neutral is not None and facts.zero is None and (facts.workers, facts.evaluations) == (2, 50)
    assert [level.dim for level in facts.levels] == [made.dim]
    listed = [i for part in facts.parts for i in part]
    assert len(listed) == len(set(listed)) and all(len(part) for part in facts.parts)
    assert made.decode(facts.neutral) == made.start()
    x, noise = made.encode(draw(made, seed)), np.random.default_rng(other).random(made.dim)
    expected = made.recipe(made.decode(x)).fingerprint
    for first, *rest in facts.parts:
        assert facts.cells[first] > 1
        if int(x[first] * facts.cells[first]) == int(facts.neutral[first] * facts.cells[first]):
            x[rest] = noise[rest]
    assert made.recipe(made.decode(x)).fingerprint == expected


@every
@QUIET
@given(seeds)
def test_equal_paths_are_equal_recipes(made: PathSpace, seed: int) -> None:
    """Each gene is moved on its own: where the path stays, so does the recipe, and else it does not."""
    params, other = draw(made, seed), draw(made, seed + 1)
    path, fingerprint = made.path(params), made.recipe(params).fingerprint
    inactive = 0
    for name in list(params)[:40]:
        moved = params | {name: other[name]}
        same = made.path(moved) == path
        inactive += same and moved != params
        assert (made.recipe(moved).fingerprint == fingerprint) == same, name


@pytest.mark.parametrize("made", [m for m in MATCHED if m.encoding.name == "edits"], ids=IDS[4:8])
@settings(QUIET, max_examples=80)
@given(seeds, st.randoms(use_true_random=False))
def test_the_order_of_the_slots_does_not_matter(made: PathSpace, seed: int, random: Any) -> None:
    encoding = made.encoding
    assert isinstance(encoding, Edits)
    params = draw(made, seed)
    order = list(range(encoding.slots))
    random.shuffle(order)
    shuffled = {
        re.sub(r"edit(\d+)", lambda found: f"edit{order[int(found[1])]}", name): value for name, value in params.items()
    }
    assert made.recipe(shuffled).fingerprint == made.recipe(params).fingerprint


# ------------------------------------------------------------------------------------- moments and scales


def test_matched_scales_are_the_ratio_of_what_is_read_to_what_is_given() -> None:
    made = space({"path": "choices", "backbone": "math"}, n_layers=4, merged=None)
    assert made.wants_moments
    params = made.start() | {"layer.1": "code", "scale.1": 1.25}
    assert [s.scale for s in made.path(params)] == [1.0, 1.25, 1.0, 1.0]  # before they are measured
    known = made.with_moments({"math": [1, 2, 4, 8, 16], "code": [3, 5, 7, 11, 13], "other": []})
    assert [s.scale for s in known.path(params)] == [1.0, 3.125, 0.571429, 1.0]  # 5 / 2 * 1.25, 4 / 7
    apart = space({"path": "indicators", "frozen": [0, 1], "backbone": "math"}, n_layers=4, merged=None)
    apart = apart.with_moments({"math": [1, 2, 4, 8, 16], "code": [3, 5, 7, 11, 13]})
    start = apart.start() | {"on.1.math.0": "off"}
    assert [s.scale for s in apart.path(start)] == [2.0, 1.0, 1.0]  # from the embeddings to layer 1


def test_scales_stay_where_they_can_be_folded() -> None:
    """Forty seams of a scale of 100 would multiply to 1e80."""
    made = space({"path": "indicators", "matrix": False, "scales": [0.01, 100], "longest": 3}, n_layers=20, merged=None)
    for value in (0.01, 100.0):
        odd = {f"on.{r}.{m}.{d}" for r in (1, 2, 3) for m in EXPERTS for d in range(2, 18, 2)}
        params = {name: "on" if name in odd else "off" for name in made.start() if name.startswith("on.")}
        path = made.path(made.start() | {n: value for n in made.start() if n.startswith("scale")} | params)
        factors = np.multiply.accumulate([s.scale for s in path])
        assert max(factors.max(), 1 / factors.min()) == pytest.approx(FARTHEST, rel=1e-4)
        assert made.recipe(made.start() | params).slices


def test_moments_that_do_not_fit_are_refused_by_source() -> None:
    made = space({"path": "choices"}, n_layers=4)
    good = [1.0] * 5
    with pytest.raises(ConfigError) as caught:
        made.with_moments({"math": [1.0, float("nan"), 1.0, 1.0, 1.0], "code": [1.0] * 4})
    assert [p.where for p in caught.value.problems] == ["math", "code", "merged"]
    for bad in (0.0, -1.0, float("inf")):
        with pytest.raises(ConfigError, match="before layer 4"):
            made.with_moments({"math": good, "code": good, "merged": [1.0, 1.0, 1.0, 1.0, bad]})


@pytest.mark.parametrize("kind", ["choices", "edits", "indicators"])
def test_without_scales_there_are_no_scale_genes(kind: str) -> None:
    for made in (space({"path": kind, "scales": "off"}), space({"path": kind}, model_type="olmo2")):
        assert made.ground.scales is None and not made.wants_moments
        assert not any("scale" in gene.name for gene in made.genes)
        assert {s.scale for s in made.path(draw(made, 5))} == {1.0}
        assert made.recipe(draw(made, 5)).slices
    assert not space({"path": kind, "match": False}).wants_moments
    assert space({"path": kind}, model_type="gemma2").wants_moments  # sandwich norms fold too


# ------------------------------------------------------------------------------------- from a recipe


@every
@QUIET
@given(seeds)
def test_what_point_of_finds_makes_the_recipe(made: PathSpace, seed: int) -> None:
    recipe = made.recipe(draw(made, seed))
    point = made.point_of(recipe)
    assert point is None or made.recipe(point).fingerprint == recipe.fingerprint
    plain = made.recipe(params := draw(replace(made, match=False), seed))
    known = made.encoding.name != "edits" and all(step.scale == 1.0 for step in made.path(params))
    assert not known or made.point_of(plain) is not None


@pytest.mark.parametrize(
    "spec",
    [
        {"path": "choices", "scales": "off", "passes": 2},
        {"path": "indicators", "scales": "off", "repeats": 2},
        {"path": "edits", "scales": "off", "kinds": ["skip"], "edits": 4},
        {"path": "edits", "scales": "off", "kinds": ["repeat"], "edits": 1},
        {"path": "edits", "scales": "off", "kinds": ["splice"], "edits": 1, "block": "all", "backbone": "search"},
    ],
    ids=str,
)
@QUIET
@given(seeds)
def test_paths_without_scales_are_points(spec: dict[str, Any], seed: int) -> None:
    made = space(spec)
    recipe = made.recipe(draw(made, seed))
    point = made.point_of(recipe)
    if point is None:  # overlapping edits can need more than there are, once they are read one by one
        assert spec.get("edits", 0) > 1
    else:
        assert made.recipe(point).fingerprint == recipe.fingerprint


def test_known_recipes_of_sources_are_their_identity_paths() -> None:
    known = dict(known_recipes(BASE, EXPERTS, seed=3))
    for spec in ({"path": "choices"}, {"path": "edits"}, {"path": "indicators", "matrix": False}):
        made = space({**spec, "sources": ["code", "base", "math"], "backbone": "search"})
        for name, recipe in known.items():
            point = made.point_of(recipe)
            assert (point is not None) == (name in ("base", "math", "code")), name
            if point is not None:
                assert triples(made.path(point)) == [(name, d, 1.0) for d in range(8)]
        assert made.point_of(replace(known["math"], dtype="float16")) is None
        assert made.point_of(replace(known["math"], compat="mergekit")) is None
    assert space({"path": "edits", "backbone": "math"}).point_of(known["code"]) is None
    assert space({"path": "choices", "backbone": "math"}).point_of(known["code"]) is None  # other frozen ends


def test_recipes_outside_the_space_have_no_point() -> None:
    made = space({"path": "choices", "backbone": "math"}, merged=None)

    def point(*pieces: tuple[str, int, int], **more: Any) -> Params | None:
        slices = [
            {"sources": [{"model": m, "layer_range": [a, b], "parameters": more.get("own", {})}]} for m, a, b in pieces
        ]
        data = {"merge_method": "passthrough", "slices": slices, "compat": "paper"}
        return made.point_of(Recipe.from_dict({**data, "parameters": more.get("all", {})}))

    math, code = EXPERTS["math"], EXPERTS["code"]
    whole = point((math, 0, 8))
    assert whole == made.start()
    assert point((math, 0, 3), (math, 3, 8)) == whole  # cut differently
    assert (point((math, 0, 3), (code, 3, 8)), point((code, 0, 3), (math, 3, 8))) == (None, None)
    assert point((math, 0, 8), all={"scale": 0.5}) is None
    assert point((math, 0, 8), own={"scale": 0.5}) is None
    assert point(("models/other", 0, 8)) is None
    assert point((math, 0, 4), (math, 2, 8)) is None  # one pass
    start = made.recipe(made.start())
    for change in ({"dtype": "float16"}, {"out_dtype": "float16"}, {"compat": "mergekit"}):
        assert made.point_of(replace(start, **change)) is None
    skipped = point((math, 0, 4), (math, 5, 8))
    assert skipped is not None and skipped["layer.4"] == "skip"
    for block, held in ((3, False), (4, True), (1, False)):  # one repeat of four layers
        edits = space({"path": "edits", "backbone": "math", "scales": "off", "block": block}, merged=None)
        repeated = space({"path": "edits", "backbone": "math", "scales": "off", "block": 4}, merged=None)
        twice = repeated.recipe(repeated.start() | {"edit0.kind": "repeat", "edit0.first": 2, "edit0.length": 4})
        assert (edits.point_of(twice) is not None) == held
    merged = made.with_moments({"math": [float(k + 1) for k in range(9)], "code": [1.0] * 9})
    assert merged.point_of(made.recipe(skipped)) is None  # a matched scale stands there
    assert merged.point_of(made.recipe(made.start())) == made.start()


# ------------------------------------------------------------------------------------- in a live model


@pytest.mark.parametrize("kind", ["choices", "edits", "indicators"])
def test_a_live_path_is_the_exported_checkpoint(kind: str, tmp_path: Path) -> None:
    """Random paths of three tiny Llamas: the logits of the live model are those of the checkpoint, to the bit."""
    make("llama", tmp_path)
    base, red, blue = (str(tmp_path / name) for name in ("base", "red", "blue"))
    spec = {"path": kind, "sources": ["red", "base", "blue"], "frozen": [1, 0], "scales": [0.5, 3.0]}
    made = PathSpace.from_dict(spec, base, {"red": red, "blue": blue}, N, model_type="llama")
    made = made.with_moments(moments(made))
    live, weights = LiveModel(base), Weights([base, red, blue])
    seen, folded = set(), 0
    for number in range(6):
        recipe = made.recipe(draw(made, number))
        live.install(recipe, weights)
        merge(recipe, str(tmp_path / f"out{number}"))
        exported = LiveModel(str(tmp_path / f"out{number}"))
        assert torch.equal(logits(live), logits(exported))
        assert exported.model.config.num_hidden_layers == len(made.path(draw(made, number)))
        seen.add(recipe.fingerprint)
        folded += any(piece.sources[0].parameters for piece in recipe.slices)
    assert len(seen) >= 4 and folded >= 2


def test_the_identity_path_scores_as_the_source_itself(tmp_path: Path) -> None:
    make("llama", tmp_path)
    base, red, blue = (str(tmp_path / name) for name in ("base", "red", "blue"))
    spec = {"path": "choices", "sources": ["red", "base", "blue"]}
    made = PathSpace.from_dict(spec, base, {"red": red, "blue": blue}, N, model_type="llama")
    live, weights = LiveModel(base), Weights([base, red, blue])
    for start in made.starts():
        live.install(made.recipe(start), weights)
        assert torch.equal(logits(live), logits(LiveModel(str(tmp_path / str(start["backbone"])))))


# ------------------------------------------------------------------------------------- refusals


def problems(spec: Any, **kwargs: Any) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        space(spec, **kwargs)
    found: dict[str, str] = {}
    for p in caught.value.problems:
        found[p.where] = f"{found.get(p.where, '')} {p.message} ({p.hint})".strip()
    return found


def test_all_problems_are_listed_at_once_with_their_keys() -> None:
    spec = {
        "path": "edits",
        "passes": 2,
        "matrx": True,
        "sources": ["math", "cod", "math"],
        "backbone": "codes",
        "frozen": 0.6,
        "longest": 4,
        "scales": [0, 2],
        "match": 1,
        "edits": 9,
        "kinds": ["skip", "swop", "skip"],
        "block": 20,
    }
    found = problems(spec)
    assert set(found) == {*spec, "passes"} - {"path"}
    assert "`passes` is for `path: choices`, and this is `path: edits`" in found["passes"]
    assert "unknown key 'matrx'" in found["matrx"]
    assert "'cod'" in found["sources"] and "did you mean code?" in found["sources"] and "twice" in found["sources"]
    assert "a scale cannot be 0" in found["scales"]
    assert "did you mean swap?" in found["kinds"] and "'skip' is listed twice" in found["kinds"]


@pytest.mark.parametrize(
    ("spec", "where", "said"),
    [
        ([], "", "expected a mapping"),
        ({"path": "edit"}, "path", "did you mean edits?"),
        ({"path": None}, "path", "no encoding of paths None"),
        ({"path": ["edits"]}, "path", "no encoding of paths ['edits']"),
        ({"path": "choices", "souces": ["math"]}, "souces", "did you mean sources?"),
        ({"path": "choices", "edits": 8}, "edits", "`edits` is for `path: edits`"),
        ({"path": "indicators", "kinds": ["skip"]}, "kinds", "`kinds` is for `path: edits`"),
        ({"path": "edits", "repeats": 2}, "repeats", "`repeats` is for `path: indicators`"),
        ({"path": "choices", "sources": []}, "sources", "not a list of models"),
        ({"path": "choices", "sources": "math"}, "sources", "not a list of models"),
        ({"path": "choices", "sources": [1]}, "sources", "no model 1"),
        ({"path": "choices", "sources": ["math"], "backbone": "code"}, "backbone", "add it to `sources:`"),
        ({"path": "choices", "sources": ["math"], "backbone": "mth"}, "backbone", "did you mean math?"),
        ({"path": "choices", "backbone": True}, "backbone", "not one of the sources"),
        ({"path": "choices", "frozen": 0.5}, "frozen", "a share of the layers"),
        ({"path": "choices", "frozen": True}, "frozen", "a share of the layers"),
        ({"path": "choices", "frozen": 1}, "frozen", "a share of the layers"),
        ({"path": "choices", "frozen": [0, 0]}, "frozen", "a path could be empty"),
        ({"path": "choices", "frozen": [4, 4]}, "frozen", "leave none of 8"),
        ({"path": "choices", "frozen": [1]}, "frozen", "how many layers"),
        ({"path": "choices", "frozen": [True, 1]}, "frozen", "how many layers"),
        ({"path": "choices", "frozen": [-1, 1]}, "frozen", "how many layers"),
        ({"path": "choices", "longest": 0.9}, "longest", "1 to 3, times the 8 layers"),
        ({"path": "choices", "longest": 3.01}, "longest", "1 to 3"),
        ({"path": "choices", "longest": True}, "longest", "1 to 3"),
        ({"path": "choices", "longest": float("nan")}, "longest", "1 to 3"),
        ({"path": "choices", "scales": [-0.5, 2]}, "scales", "cannot be -0.5"),
        ({"path": "choices", "scales": [1, 1]}, "scales", "not below"),
        ({"path": "choices", "scales": [2, 0.5]}, "scales", "not below"),
        ({"path": "choices", "scales": [0.5, float("inf")]}, "scales", "not a range"),
        ({"path": "choices", "scales": [0.5]}, "scales", "not a range"),
        ({"path": "choices", "scales": [1, 10**400]}, "scales", "not a range"),
        ({"path": "choices", "longest": 10**400}, "longest", "1 to 3"),
        ({"path": "choices", "frozen": 10**400}, "frozen", "a share of the layers"),
        ({"path": "choices", "scales": True}, "scales", "not a range"),
        ({"path": "choices", "scales": ["0.5", 2]}, "scales", "not a range"),
        ({"path": "choices", "scales": "off", "match": True}, "match", "no scales"),
        ({"path": "choices", "match": "yes"}, "match", "not true or false"),
        ({"path": "choices", "passes": 3}, "passes", "1 to 2"),
        ({"path": "choices", "passes": True}, "passes", "1 to 2"),
        ({"path": "edits", "edits": 0}, "edits", "1 to 8"),
        ({"path": "edits", "edits": 2.0}, "edits", "1 to 8"),
        ({"path": "edits", "kinds": []}, "kinds", "is empty"),
        ({"path": "edits", "kinds": ["repeat"], "longest": 1}, "kinds", "no layer can be repeated"),
        ({"path": "edits", "method": "ties"}, "method", "is for spaces of coefficients"),
        ({"path": "choices", "genes": {}}, "genes", "is for spaces of coefficients"),
        ({"path": "choices", "compat": "mergekit"}, "compat", "is for spaces of coefficients"),
        ({"path": "edits", "kinds": "skip"}, "kinds", "not a list"),
        ({"path": "edits", "kinds": ["none"]}, "kinds", "no kind of edit 'none'"),
        ({"path": "edits", "kinds": [["skip"]]}, "kinds", "no kind of edit ['skip']"),
        ({"path": "edits", "sources": ["math"], "kinds": ["splice"]}, "kinds", "only one source"),
        ({"path": "edits", "frozen": [4, 3], "kinds": ["swap", "skip"]}, "kinds", "two layers that are not frozen"),
        ({"path": "edits", "block": 0}, "block", "1 to the 6 layers"),
        ({"path": "edits", "block": 7}, "block", "1 to the 6 layers"),
        ({"path": "edits", "block": "half"}, "block", "or all"),
        ({"path": "edits", "block": True}, "block", "or all"),
        ({"path": "indicators", "repeats": 0}, "repeats", "1 to 8"),
        ({"path": "indicators", "matrix": "no"}, "matrix", "not true or false"),
        ({"path": "indicators", "scales": "off", "matrix": True}, "matrix", "no scales"),
    ],
)
def test_refused(spec: Any, where: str, said: str) -> None:
    found = problems(spec)
    assert said in found[where], found
    assert len(found) == 1, found


def test_models_that_do_not_fit_are_refused() -> None:
    spec = {"path": "choices"}
    assert "set `merged:`" in problems({**spec, "sources": ["math", "merged"]}, merged=None)["sources"]
    assert "set `merged:`" not in str(problems({**spec, "sources": ["math", "marged"]}))
    assert "is the base or an expert too" in problems(spec, merged=EXPERTS["math"])["merged"]
    assert "is the base or an expert too" in problems(spec, merged=BASE)["merged"]
    for name in ("base", "merged", "own", "skip", "search"):
        assert "means something else" in problems(spec, experts={name: "A"}, merged=None)[f"experts.{name}"]
    assert set(problems(spec, experts={"a": "A", "b": "A", "c": BASE, "d e": "D"})) == {
        "experts.a",
        "experts.b",
        "experts.c",
        "experts.d e",
    }
    assert "needs an expert" in problems(spec, experts={}, merged=None)["experts"]
    assert "leave none of 1" in problems(spec, n_layers=1)["frozen"]
    assert "leave none of 2" in problems(spec, n_layers=2)["frozen"]
    assert space({**spec, "frozen": [1, 0]}, n_layers=2).dim == 2
    dotted = {"m": "A", "m.3.m": "B"}
    assert "without dots" in problems({"path": "indicators"}, experts=dotted, merged=None)["sources"]


def test_scales_of_a_network_that_cannot_be_folded_are_refused() -> None:
    found = problems({"path": "edits", "scales": [0.5, 2]}, model_type="olmo2")
    assert "olmo2" in found["scales"] and "scales: off" in found["scales"]


def test_a_matrix_of_too_many_scales_is_refused_before_it_is_made() -> None:
    found = problems({"path": "indicators"}, n_layers=32)
    assert "at most 1,024" in found["matrix"] and "matrix: false" in found["matrix"]
    assert "at most 1,024" in problems({"path": "indicators", "matrix": False, "repeats": 8}, n_layers=32)["repeats"]
    assert space({"path": "indicators", "matrix": False, "repeats": 3}, n_layers=32).dim == 2 * 3 * 3 * 26


# ------------------------------------------------------------------------------------- defaults and shipped spaces


def test_defaults_follow_the_study() -> None:
    both = space({"path": "choices"})
    assert [name for name, _ in both.sources] == ["math", "code", "merged"] and both.ground.backbones == ("merged",)
    assert dict(both.sources)["merged"] == MERGED and both.seed == 3
    without = space({"path": "choices"}, merged=None)
    assert without.ground.backbones == ("math", "code") and without.genes[0].name == "backbone"
    assert without.genes[1].choices == ("own", "skip", "math", "code") and without.genes[1].start == "own"
    assert both.genes[0].choices == ("skip", "math", "code", "merged") and both.genes[0].start == "merged"
    alone = space({"path": "edits"}, experts={"math": "A"}, merged=None)
    assert alone.ground.backbones == ("math",) and "splice" not in alone.genes[0].choices
    assert space({"path": "choices", "sources": ["code", "math"]}).ground.backbones == ("code", "math")
    for n, head, longest in ((4, 1, 6), (6, 1, 9), (7, 1, 11), (15, 2, 23), (24, 2, 36), (32, 3, 48), (80, 8, 120)):
        ground = space({"path": "choices"}, n_layers=n).ground
        assert (ground.head, ground.tail, ground.longest) == (head, head, longest)
    assert space({"path": "choices", "longest": 1.1}, n_layers=10).ground.longest == 11
    assert space({"path": "choices", "frozen": 0}).ground.head == 1
    scale = space({"path": "choices", "scales": [0.2, 0.6]}).genes[1]
    assert (scale.name, scale.scale, scale.low, scale.high, scale.start) == ("scale.1", "log", 0.2, 0.6, 0.6)


@pytest.mark.parametrize("n_layers", [3, 4, 6, 8, 32])
def test_edits_fit_small_models(n_layers: int) -> None:
    made = space({"path": "edits"}, n_layers=n_layers)
    free = n_layers - made.ground.head - made.ground.tail
    encoding = made.encoding
    assert isinstance(encoding, Edits)
    assert (encoding.slots, encoding.block) == (min(8, free), max(1, free // 2))
    assert ("swap" in encoding.kinds) == (free > 1)
    names = {gene.name.partition(".")[2] for gene in made.genes}
    expected = {"kind", "source", "scale"} | ({"first"} if free > 1 else set()) | ({"length"} if free > 3 else set())
    assert names == expected
    assert all(gene.choices or gene.low < gene.high for gene in made.genes)


def test_splices_of_a_searched_backbone_always_take_another_source() -> None:
    splice = {"kind": "splice", "first": 3}
    two = space({"path": "edits"}, merged=None)
    assert not any(gene.name.endswith("source") for gene in two.genes)
    three = space({"path": "edits", "backbone": "search"})
    for made, backbone, named_, found in (
        (two, "math", "", "c3"),
        (two, "code", "", "m3"),
        (three, "math", "code", "c3"),
        (three, "code", "math", "m3"),
        (three, "math", "math", "c3"),
        (three, "merged", "merged", "m3"),
    ):
        params = made.start() | {"backbone": backbone, "edit0.kind": "splice", "edit0.first": splice["first"]}
        params |= {"edit0.source": named_} if named_ else {}
        path = made.path(params)
        assert f"{path[3].source[0]}{path[3].layer}" == found and path[3].source != backbone


def shipped(path: Path, n_layers: int, experts: Mapping[str, str] = EXPERTS) -> PathSpace:
    spec = load_yaml(path.read_text(encoding="utf-8"), path.name).data
    assert is_path_spec(spec) and not is_path_spec({"method": "ties"}) and not is_path_spec(None)
    return space(spec, n_layers, experts, merged=None)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
@pytest.mark.parametrize("n_layers", [4, 6, 8, 32])
def test_shipped_spaces_are_usable(path: Path, n_layers: int) -> None:
    made = shipped(path, n_layers)
    assert made.description and path.read_text(encoding="utf-8").startswith("# ")
    for number in range(10):
        params = draw(made, number)
        assert len(made.path(params)) <= made.ground.longest
        assert made.recipe(params).plan(tensors(n_layers), n_layers)


def test_what_the_presets_make() -> None:
    """Layer swapping: bottom and top of one parent. Pruning: a part of one order. Folding: as long, or shorter."""
    assert {path.stem.removeprefix("path_") for path in SHIPPED} == {
        "choices", "edits", "indicators", "layer_swap", "prune", "fold",
    }  # fmt: skip
    swap, prune, fold = (shipped(ROOT / "search_spaces" / f"path_{n}.yaml", 8) for n in ("layer_swap", "prune", "fold"))
    blocks, shared = set(), 0
    for number in range(200):
        path = swap.path(draw(swap, number))
        assert [s.layer for s in path] == list(range(8)) and len({path[0].source, path[-1].source}) == 1
        runs = [source for source, _ in itertools.groupby(s.source for s in path)]
        assert len(runs) in (1, 3)
        blocks.add(sum(s.source != path[0].source for s in path))
        depths = [s.layer for s in prune.path(draw(prune, number))]
        assert depths == sorted(set(depths)) and depths[0] == 0 and depths[-1] == 7
        depths = [s.layer for s in fold.path(draw(fold, number))]
        assert depths == sorted(depths)
        shared += len(set(depths)) < len(depths)
    assert blocks == set(range(7)) and shared > 5


# ------------------------------------------------------------------------------------- the documentation

PAGE = (ROOT / "docs" / "spaces.md").read_text(encoding="utf-8")
EXAMPLES = [text for text in re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL) if "path:" in text]


@pytest.mark.parametrize("text", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_of_the_documentation_work(text: str) -> None:
    made = space(load_yaml(text).data, n_layers=32)
    assert made.recipe(draw(made, 1)).slices and made.starts()


def test_the_documentation_names_every_key() -> None:
    from evomerge._path_form import COMMON, OWN_KEYS

    assert len(EXAMPLES) >= 3
    for word in (*COMMON, *(key for keys in OWN_KEYS.values() for key in keys), *OWN_KEYS, *ALL):
        assert f"`{word}" in PAGE, word
    for path in SHIPPED:
        assert f"`{path.stem}`" in PAGE, path.stem
