"""Activations of a shared prefix: a path whose first layers another one had starts where these end.

Candidates of a layer-order search differ from some layer on, and log-likelihoods run the same batches for all of them.
So the hidden states after some layers are kept for each batch, and a later candidate whose first layers are the same
does not compute them again. The forward pass stays the model's own: layers that are not needed hand on what is kept.
A kept state is the tensor that the layer gave, so scores have the same bits with and without it.

What is kept. A prefix is worth keeping once a second candidate has it: then it is given again. Each batch holds as many
states as the budget allows to all of them, at the depths where candidates branched; the one that was not used for
the longest time goes first. A state costs memory and no time, since it is a reference.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from evomerge.layer_path import POSITION_FREE, content
from evomerge.methods import Tables
from evomerge.recipe import Recipe, TensorPlan, layer_index, with_layer

if TYPE_CHECKING:
    from evomerge.model import LiveModel

REMEMBERED = 1 << 14  # prefixes that were seen
UNUSED = 32  # candidates after which a batch that none of them used is given up


@dataclass
class _States:
    """What is kept of one batch: states by prefix, the longest unused first, and the size of one."""

    size: int = 0
    used: int = 0  # the last candidate
    kept: OrderedDict[bytes, Any] = field(default_factory=OrderedDict)


class Prefixes:
    """Hidden states by batch and prefix, in the memory that a worker's tables leave of their budget.

    Args:
        tables: of the worker; a search for layer orders leaves them almost empty.
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._limit = tables.budget_bytes
        self._chain: Sequence[bytes] = ()
        self._layers: Sequence[nn.Module] = ()
        self._shared = 0  # layers of the installed path that an earlier one had too
        self._candidate = 0
        self._paused = False
        self._late: frozenset[str] | None = None
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._batches: dict[bytes, _States] = {}
        self._one_each = 0  # bytes of one state of every batch
        self._proved: set[int] = set()
        self.problem = ""  # why states are not reused with this model
        self.n_bytes = 0
        self.passes = self.hits = self.layers = self.saved = 0

    def leave(self) -> None:
        """The weights are about to change: nothing is known of them until `enter`."""
        self._chain, self._layers, self._shared, self._paused = (), (), 0, False

    def enter(self, live: LiveModel, recipe: Recipe, plans: Sequence[TensorPlan]) -> None:
        """The live model is now the recipe's. Merged weights are shared with no other, and cost nothing here."""
        layers = live.layers.modules
        if self.problem or not layers or any(plan.method not in POSITION_FREE for plan in plans):
            return
        if self._late is None:
            self._late = late_tensors(live)
        self.follow(chain(recipe, plans, live.layers.types(), self._late), layers)

    def follow(self, links: Sequence[bytes], layers: Sequence[nn.Module]) -> None:
        """The next candidate's layers, and for each what names the state behind it; see `chain`."""
        self._candidate += 1
        self._chain, self._layers = tuple(links), tuple(layers)
        known = itertools.takewhile(lambda link: link in self._seen, self._chain)
        self._shared = sum(1 for _ in known)
        for link in self._chain:
            self._seen[link] = None
            self._seen.move_to_end(link)
        while len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        for key in [k for k, batch in self._batches.items() if self._candidate - batch.used > UNUSED]:
            old = self._batches.pop(key)
            self.n_bytes -= len(old.kept) * old.size
            self._one_each -= old.size
        self._make_room(0, keep=0)

    def forward(self, key: bytes, call: Callable[[], Any]) -> Any:
        """One forward pass of the installed model without a cache; `call` computes it, `key` names its inputs.

        Whether a model can start at a layer is found out by the first pass that does, which is computed in full too.
        """
        if not self._chain or self._paused or any(map(_is_watched, self._layers)):
            return call()
        batch = self._batches.setdefault(key, _States())
        batch.used = self._candidate
        depth = next((d for d in range(len(self._chain) - 1, 0, -1) if self._chain[d - 1] in batch.kept), 0)
        self.passes += 1
        self.layers += len(self._chain)
        if depth and depth not in self._proved:
            whole, out = call(), self._pass(batch, depth, call)
            if not _same(whole.logits, out.logits):
                self.problem = f"with the state after {depth} layers kept, its logits are others"
                self._forget()
                self.leave()
            self._proved.add(depth)
            return whole
        self.hits += depth > 0
        self.saved += depth
        return self._pass(batch, depth, call)

    def _pass(self, batch: _States, depth: int, call: Callable[[], Any]) -> Any:
        """A forward pass that starts after `depth` layers, and what is wanted of it is kept."""
        found: dict[int, Any] = {}
        handles = []
        last = len(self._layers)
        wanted = self._wanted(batch, depth) if batch.size else [last]  # the size of a state is not known before
        try:
            for d in wanted:
                handles.append(self._layers[d - 1].register_forward_hook(_keeper(found, d)))
            if depth:
                batch.kept.move_to_end(self._chain[depth - 1])
                state = batch.kept[self._chain[depth - 1]]
                for layer in self._layers[:depth]:
                    layer.__dict__["forward"] = lambda *args, **kwargs: state
            out = call()
        finally:
            for layer in self._layers[:depth]:
                layer.__dict__.pop("forward", None)
            for handle in handles:
                handle.remove()
        if any(_tensor_of(found.get(d)) is None for d in wanted):
            self.problem = "its layers do not give a hidden state"
            self._forget()
            self.leave()
            return out
        if not batch.size:
            batch.size = _bytes(found[last])
            self._one_each += batch.size
            return out
        for d in sorted(found, reverse=True):  # the deepest first: if only one has a place, it saves the most
            self._keep(batch, self._chain[d - 1], found[d])
        return out

    def _wanted(self, batch: _States, depth: int) -> list[int]:
        """Depths to keep: all that an earlier candidate had, or as many as have a place, evenly apart.

        Never the last: what follows it is the model's own code, which may write to what it reads.
        """
        new = range(depth + 1, min(self._shared, len(self._chain) - 1) + 1)
        places = max(1, self._places() - len(batch.kept))
        count = min(len(new), places)
        return [new[(i + 1) * len(new) // count - 1] for i in range(count)]

    def _places(self) -> int:
        """How many states each batch may have."""
        return self.budget_bytes // self._one_each

    @property
    def budget_bytes(self) -> int:
        """For states: what the tables leave."""
        return min(self._limit, max(0, self._tables.budget_bytes - self._tables.n_bytes))

    def _keep(self, batch: _States, link: bytes, state: Any) -> None:
        size = batch.size
        if link in batch.kept or _bytes(state) > size:
            return
        while batch.kept and len(batch.kept) >= max(1, self._places()):
            batch.kept.popitem(last=False)
            self.n_bytes -= size
        if self._make_room(size, keep=len(batch.kept) + 1):
            batch.kept[link] = state
            self.n_bytes += size

    def _make_room(self, size: int, keep: int) -> bool:
        """Give up states of the batches that have most, but more than `keep`, until `size` fits; whether it does."""
        while self.n_bytes + size > self.budget_bytes:
            fullest = max(self._batches.values(), key=lambda batch: len(batch.kept), default=None)
            if fullest is None or len(fullest.kept) <= keep:
                return False
            fullest.kept.popitem(last=False)
            self.n_bytes -= fullest.size
        return True

    def release(self) -> bool:
        """Memory ran out: give up every state until the next candidate, which gets half; whether there were any."""
        held = self.n_bytes > 0
        self._forget()
        self._paused = True
        if held:
            self._limit //= 2
        return held

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Compute every layer in here, as where a second score shall show whether scores repeat."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def _forget(self) -> None:
        self._batches.clear()
        self.n_bytes = self._one_each = 0

    def report(self) -> dict[str, float]:
        """Bytes held, forward passes, how many of them started behind a prefix, and the share of layers saved."""
        if not self.passes:
            return {}
        return {
            "prefix_bytes": self.n_bytes,
            "prefix_passes": self.passes,
            "prefix_hits": self.hits,
            "prefix_saved": self.saved / self.layers,
        }


def chain(
    recipe: Recipe, plans: Sequence[TensorPlan], types: Sequence[tuple[str, ...]], late: frozenset[str]
) -> tuple[bytes, ...]:
    """For each depth from 1 on, a digest of everything that the hidden state after so many layers depends on.

    Args:
        types: of the layer at each position.
        late: tensors outside the layers that do not count; see `late_tensors`.
    """
    before: list[tuple[str, str]] = []
    held: dict[int, list[tuple[str, str]]] = {position: [] for position in range(len(types))}
    for plan in plans:
        index = layer_index(plan.name)
        if index is not None:
            held[index].append((with_layer(plan.name, 0), repr(content(recipe, plan))))
        elif plan.name not in late:
            before.append((plan.name, repr(content(recipe, plan))))
    link, links = _digest(sorted(before)), []
    for position, kind in enumerate(types):
        link = _digest((link, kind, sorted(held[position])))
        links.append(link)
    return tuple(links)


def _digest(value: object) -> bytes:
    return hashlib.blake2b(repr(value).encode(), digest_size=16).digest()


@torch.no_grad()
def late_tensors(live: LiveModel) -> frozenset[str]:
    """The tensors outside the layers that nothing reads before the last layer is through: the last norm, the head.

    Found by watching one forward pass. What no module reads when it is called counts as read before.
    """
    layers = live.layers.modules
    inside = {id(module) for layer in layers for module in layer.modules()}
    early: set[int] = set()
    late: set[int] = set()
    reading = [early]

    def see(module: nn.Module, args: Any) -> None:
        held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        reading[0].update(id(tensor) for tensor in held)

    def through(module: nn.Module, args: Any, output: Any) -> None:
        reading[0] = late

    outside = [module for module in live.model.modules() if id(module) not in inside]
    handles = [module.register_forward_pre_hook(see) for module in outside]
    handles.append(layers[-1].register_forward_hook(through))
    try:
        live.model(input_ids=torch.tensor([[0, 1]], device=live.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return frozenset(name for name, tensor in live.tensors.items() if id(tensor) in late - early)


def _keeper(found: dict[int, Any], depth: int) -> Callable[[nn.Module, Any, Any], None]:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found[depth] = _slim(output)

    return keep


def _is_watched(layer: nn.Module) -> bool:
    """Whether somebody else follows what the layer computes; transformers' own hooks wait to be asked."""
    hooks = layer._forward_hooks.values()
    theirs = all(str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)
    return not theirs or bool(layer._forward_pre_hooks) or "forward" in layer.__dict__


def _slim(output: Any) -> Any:
    """What a layer gave without what may stand beside its hidden state: attention weights, which nobody asks for."""
    return (output[0], *(None for _ in output[1:])) if isinstance(output, tuple) and output else output


def _tensor_of(state: Any) -> Tensor | None:
    """The hidden state that a layer gave, alone or as the first of a tuple."""
    found = state[0] if isinstance(state, tuple) and state else state
    return found if isinstance(found, Tensor) else None


def _bytes(state: Any) -> int:
    tensor = _tensor_of(state)
    return 0 if tensor is None else tensor.untyped_storage().nbytes()


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal bits; a candidate whose logits are NaN says nothing against it."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
