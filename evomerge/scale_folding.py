"""Scales between layers, folded into the weights: a path with scales becomes a plain passthrough recipe.

Before layer k the hidden state is multiplied by w_k (Akiba et al. 2024, arXiv 2403.13187, section 3.2, where a path
changes its source). A pre-norm layer adds F(norm(h)) to h, and a norm does not see a positive factor of h. With
c_k = w_1 ... w_k the scaled states are h_k = c_k g_k, where g_{k+1} = g_k + F_k(norm(g_k)) / c_k: the same network with
what writes to the hidden state divided by c_k. The last norm removes what is left of the factor. What differs is the
norm's epsilon, which is added to the mean square of g instead of that of h.

What writes to the hidden state is a linear map with its bias, or the gain of a norm behind the map (sandwich norms).
Gemma stores a gain less one: (1 + w) / c = 1 + w' with w' = w / c + (1 / c - 1), hence `shift`. docs/paths.md says
which families are on the list, what must hold for one to be there, and what the tests measured.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

from evomerge.errors import Problem, RecipeError
from evomerge.recipe import Conditional, Recipe, Slice, Source, freeze_parameters


@dataclass(frozen=True)
class Writers:
    """What writes to the hidden state: parts of tensor names, which hold for weights and biases alike.

    `less_one` says that they are gains of norms, stored less one.
    """

    names: tuple[str, ...]
    less_one: bool = False


MOST = 1e12  # times the hidden state: beyond, neither its layers nor the ones before them would count

PROJECTIONS = Writers(("o_proj", "down_proj"))

# By `model_type`, which is what tells them apart: `post_attention_layernorm` is a norm before the MLP in Llama, and one
# behind the attention in Gemma 2.
WRITERS: dict[str, Writers] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "smollm3", "olmo"), PROJECTIONS),
    **dict.fromkeys(("granite", "cohere", "stablelm", "nemotron", "glm"), PROJECTIONS),
    **dict.fromkeys(
        ("gemma2", "gemma3_text"), Writers(("post_attention_layernorm", "post_feedforward_layernorm"), less_one=True)
    ),
    "glm4": Writers(("post_self_attn_layernorm", "post_mlp_layernorm")),
    "gpt2": Writers(("attn.c_proj", "mlp.c_proj")),
    "gpt_neox": Writers(("attention.dense.", "mlp.dense_4h_to_h")),
    "phi": Writers(("self_attn.dense", "mlp.fc2")),
    "starcoder2": Writers(("o_proj", "mlp.c_proj")),
}

# Known not to work, and why.
UNFOLDABLE: dict[str, str] = {
    **dict.fromkeys(
        ("olmo2", "olmo3", "exaone4"), "its layers read the hidden state without a norm, so that its size counts"
    ),
    "gemma3": "its layers are a part of a model that reads images too",
}


def foldable(model_type: str) -> bool:
    """Whether scales between the layers of such a model fold into its weights; `model_type` is of its config.json."""
    return model_type in WRITERS


def fold_scales(recipe: Recipe, scales: Sequence[float], model_type: str) -> Recipe:
    """The passthrough recipe whose model multiplies its hidden state by `scales[k]` before position k.

    Args:
        recipe: a path of single layers or runs of layers, without scales of its own.
        scales: (positions,), each positive; 1 leaves the state as it is.
        model_type: of the base's config.json.

    Returns:
        A recipe with the same path; positions that follow each other with the same factor stay one slice.

    Raises:
        RecipeError: the scales do not fit the path or are not positive, or this network cannot be folded.
    """
    positions = [(piece, layer) for piece in recipe.slices for layer in _layers(recipe, piece)]
    problems = _problems(scales, len(positions))
    writers = WRITERS.get(model_type)
    if writers is None and any(w != 1.0 for w in scales):
        why = UNFOLDABLE.get(model_type, "nobody has tried it")
        problems.append(
            Problem(
                f"scales between the layers of a {model_type} model cannot be folded into its weights: {why}",
                hint=f"set every scale to 1; they fold for {', '.join(sorted(WRITERS))}",
            )
        )
    if problems:
        raise RecipeError.of(problems, "the scales")
    runs: list[tuple[str, int, int, float]] = []  # model, first layer, past the last, factor
    factor = 1.0
    for (piece, layer), scale in zip(positions, scales, strict=True):
        factor *= scale
        model = piece.sources[0].model
        if runs and (runs[-1][0], runs[-1][2], runs[-1][3]) == (model, layer, factor):
            runs[-1] = (model, runs[-1][1], layer + 1, factor)
        else:
            runs.append((model, layer, layer + 1, factor))
    return replace(recipe, slices=tuple(_slice(run, writers or Writers(())) for run in runs))


def _layers(recipe: Recipe, piece: Slice) -> range:
    (source, *others), own = piece.sources, (recipe.parameters, piece.parameters, piece.sources[0].parameters)
    if recipe.method != "passthrough" or others or source.layers is None:
        raise RecipeError(
            f"scales are for paths, and the recipe is a {recipe.method}",
            hint="`merge_method: passthrough`, and in each slice one source with a layer_range",
        )
    given = next((name for parameters in own for name, _ in parameters if name in ("scale", "shift")), None)
    if given is not None:
        raise RecipeError(f"the layers of {source.model} have a `{given}` already", hint="fold scales once")
    return range(*source.layers)


def _problems(scales: Sequence[float], n: int) -> list[Problem]:
    if n == 0:
        return [Problem("the path of the recipe is empty", hint="a model needs at least one layer")]
    if len(scales) != n:
        return [Problem(f"{len(scales)} scales for a path of {n} layers", hint="one for each position")]
    problems = [
        Problem(f"the scale of position {k} is {w!r}", hint="a positive number: 0 would erase the hidden state")
        for k, w in enumerate(scales)
        if not (math.isfinite(w) and w > 0.0)
    ]
    factors = () if problems else itertools.accumulate(scales, operator.mul)
    far = next(((k, c) for k, c in enumerate(factors) if not 1.0 / MOST <= c <= MOST), None)
    if far is not None:
        what = f"the scales of positions 0 to {far[0]} multiply to {far[1]:g}"
        problems.append(Problem(what, hint=f"{1.0 / MOST:g} to {MOST:g}: weights are divided by it"))
    return problems


def _slice(run: tuple[str, int, int, float], writers: Writers) -> Slice:
    model, first, past, factor = run
    if factor == 1.0:
        return Slice((Source(model, (first, past)),))
    scale = 1.0 / factor
    values = (*(Conditional(scale, name) for name in writers.names), Conditional(1.0))
    parameters: dict[str, tuple[Conditional, ...]] = {"scale": values}
    if writers.less_one:
        shifts = (Conditional(scale - 1.0, name) for name in writers.names)
        parameters["shift"] = (*shifts, Conditional(0.0))
    return Slice((Source(model, (first, past), freeze_parameters(parameters)),))
