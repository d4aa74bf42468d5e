"""What a recipe's constant parameters make impossible or doubtful, found before any weights are read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomerge import registry
from evomerge.errors import CandidateFailure, Problem
from evomerge.methods import Merge, Method
from evomerge.recipe import Recipe, TensorPlan, is_embedding, layer_index
from evomerge.spaces import Space
from evomerge.strict_yaml import Path

BALANCED = 1e-6  # weights that cancel to less than this share of their size
PROBE_SHAPE = (4, 4)
RANDOM = ("random", "ranked")  # of the ways in which `pipeline` can thin a task vector

Where = Callable[[Path], str]


def refused(recipe: Recipe, plans: Sequence[TensorPlan], where: Where) -> list[Problem]:
    """The slices whose weights the method itself refuses, such as a `linear` average with weights of sum zero.

    Each set of parameters is tried on tiny made-up tensors. Only the reasons "weights_cancel" and "bad_..." count:
    whatever else a method finds infeasible may depend on the tensor.
    """
    problems: dict[Path, Problem] = {}
    merge = Merge(recipe, plans, _probe)
    for path, plan in _distinct(recipe, plans):
        try:
            merge.tensor(plan)
        except CandidateFailure as failure:
            if failure.reason == "weights_cancel" or failure.reason.startswith("bad_"):
                problems.setdefault(path, Problem(failure.message, where(path), failure.hint))
        except Exception:
            continue
    return list(problems.values())


def doubtful(recipe: Recipe, plans: Sequence[TensorPlan], where: Where) -> list[Problem]:
    """The slices whose weights sum to zero under `normalize` in a method that goes on without the division."""
    warnings: dict[Path, Problem] = {}
    for path, plan in _distinct(recipe, plans):
        weights = [float(values["weight"]) for values in plan.per_input if "weight" in values]
        size = sum(abs(w) for w in weights)
        if plan.shared.get("normalize") is True and size > 0.0 and abs(sum(weights)) <= BALANCED * size:
            message = (
                f"{plan.method}: the weights {weights} sum to {sum(weights):g} under `normalize: true`; where the "
                "divisor vanishes it is replaced by 1"
            )
            warnings.setdefault(path, Problem(message, where(path), "normalize: false says what is meant"))
    return list(warnings.values())


def infeasible_share(space: Space, names: Sequence[str], n_points: int = 32) -> tuple[float, str]:
    """The share of a space's points that its method refuses whatever the tensors are, and what it says of one.

    The start and `n_points - 1` points drawn with a fixed seed are tried, as `refused` does.
    """
    n_layers = _n_layers(names)
    generator = np.random.default_rng(0)
    points = [space.start(), *(space.decode(generator.random(space.dim)) for _ in range(n_points - 1))]
    said = []
    for point in points:
        recipe = space.recipe(point)
        said += [str(p) for p in refused(recipe, recipe.plan(names, n_layers), lambda path: "")[:1]]
    return len(said) / len(points), said[0] if said else ""


def drops_at_random(plans: Sequence[TensorPlan], searched: Collection[str] = ()) -> bool:
    """Whether any tensor's task vectors are thinned at random (DARE and its kin).

    `searched` names the parameters that a search may set otherwise than these plans do.
    """
    return any(
        ("sparsify" in searched or plan.shared.get("sparsify", "random") in RANDOM)
        and ("density" in searched or any(v.get("density", 1.0) < 1.0 for v in (plan.shared, *plan.per_input)))
        for plan in plans
        if _method(plan).random
    )


def mixes(plans: Sequence[TensorPlan]) -> bool:
    """Whether any tensor is made of more than one model's: stacks of layers are not."""
    return any(len(plan.inputs) + (plan.base is not None) > 1 for plan in plans)


def slice_paths(recipe: Recipe, n_layers: int) -> list[Path]:
    """For each output layer, the place in the recipe's YAML that lists its sources."""
    if recipe.slices[0].sources[0].layers is None:
        return [("models",)] * n_layers
    return [("slices", i, "sources") for i, piece in enumerate(recipe.slices) for _ in range(piece.length(n_layers))]


def _distinct(recipe: Recipe, plans: Sequence[TensorPlan]) -> Iterator[tuple[Path, TensorPlan]]:
    """One plan for each set of parameters, with the place of its sources."""
    found = [layer_index(plan.name) for plan in plans]
    paths = slice_paths(recipe, _n_layers(plan.name for plan in plans)) or [("models",)]
    seen: set[str] = set()
    for plan, layer in zip(plans, found, strict=True):
        if layer is None:
            path = paths[0] if is_embedding(plan.name) else paths[-1]
        else:
            path = paths[min(layer, len(paths) - 1)]
        key = repr((path, plan.shared, plan.per_input))
        if key not in seen:
            seen.add(key)
            yield path, plan


def _n_layers(names: Iterable[str]) -> int:
    return max((index for index in map(layer_index, names) if index is not None), default=0) + 1


def _probe(model: str, name: str) -> Tensor:
    """A small tensor of its own for each model."""
    generator = torch.Generator().manual_seed(sum(model.encode()))
    return torch.randn(PROBE_SHAPE, generator=generator)


def _method(plan: TensorPlan) -> Method:
    found: Any = registry.get("methods", plan.method)
    assert isinstance(found, Method)
    return found
