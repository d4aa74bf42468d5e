"""Components: the parts of a model that a space gives values of their own.

A mapping gives each component the parts of the tensor names that it takes, tried in order. A list names ready-made
ones, whose order does not count: what a ready-made component takes depends on which others are listed only where
one lies within another (the norms inside attention are norms if `norms` is listed, attention otherwise).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from evomerge.recipe import Conditional, is_glob, layer_index

EVERYTHING = "*"  # the component entry that takes every tensor
REST = "rest"
WORD = re.compile(r"[A-Za-z0-9._-]+")

# In the order in which they are tried. Names of Llama, Mistral, Qwen, Gemma, Phi, OLMo, GPT-2, GPT-NeoX, OPT, Falcon.
PRESETS: dict[str, tuple[str, ...]] = {
    "norms": ("norm", "ln_"),
    "embeddings": ("embed_tokens", "embed_in", "embed_positions", "word_embeddings", "wte.", "wpe."),
    "head": ("lm_head", "embed_out"),
    "attention": ("self_attn.", ".attn.", ".attention.", "self_attention."),
    "mlp": (".mlp.", ".fc1.", ".fc2.", "feed_forward.", "block_sparse_moe."),
}
_OUTSIDE = ("embeddings", "head")  # without layers, so never split over layer groups or bent over depth

Bad = Callable[..., None]  # (where, message, hint="")


@dataclass(frozen=True)
class Component:
    """A named part of the model. A tensor belongs to the first component with a part that is in its name.

    `outside` says that it has no tensor in the layers.
    """

    name: str
    parts: tuple[str, ...]
    outside: bool = False

    def takes(self, tensor: str) -> bool:
        """True if one of the parts is in the name."""
        return any(Conditional(0.0, part).matches(tensor) for part in self.parts)


def read_components(given: Any, compat: str, names: Collection[str], bad: Bad) -> tuple[Component, ...]:
    """Return the components in the order in which they are tried.

    `names` are the model's tensors, if they are known: ready-made components then leave out what it does not have.
    """
    if isinstance(given, list):
        found = _from_list(given, bad)
        if found:
            found = _fitted(found, names, bad) if names else _closed(found)
    elif isinstance(given, Mapping):
        found = [made for name, parts in given.items() if (made := _own(str(name), parts, bad))]
        _refuse_empty(found, names, bad)
    else:
        bad("components", f"expected a list or a mapping, found {given!r}", "name: [part of a name]")
        return ()
    _check(found, compat, bad)
    return tuple(found)


def _own(name: str, parts: Any, bad: Bad) -> Component | None:
    where = f"components.{name}"
    if not WORD.fullmatch(name):
        bad(where, "a component's name is letters, digits, dots, - and _")
    if not isinstance(parts, list) or not parts or not all(isinstance(p, str) and p for p in parts):
        bad(where, f"{parts!r} is not a list of parts of tensor names")
        return None
    return Component(name, tuple(parts))


def _from_list(given: list[Any], bad: Bad) -> list[Component]:
    """Own components first, then the ready-made ones, then what takes everything."""
    own: list[Component] = []
    listed: list[str] = []
    for i, item in enumerate(given):
        if isinstance(item, str) and (item in PRESETS or item == REST):
            listed.append(item)
        elif isinstance(item, Mapping) and len(item) == 1:
            name, parts = next(iter(item.items()))
            made = _own(str(name), parts, bad)
            own += [made] if made else []
            listed.append(str(name))
        else:
            hint = f"one of {', '.join([*PRESETS, REST])}, or {{name: [part of a name]}}"
            bad(f"components[{i}]", f"{item!r} is not a ready-made component", hint)
    for name in sorted({name for name in listed if listed.count(name) > 1}):
        bad(f"components.{name}", "is listed twice")
    last = [part for part in own if EVERYTHING in part.parts]
    mine = [part for part in own if part not in last]
    named = {part.name for part in own}
    ready = [Component(n, p, n in _OUTSIDE) for n, p in PRESETS.items() if n in listed and n not in named]
    complete = bool(last) or len(ready) == len(PRESETS)
    if (REST in listed and REST not in named) or not complete:
        last.append(Component(REST, (EVERYTHING,)))
    return [*mine, *ready, *last]


def _closed(found: list[Component]) -> list[Component]:
    """Let the last component take every tensor if none does: with all five listed that is `mlp`."""
    if any(EVERYTHING in part.parts for part in found):
        return found
    inside = [i for i, part in enumerate(found) if not part.outside]
    last = found.pop(inside[-1] if inside else -1)
    return [*found, replace(last, parts=(EVERYTHING,), outside=False)]


def _refuse_empty(found: list[Component], names: Collection[str], bad: Bad) -> None:
    """A component that no tensor belongs to would be searched for nothing; only what takes the rest may be empty."""
    left = list(names)
    for part in found:
        mine = [name for name in left if part.takes(name)]
        left = [name for name in left if name not in mine]
        if names and not mine and EVERYTHING not in part.parts:
            bad(f"components.{part.name}", "no tensor of this model belongs to it", "name: [part of a name]")


def _fitted(found: list[Component], names: Collection[str], bad: Bad) -> list[Component]:
    """Leave out of the ready-made components the parts that no tensor has, and those that take no tensor."""
    left = list(names)
    kept = []
    for part in found:
        mine = [name for name in left if part.takes(name)]
        left = [name for name in left if not part.takes(name)]
        ready = part.parts == PRESETS.get(part.name)
        optional = part.name in _OUTSIDE if ready else part.parts == (EVERYTHING,) and part.name == REST
        if not mine and optional:
            continue  # tied models have no head; a complete list leaves no rest
        if not mine:
            bad(f"components.{part.name}", "no tensor of this model belongs to it", "name: [part of a name]")
        if ready:
            used = tuple(p for p in part.parts if any(Conditional(0.0, p).matches(name) for name in mine))
            layered = any(layer_index(name) is not None for name in mine)
            part = replace(part, parts=used or part.parts, outside=part.outside and not layered)
        kept.append(part)
    return _closed(kept) if kept else kept


def _check(found: list[Component], compat: str, bad: Bad) -> None:
    seen: list[str] = []
    for component in found:
        where = f"components.{component.name}"
        for part in component.parts:
            if compat == "mergekit" and is_glob(part):
                bad(where, f"{part!r}: mergekit's filters have no wildcards", "compat: paper, or a part of a name")
            hidden = next((other for other in seen if _hides(other, part)), None)
            if hidden is not None:
                bad(where, f"{part!r} never matches: {hidden!r} takes its tensors first")
            seen.append(part)
    if found and EVERYTHING not in seen:
        bad("components", "tensors that match no component would have no value", 'add a last one: rest: ["*"]')


def _hides(earlier: str, part: str) -> bool:
    """True if every tensor that `part` takes is taken by `earlier`."""
    if is_glob(part):
        return earlier in (EVERYTHING, part) or (not is_glob(earlier) and earlier in part)
    return Conditional(0.0, earlier).matches(part)


def probe(layer: int, part: str) -> str:
    """Return the name of a tensor of this layer that `part` takes."""
    return f"model.layers.{layer}.{'any' if part == EVERYTHING else _plain(part)}.weight"


def outside_probe(part: str) -> str:
    """Return the name of a tensor outside the layers that `part` takes."""
    return f"{_plain(part)}.weight"


def _plain(part: str) -> str:
    return part.replace("*", "any").replace("?", "x")
