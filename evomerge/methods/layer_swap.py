"""Layer swapping: the outer blocks of one model around the middle blocks of another."""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor

from evomerge.errors import CandidateFailure
from evomerge.methods import Inputs, Range, method


@method(
    "layer_swap",
    source="Layer Swapping for Zero-Shot Cross-Lingual Transfer 2024, arXiv 2410.01335",
    needs_base=False,
    n_experts=(2, 2),
    symmetric=False,
    identity=False,
)
def layer_swap(
    x: Inputs,
    *,
    bottom: Annotated[int, Range(0, 8, limits=(0, 1000))] = 4,
    top: Annotated[int, Range(0, 6, limits=(0, 1000))] = 3,
    transition: Annotated[int, Range(0, 2, limits=(0, 1000))] = 1,
    outside: Literal["outer", "middle"] = "outer",
) -> Tensor:
    """The first `bottom` and last `top` blocks of the FIRST model, the blocks between them of the SECOND.

    In the paper the outer model knows the language and the middle model knows mathematics. On the inner side of
    each border, `transition` blocks t move linearly from one model to the other: counted from the border, block
    j = 1 ... t takes the share (t + 1 - j) / (t + 1) of the outer model, so one transition block is the mean.
    `bottom: 0` or `top: 0` means no border there. Where the two transitions meet, the larger outer share holds;
    if `bottom` + `top` reach the number of blocks, every block is the outer model's. `outside` says which model gives
    the tensors outside the blocks (embeddings, final norm, head). All but the transition is copied bit for bit.

    Raises:
        CandidateFailure: for a number of blocks below 0.
    """
    for name, value in (("bottom", bottom), ("top", top), ("transition", transition)):
        if value < 0:
            raise CandidateFailure(
                f"layer_swap: {name} is {value} blocks (tensor {x.name!r})",
                hint="numbers of blocks are 0 or more",
                reason="bad_blocks",
            )
    share = float(outside == "outer") if x.layer is None else _outer_share(x.layer, x.n_layers, bottom, top, transition)
    if share in (0.0, 1.0):
        return x.experts[0] if share else x.experts[1]
    return (x.wide_experts[0] * share).add_(x.wide_experts[1] * (1.0 - share))


def _outer_share(layer: int, n_layers: int, bottom: int, top: int, transition: int) -> float:
    """Returns the outer model's share of one block, in [0, 1]."""

    def from_end(distance: int, width: int) -> float:
        return min(1.0, max(0.0, (width + transition - distance) / (transition + 1))) if width > 0 else 0.0

    return max(from_end(layer, bottom), from_end(n_layers - 1 - layer, top))
