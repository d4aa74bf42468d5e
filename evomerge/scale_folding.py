"""Scales between layers, folded into the weights: a path with scales becomes a plain passthrough recipe.

Before layer k the hidden state is multiplied by w_k (Akiba et al. 2024, arXiv 2403.13187, section 3.2, where a path
changes its source). A pre-norm layer adds F(norm(h)) to h, and a norm does not see a positive factor of h. With
c_k = w_1 ... w_k the scaled states are h_k = c_k g_k, where g_{k+1} = g_k + F_k(norm(g_k)) / c_k: the same network with
the projections that write to the hidden state divided by c_k. The last norm removes what is left of the factor. What
differs is the norm's epsilon, which is added to the mean square of g instead of that of h.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from evomerge.errors import Problem, RecipeError
from evomerge.recipe import Conditional, Recipe, Slice, Source

# What writes to the hidden state, by `model_type`: networks that normalise what each layer reads and nothing else.
OUTPUT_PROJECTIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3"), ("o_proj", "down_proj")),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense.", "mlp.dense_4h_to_h"),
}


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
    names = OUTPUT_PROJECTIONS.get(model_type)
    if names is None and any(w != 1.0 for w in scales):
        problems.append(
            Problem(
                f"scales between the layers of a {model_type} model cannot be folded into its weights",
                hint=f"set every scale to 1; it is exact for {', '.join(OUTPUT_PROJECTIONS)}, which have no norm "
                "behind their output projections",
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
    return replace(recipe, slices=tuple(_slice(run, names or ()) for run in runs))


def _layers(recipe: Recipe, piece: Slice) -> range:
    (source, *others), own = piece.sources, (recipe.parameters, piece.parameters, piece.sources[0].parameters)
    if recipe.method != "passthrough" or others or source.layers is None:
        raise RecipeError(
            f"scales are for paths, and the recipe is a {recipe.method}",
            hint="`merge_method: passthrough`, and in each slice one source with a layer_range",
        )
    if any(name == "scale" for parameters in own for name, _ in parameters):
        raise RecipeError(f"the layers of {source.model} have a `scale` already", hint="fold scales once")
    return range(*source.layers)


def _problems(scales: Sequence[float], n: int) -> list[Problem]:
    if len(scales) != n:
        return [Problem(f"{len(scales)} scales for a path of {n} layers", hint="one for each position")]
    return [
        Problem(f"the scale of position {k} is {w!r}", hint="a positive number: 0 would erase the hidden state")
        for k, w in enumerate(scales)
        if not (math.isfinite(w) and w > 0.0)
    ]


def _slice(run: tuple[str, int, int, float], names: Sequence[str]) -> Slice:
    model, first, past, factor = run
    if factor == 1.0:
        return Slice((Source(model, (first, past)),))
    values = (*(Conditional(1.0 / factor, name) for name in names), Conditional(1.0))
    return Slice((Source(model, (first, past), (("scale", values),)),))
