"""A recipe's tensors, one at a time: fetch, merge, round once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor

from evomerge import registry
from evomerge.errors import RecipeError
from evomerge.methods import _fused
from evomerge.methods._core import Method
from evomerge.methods._inputs import Family, Inputs, Target
from evomerge.methods._tables import Tables
from evomerge.recipe import Recipe, TensorPlan, layer_index

_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}

_BUFFERS = ("inv_freq",)  # rotary caches: derived from the config, never merged

GetTensor = Callable[[str, str], Tensor]


def torch_dtype(name: str) -> torch.dtype:
    """Returns the torch dtype that a recipe calls `name`."""
    if name not in _DTYPES:
        raise RecipeError(f"unknown dtype {name!r}", hint=f"one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


class Merge:
    """One recipe over resident weights: gives each output tensor on demand, in any order.

    `compat: paper` works in float32 (float64 where an input has it) and rounds once, to the asked dtype, else the
    recipe's out_dtype, else its dtype, else the dtype of the base or first input. `compat: mergekit` casts every
    input to the recipe's dtype, or to the common dtype of all inputs if it has none, works in that dtype, and
    casts to out_dtype at the end.

    Pure copies (weights that select the base or one expert, integer tensors, rotary caches) keep every bit, signed
    zeros included.

    Args:
        recipe: what to merge.
        plans: the recipe's plan, all tensors: methods with global statistics look at every one.
        get: (model, tensor name) -> resident tensor; never written to.
        tables: the worker's memory of what depends on the models alone; None starts an empty one.
    """

    def __init__(
        self, recipe: Recipe, plans: Sequence[TensorPlan], get: GetTensor, tables: Tables | None = None
    ) -> None:
        self.recipe = recipe
        self.plans = tuple(plans)
        self.get = get
        self.tables = Tables() if tables is None else tables
        self.tables.next_candidate()
        layers = [index for index in (layer_index(plan.name) for plan in self.plans) if index is not None]
        self.n_layers = max(layers) + 1 if layers else 1
        cast = recipe.dtype if recipe.compat == "mergekit" else None
        sources = repr((cast, [(plan.base, plan.inputs) for plan in self.plans]))
        digest = hashlib.blake2b(sources.encode(), digest_size=16).hexdigest()
        self.family = Family(digest, recipe.fingerprint, self._inputs_of_all)

    def tensor(self, plan: TensorPlan, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the merged tensor of `plan`; a pure copy that needs no cast IS the source: do not write to it.

        Raises:
            WeightsError: if the shapes of the sources differ.
            CandidateFailure: if the parameters are infeasible for this tensor.
        """
        base, experts = self._fetch(plan)
        donor = experts[0] if base is None else base
        if _is_copied(plan, donor):
            return donor
        if self.recipe.compat == "mergekit" and dtype is None and self.recipe.out_dtype is None:
            return self._merged(self._inputs(plan, base, experts), plan)
        out = dtype or _out_dtype(self.recipe, donor)
        target = Target(torch.empty(donor.shape, dtype=out, device=donor.device))
        return self._merged(self._inputs(plan, base, experts, target), plan).to(out)

    def write(self, plan: TensorPlan, target: Tensor) -> bool:
        """Writes the merged tensor of `plan` into `target`, rounded to its dtype; whether all values are finite.

        The same bits as `tensor(plan, target.dtype)`.
        """
        base, experts = self._fetch(plan)
        donor = experts[0] if base is None else base
        if _is_copied(plan, donor):
            target.copy_(donor)
            return True
        into = Target(target)
        direct = target.is_contiguous() and target.device == donor.device
        x = self._inputs(plan, base, experts, into if direct else None)
        merged = self._merged(x, plan)
        if merged is not target:
            if direct and _fused.usable(x) and _fused.readable(merged) and _fused.readable(target):
                _fused.blend(x, [merged], [1.0])  # the same bits, rounded once and checked on the way
            else:
                target.copy_(merged)
        return bool(torch.isfinite(target).all()) if into.finite is None else into.finite

    def _merged(self, x: Inputs, plan: TensorPlan) -> Tensor:
        method: Method = registry.get("methods", plan.method)
        return method(x, **_parameters(plan))

    def _fetch(self, plan: TensorPlan) -> tuple[Tensor | None, list[Tensor]]:
        base = None if plan.base is None else self.get(*plan.base)
        return base, [self.get(*source) for source in plan.inputs]

    def _inputs(
        self, plan: TensorPlan, base: Tensor | None, experts: list[Tensor], target: Target | None = None
    ) -> Inputs:
        if self.recipe.compat == "mergekit":
            base, experts = _cast_like_mergekit(base, experts, self.recipe)
        return Inputs(
            name=plan.name,
            base=base,
            experts=tuple(experts),
            streams=plan.streams,
            seed=self.recipe.seed,
            compat=self.recipe.compat,
            layer=layer_index(plan.name),
            n_layers=self.n_layers,
            parameters=_parameters(plan),
            sources=(plan.base, *plan.inputs),
            tables=self.tables,
            family=self.family,
            target=target,
        )

    def _inputs_of_all(self) -> Iterator[Inputs]:
        for plan in self.plans:
            base, experts = self._fetch(plan)
            if not _is_copied(plan, experts[0] if base is None else base):
                yield self._inputs(plan, base, experts)


def merge_tensor(plan: TensorPlan, get: GetTensor, recipe: Recipe, out_dtype: torch.dtype | None = None) -> Tensor:
    """Returns the merged tensor of one plan that stands alone: see `Merge.tensor`."""
    return Merge(recipe, (plan,), get).tensor(plan, out_dtype)


def _parameters(plan: TensorPlan) -> dict[str, object]:
    """Returns what the method is called with: one value, or one per input, by YAML key."""
    names = plan.per_input[0] if plan.per_input else {}
    return {**plan.shared, **{name: tuple(values[name] for values in plan.per_input) for name in names}}


def _is_copied(plan: TensorPlan, donor: Tensor) -> bool:
    return not donor.is_floating_point() or plan.name.endswith(_BUFFERS)


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
