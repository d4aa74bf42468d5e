"""Moments of the models whose layers a path may use: how large the hidden state is before each of their layers.

A path that enters a layer of another model, or of another depth, gives it a hidden state of a size that it never saw.
The ratio of two of these sizes is where the search for the scale at such a place begins. They are measured once, when a
study is made, on the first items of its objectives, and kept in the study, so that a continued search makes the same
recipes to the bit.

The size of a state is the median over tokens of the root mean square of its elements: a few tokens (the first one, as a
rule) have states that are hundreds of times as large as all others (Sun et al. 2024, arXiv 2402.17762), and a mean over
tokens would see nothing else. Items are scored one by one, so that the moments depend on no batch; what pads the
continuations of one item is not masked, since single tokens do not move a median.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evomerge.errors import EnvironmentProblem, NonFinite
from evomerge.objectives import make_objective
from evomerge.pool import Pool
from evomerge.recipe import Recipe, Slice, Source

if TYPE_CHECKING:
    from evomerge.model import LiveModel
    from evomerge.worker import Failed, Outcome, WorkerSpec

ITEMS = 16  # of each objective's search split
RMS, INFLUENCE = "rms", "influence"
Moments = dict[str, dict[str, list[float]]]


def whole_model(path: str, n_layers: int) -> Recipe:
    """The recipe of one model as it is: all of its layers in their own order."""
    return Recipe("passthrough", (Slice((Source(path, (0, n_layers)),)),))


def measure(
    spec: WorkerSpec,
    sources: Sequence[tuple[str, str]],
    n_layers: int,
    start_pool: Callable[[WorkerSpec], Pool],
    on_note: Callable[[str], None] = lambda note: None,
) -> Moments:
    """Score the first items of each objective with each model, and see what its layers read.

    Objectives without scores of parts are left out unless there are no others; they then score all their items.

    Args:
        spec: what workers of the study load.
        sources: (name, path) of each model; `spec` names the paths.
        start_pool: makes the pool of one worker that does it.

    Returns:
        source -> {"rms": (L + 1,) before each layer and behind the last, "influence": (L,)}, see `Observed`; {} if no
        objective runs the layers.

    Raises:
        EnvironmentProblem: a model cannot be scored, or its hidden state is not finite.
    """
    from evomerge.worker import Job

    made = [(o, make_objective(o)) for o in spec.objectives]
    chosen = [(o, m) for o, m in made if m.partial] or made
    singles: list[dict[str, list[int] | None]] = [
        {m.name: [i]} for _, m in chosen if m.partial for i in range(min(ITEMS, m.size("search")))
    ]
    parts = singles or [{m.name: None for _, m in chosen}]
    pool = start_pool(replace(spec, objectives=tuple(o for o, _ in chosen)))
    found: Moments = {}
    try:
        for number, (_, path) in enumerate(sources):
            pool.submit(Job(number, whole_model(path, n_layers), parts=parts, moments=True))
        while len(found) < len(sources):
            for result in pool.wait(timeout_s=1.0):
                name, path = sources[result.number]
                found[name] = _moments(result, name, path)
    finally:
        pool.close()
    if any(found.values()):
        return {name: found[name] for name, _ in sources}
    on_note("no objective runs the models' layers: scales start at 1, without moment matching")
    return {}


def _moments(result: Outcome | Failed, name: str, path: str) -> dict[str, list[float]]:
    from evomerge.worker import Failed

    if isinstance(result, Failed):
        raise EnvironmentProblem(
            f"the hidden states of {name} ({path}) cannot be measured ({result.reason}): {result.message}",
            hint="leave it out of the space's `sources:`, or set `match: false` to start scales at 1 unmeasured",
        )
    return {key: list(values) for key, values in result.moments.items()}


@dataclass(frozen=True)
class _Seen:
    """What one layer did in one forward pass, per token: sizes of what it read and gave, and their cosine."""

    read: Tensor
    given: Tensor
    cosine: Tensor


class Observed:
    """Watches the layers of a live model while it scores. Use as a context manager.

    Everything is computed in float64, per token, so that it does not depend on how tokens are batched.
    """

    def __init__(self, live: LiveModel) -> None:
        self._live = live
        self._handles: list[Any] = []
        self._seen: list[list[_Seen]] = []

    def __enter__(self) -> Observed:
        self._live.layers.require()
        for layer in self._live.layers.modules:
            seen: list[_Seen] = []
            self._seen.append(seen)

            def look(
                module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, seen: list[_Seen] = seen
            ) -> None:
                before: Tensor = args[0] if args else kwargs["hidden_states"]
                seen.append(_looked(before, out[0] if isinstance(out, tuple) else out))

            self._handles.append(layer.register_forward_hook(look, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def moments(self) -> dict[str, tuple[float, ...]]:
        """What was seen.

        Returns:
            "rms": (L + 1,) median over tokens of the root mean square of what each layer read, and at the end of what
            the last one gave; "influence": (L,) mean over tokens of 1 - cosine of what a layer read and gave (block
            influence: Men et al. 2024, arXiv 2403.03853, equation 1). {} if no layer ran.

        Raises:
            NonFinite: a hidden state holds NaN or infinity, or is 0 everywhere.
        """
        if not all(self._seen):
            return {}
        sizes = [torch.cat([s.read for s in seen]) for seen in self._seen]
        sizes.append(torch.cat([s.given for s in self._seen[-1]]))
        rms = tuple(float(size.median()) for size in sizes)
        for index, (size, middle) in enumerate(zip(sizes, rms, strict=True)):
            place = f"before layer {index}" if index < len(self._seen) else "behind the last layer"
            if not bool(torch.isfinite(size).all()):
                raise NonFinite(f"the hidden state {place} holds NaN or infinity", reason="hidden")
            if middle == 0.0:
                raise NonFinite(f"the hidden state {place} is 0 in most tokens", reason="hidden")
        influence = tuple(float(1.0 - torch.cat([s.cosine for s in seen]).mean()) for seen in self._seen)
        return {RMS: rms, INFLUENCE: influence}


def _looked(before: Tensor, after: Tensor) -> _Seen:
    """Per token of (B, L, H) states: (B * L,) sizes and cosine."""
    read, given = before.detach().double().flatten(0, -2), after.detach().double().flatten(0, -2)
    sizes = [state.square().mean(dim=-1).sqrt() for state in (read, given)]
    cosine = (read * given).mean(dim=-1) / (sizes[0] * sizes[1]).clamp(min=torch.finfo(torch.float64).tiny)
    return _Seen(sizes[0], sizes[1], cosine)
