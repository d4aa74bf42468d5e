"""Making one task vector sparse: keep the largest (TIES), or drop at random (DARE)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from evomerge.methods._core import Inputs
from evomerge.methods._masks import keep_largest, keep_mask
from evomerge.methods._sums import fixed_norm1

_MERGEKIT_TINY = 1e-7  # mergekit does not rescale a task vector whose L1 norm is below this


def trim(x: Inputs, i: int, density: float, rescale: str) -> Tensor:
    """Returns task vector i with its `density` largest magnitudes kept (a temporary)."""
    delta = x.delta(i)
    if density >= 1.0:
        return delta
    return _apply(x, delta, _injected(x, i, lambda: keep_largest(delta, density)), density, rescale)


def drop(x: Inputs, i: int, density: float, rescale: str) -> Tensor:
    """Returns task vector i with each element kept with probability `density` (a temporary)."""
    delta = x.delta(i)
    if density >= 1.0:
        return delta
    return _apply(x, delta, _injected(x, i, lambda: _random(x, i, density)), density, rescale)


def _random(x: Inputs, i: int, density: float) -> Tensor:
    return keep_mask(
        x.experts[i].shape,
        density,
        seed=x.seed,
        tensor_name=x.name,
        stream=x.streams[i],
        device=x.experts[i].device,
    )


def _injected(x: Inputs, i: int, own: Callable[[], Tensor]) -> Tensor:
    given = x.keep(i) if x.keep is not None else None
    return own() if given is None else given


def _apply(x: Inputs, delta: Tensor, mask: Tensor, density: float, rescale: str) -> Tensor:
    """Masks and rescales a temporary in place.

    The mask multiplies rather than selects, so that a NaN in a dropped element stays visible.
    """
    if rescale != "l1":
        delta.mul_(mask)
        return delta.div_(density) if rescale == "inv_prob" and density > 0.0 else delta
    before = fixed_norm1(delta)
    after = fixed_norm1(delta.mul_(mask))
    if x.paper:
        return delta.mul_(before / after) if after > 0.0 else delta
    if before < _MERGEKIT_TINY or after < _MERGEKIT_TINY:
        return delta
    norms = torch.tensor([before, after], dtype=delta.dtype, device=delta.device)
    return delta.mul_(norms[0] / norms[1])


def dare_rescale(x: Inputs, rescale: bool | str) -> str:
    """Returns what `rescale` means: true is the paper's division, or mergekit's norm matching."""
    if isinstance(rescale, str):
        return rescale
    if not rescale:
        return "none"
    return "inv_prob" if x.paper else "l1"
