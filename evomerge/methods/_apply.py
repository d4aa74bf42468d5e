"""One tensor of a recipe: fetch, cast, merge, round once."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

from evomerge import registry
from evomerge.errors import RecipeError
from evomerge.methods._core import Inputs, Method
from evomerge.recipe import Recipe, TensorPlan

_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}

_BUFFERS = ("inv_freq",)  # rotary caches: derived from the config, never merged


def torch_dtype(name: str) -> torch.dtype:
    """Returns the torch dtype that a recipe calls `name`."""
    if name not in _DTYPES:
        raise RecipeError(f"unknown dtype {name!r}", hint=f"one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def merge_tensor(
    plan: TensorPlan,
    get: Callable[[str, str], Tensor],
    recipe: Recipe,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns the merged tensor of `plan`; `get(model, tensor)` gives the source tensors.

    `compat: paper` works in float32 (float64 where an input has it) and rounds once, to
    `out_dtype`, else the recipe's out_dtype, else its dtype, else the dtype of the base or first
    input. `compat: mergekit` casts every input to the recipe's dtype, or to the common dtype of
    all inputs if it has none, works in that dtype, and casts to out_dtype at the end.

    Pure copies (weights that select the base or one expert, integer tensors, rotary caches) keep
    every bit, signed zeros included. A pure copy that needs no cast IS the source tensor, so the
    result may share memory with what `get` returned: read it or copy it, do not write to it.

    Raises:
        WeightsError: if the shapes of the sources differ.
        CandidateFailure: if the parameters are infeasible for this tensor.
    """
    base = None if plan.base is None else get(*plan.base)
    experts = [get(*source) for source in plan.inputs]
    donor = experts[0] if base is None else base
    if not donor.is_floating_point() or plan.name.endswith(_BUFFERS):
        return donor
    out = out_dtype or _out_dtype(recipe, donor)
    method: Method = registry.get("methods", plan.method)
    if recipe.compat == "mergekit":
        work_base, work_experts = _cast_like_mergekit(base, experts, recipe)
    else:
        every = experts if base is None else [base, *experts]
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in every), torch.float32)
        work_base = None if base is None else base.to(dtype)
        work_experts = [expert.to(dtype) for expert in experts]
    inputs = Inputs(
        name=plan.name,
        base=work_base,
        experts=tuple(work_experts),
        streams=plan.streams,
        seed=recipe.seed,
        compat=recipe.compat,
    )
    per_expert = {
        name: tuple(values[name] for values in plan.per_input) for name in (plan.per_input[0] if plan.per_input else {})
    }
    result = method(inputs, **plan.shared, **per_expert)
    if recipe.compat == "mergekit":
        keep_dtype = out_dtype is None and recipe.out_dtype is None
        return result if keep_dtype else result.to(out)
    for source, work in zip([base, *experts], [work_base, *work_experts], strict=True):
        if source is not None and result is work:
            result = source  # a pure copy: no cast to the working dtype and back
    return result.to(out)


def _out_dtype(recipe: Recipe, donor: Tensor) -> torch.dtype:
    name = recipe.out_dtype or recipe.dtype
    return torch_dtype(name) if name else donor.dtype


def _cast_like_mergekit(
    base: Tensor | None, experts: list[Tensor], recipe: Recipe
) -> tuple[Tensor | None, list[Tensor]]:
    """Casts everything to the recipe's dtype, or without one to the common (promoted) dtype."""
    every = experts if base is None else [base, *experts]
    if recipe.dtype is not None:
        dtype = torch_dtype(recipe.dtype)
    else:
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in every))
    return None if base is None else base.to(dtype), [expert.to(dtype) for expert in experts]
