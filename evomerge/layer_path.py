"""Live paths: a recipe that stacks, skips or repeats layers, in a live model that keeps its memory.

A path gives for each position of a stack the number of the layer that stands there: (0, 1, 2, 1, 2, 3) repeats two.
Each position has a layer module of its own, made as transformers makes the module of that position, so that its
`layer_idx`, its place in the cache of keys and values, and whatever else depends on the position are those of the
exported model. What the modules hold is shared: positions with the same tensor hold the same one.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from evomerge.errors import CandidateFailure
from evomerge.recipe import Recipe, TensorPlan, layer_index, with_layer

if TYPE_CHECKING:
    from evomerge.model import LiveModel

LONGEST = 3  # a stack has at most this many times the layers of the base
PER_LAYER_KEYS = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type")
POSITION_FREE = ("passthrough",)  # methods whose result does not depend on where in the model a tensor stands


def refused(message: str, hint: str = "") -> CandidateFailure:
    """The failure of a candidate whose layers cannot be stacked."""
    return CandidateFailure(message, hint=hint, reason="layers")


def check_length(recipe: Recipe, n_layers: int) -> None:
    """Refuse a recipe without layers, or with more than `LONGEST` times the base's.

    Raises:
        CandidateFailure: it has too few or too many.
    """
    length = sum(piece.length(n_layers) for piece in recipe.slices)
    if length < 1:
        raise refused("the path of the recipe is empty", "a model needs at least one layer")
    if length > LONGEST * n_layers:
        raise refused(
            f"the path of the recipe has {length} layers, and the base {n_layers}",
            f"at most {LONGEST} times as many ({LONGEST * n_layers}) can be",
        )


def source_layers(plans: Sequence[TensorPlan]) -> tuple[int, ...]:
    """For each output layer, the layer that its first tensor takes from the base, or else from the first source."""
    found: dict[int, int] = {}
    for plan in plans:
        layer = layer_index(plan.name)
        source = layer_index((plan.base or plan.inputs[0])[1])
        if layer is not None and source is not None:
            found.setdefault(layer, source)
    return tuple(found[i] for i in sorted(found))


def stacked(config: Any, plans: Sequence[TensorPlan], n_layers: int) -> dict[str, Any]:
    """What changes in a configuration when its layers are those of the plans; {} if they are in their own order.

    Args:
        config: as transformers understands it, so that lists which config.json leaves out are there.
        n_layers: how many layers it has.

    Returns:
        `num_hidden_layers`, and every list with one entry for each layer.

    Raises:
        CandidateFailure: layers of different types meet at one position.
    """
    path = source_layers(plans)
    lists = per_layer_lists(config, n_layers)
    for plan in plans if lists else ():
        layers = [layer_index(name) for _, name in (*((plan.base,) if plan.base else ()), *plan.inputs)]
        for key, values in lists.items():
            types = dict.fromkeys(values[i] for i in layers if i is not None and i < n_layers)
            if len(types) > 1:
                raise refused(
                    f"{plan.name} merges the layers {', '.join(map(str, layers))}, which are of different types "
                    f"({key}: {', '.join(map(str, types))})",
                    "merge layers of one type, or take the position from one layer",
                )
    return {} if path == tuple(range(n_layers)) else along(lists, path)


def per_layer_lists(config: Any, n_layers: int) -> dict[str, list[Any]]:
    """The lists of a configuration that have one entry for each layer, by key."""
    found = {key: getattr(config, key, None) for key in PER_LAYER_KEYS}
    return {key: list(v) for key, v in found.items() if isinstance(v, (list, tuple)) and len(v) == n_layers}


def along(lists: Mapping[str, Sequence[Any]], path: Sequence[int]) -> dict[str, Any]:
    """`num_hidden_layers` and the per-layer lists of a path."""
    return {"num_hidden_layers": len(path), **{key: [values[i] for i in path] for key, values in lists.items()}}


@dataclass(eq=False)
class Slot:
    """A live tensor, and what was last written into it: None is something that no path asks for."""

    tensor: Tensor
    holds: Hashable = None


Write = tuple[TensorPlan, Slot, Hashable]


class LayerStack:
    """The layers of a live model, in their own order or along a path.

    Args:
        model: a transformers model whose layers are one list of modules.
        tensors: its parameters by the names of the checkpoint.
        n_layers: how many layers the checkpoint has.
    """

    def __init__(self, model: Any, tensors: Mapping[str, Tensor], n_layers: int) -> None:
        self.n_layers = n_layers
        self._model = model
        self._own = {name: Slot(tensor) for name, tensor in tensors.items()}
        self._slots: dict[str, list[Slot]] = {}  # by the tensor's name in layer 0: all that may hold it
        for name, slot in self._own.items():
            self._slots.setdefault(with_layer(name, 0), []).append(slot)
        self._head = ""
        self._layers = nn.ModuleList()
        self.problem = self._locate()
        self._originals = tuple(self._layers)
        self._lists = per_layer_lists(model.config, n_layers)
        self._made: dict[tuple[int, tuple[Any, ...]], nn.Module] = {}  # by position and type
        self._mounted = False

    def _locate(self) -> str:
        """Find the list of layers; returns why it cannot be changed, or ""."""
        numbered = [(name, index) for name in self._own if (index := layer_index(name)) is not None]
        heads = {name.partition(f".{index}.")[0] for name, index in numbered}
        if len(heads) != 1:
            return f"its layers are in {len(heads)} lists ({', '.join(sorted(heads)[:3])})"
        (self._head,) = heads
        layers = self._model.get_submodule(self._head)
        config = self._model.config
        if not isinstance(layers, nn.ModuleList) or len(layers) != self.n_layers:
            return f"{self._head} is not a list of {self.n_layers} modules"
        if config.get_text_config(decoder=True) is not config or getattr(config, "num_hidden_layers", 0) != len(layers):
            return f"its configuration does not say itself that it has {len(layers)} layers"
        self._layers = layers
        return ""

    def place(self, recipe: Recipe, plans: Sequence[TensorPlan]) -> list[Write]:
        """Arrange the layers as the plans do; returns what is to be written where, and what the slot then holds.

        A recipe whose layers are in their own order has the model as it was loaded, and all of it is written. A
        path writes only what no live tensor holds already; it allocates where it has more different tensors than
        there are live ones, and what is allocated serves later paths.

        Raises:
            CandidateFailure: the model's layers cannot stand in this order.
        """
        self.restore()
        if not stacked(self._model.config, plans, self.n_layers):
            return [(plan, self._own[plan.name], None) for plan in plans]
        self.require()
        wanted: dict[str, dict[Hashable, TensorPlan]] = {}
        for plan in plans:
            wanted.setdefault(with_layer(plan.name, 0), {}).setdefault(content(recipe, plan), plan)
        slots = {pattern: self._assign(pattern, contents) for pattern, contents in wanted.items()}
        tensors = {p.name: slots[with_layer(p.name, 0)][content(recipe, p)].tensor for p in plans}
        self._mount(source_layers(plans), tensors)
        return [
            (plan, slots[pattern][held], held)
            for pattern, contents in wanted.items()
            for held, plan in contents.items()
            if slots[pattern][held].holds != held
        ]

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The layer modules that stand in the model now, in order."""
        return tuple(self._layers)

    def types(self) -> list[tuple[str, ...]]:
        """For each of these modules, its entries in the configuration's per-layer lists."""
        lists = [getattr(self._model.config, key) for key in self._lists]
        return [tuple(str(values[position]) for values in lists) for position in range(len(self._layers))]

    def require(self) -> None:
        """Raise CandidateFailure where this model's layers cannot be stacked."""
        if self.problem:
            raise refused(
                f"the layers of this {type(self._model).__name__} cannot be stacked: {self.problem}",
                "`evomerge merge` writes such a recipe without scoring it",
            )

    def repeat(self, path: Sequence[int]) -> None:
        """Mount the layers with the weights that they hold now along a path.

        Raises:
            CandidateFailure: the model's layers cannot stand in this order.
        """
        names = {i: [name for name in self._own if layer_index(name) == i] for i in set(path)}
        own = {with_layer(name, p): self._own[name].tensor for p, i in enumerate(path) for name in names[i]}
        self._mount(path, own)

    def restore(self) -> None:
        """Put the layers back as they were loaded; their weights are left as they are."""
        if self._mounted:
            self._configure(range(self.n_layers))
            self._replace(self._originals)
            self._mounted = False

    def forget(self) -> None:
        """The live tensors have been written by others."""
        for slot in self._own.values():
            slot.holds = None

    def _assign(self, pattern: str, contents: Mapping[Hashable, TensorPlan]) -> dict[Hashable, Slot]:
        """A slot for each content: the one that holds it, else one whose content is not asked for, else a new one."""
        slots = self._slots[pattern]
        found = {slot.holds: slot for slot in slots if slot.holds in contents}
        free = [slot for slot in slots if slot.holds not in contents]
        for held in contents:
            if held in found:
                continue
            if not free:
                first = slots[0].tensor
                free.append(Slot(torch.empty_like(first)))
                if isinstance(first, nn.Parameter):
                    free[0].tensor = nn.Parameter(free[0].tensor, requires_grad=False)
                slots.append(free[0])
            found[held] = free.pop(0)
        return found

    def _mount(self, path: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        self._configure(path)
        self._mounted = True
        try:
            modules = self._modules(path)
            given: dict[int | None, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                given.setdefault(layer_index(name), {})[name] = tensor
            for position, module in enumerate(modules):
                self._fill(module, position, path[position], given[position])
        except CandidateFailure:
            self.restore()
            raise
        except Exception as error:  # whatever a model's own code raises when it is made with other layers
            self.restore()
            name = type(self._model).__name__
            raise refused(f"{name} cannot be made with the layers {list(path)}: {_line(error)}") from error
        self._replace(modules)

    def _configure(self, path: Sequence[int]) -> None:
        for key, value in along(self._lists, path).items():
            setattr(self._model.config, key, value)

    def _replace(self, modules: Sequence[nn.Module]) -> None:
        del self._layers[:]
        self._layers.extend(modules)

    def _modules(self, path: Sequence[int]) -> list[nn.Module]:
        """One layer module for each position, as the model's own constructor makes them for this configuration."""
        keys = [(p, tuple(str(values[i]) for values in self._lists.values())) for p, i in enumerate(path)]
        if any(key not in self._made for key in keys):
            with torch.device("meta"):
                fresh = type(self._model)(self._model.config).eval()
            for key, module in zip(keys, fresh.get_submodule(self._head), strict=True):
                self._made.setdefault(key, module)
        return [self._made[key] for key in keys]

    def _fill(self, module: nn.Module, position: int, source: int, tensors: Mapping[str, Tensor]) -> None:
        """Give a position's module its tensors, and what a checkpoint does not hold from the source's module."""
        parts = dict(self._originals[source].named_modules())
        prefix = f"{self._head}.{position}."
        missing = set(tensors)
        for name, part in module.named_modules():
            own = parts.get(name)
            held = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
            for leaf, tensor in held:
                full = f"{prefix}{name}.{leaf}" if name else prefix + leaf
                given = tensors.get(full, getattr(own, leaf, None))
                if given is None or given.shape != tensor.shape:
                    sizes = f"{full} is {_size(given)}, not {_size(tensor)}"
                    raise refused(f"layer {source} does not fit position {position}: {sizes}")
                missing.discard(full)
                setattr(part, leaf, given)
            if own is not None:  # those by which transformers returns hidden states and attentions
                part._forward_hooks = own._forward_hooks.copy()
        if missing:
            raise refused(f"layer {source} does not fit position {position}, which has no {sorted(missing)[0]}")


def content(recipe: Recipe, plan: TensorPlan) -> Hashable:
    """What names the values of a merged tensor: equal contents, equal bits."""
    if plan.method in POSITION_FREE:
        return (plan.method, recipe.compat, recipe.dtype, plan.base, plan.inputs, repr((plan.shared, plan.per_input)))
    return (recipe.fingerprint, plan.name)


def _size(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else "x".join(map(str, tensor.shape)) or "a scalar"


def stacking_problem(live: LiveModel) -> str:
    """Why paths cannot be scored with this architecture, or "".

    Its own layers in their own order must give the same bits with new modules, and all of them twice the same logits
    with and without a cache.
    """
    vocabulary = int(live.model.get_input_embeddings().weight.shape[0])
    ids = torch.tensor([[3 % vocabulary, 8 % vocabulary, 5 % vocabulary, 2 % vocabulary, 7 % vocabulary]])
    ids, n_layers = ids.to(live.device), live.checkpoint.n_layers
    last, every = ids.shape[1] - 1, torch.arange(ids.shape[1], device=live.device)

    def logits() -> Tensor:
        return live.logits_at(every, ids)[0]

    try:
        live.model(input_ids=ids, output_hidden_states=True)  # installs what the modules of a path take over
        plain = logits()
        live.layers.repeat(range(n_layers))
        same = bool(torch.equal(plain, logits()))
        live.layers.repeat([*range(n_layers), *range(n_layers)])
        twice = logits()
        _, cache = live.logits_at(every[:last], ids[:, :last], keep_cache=True)
        cached, _ = live.logits_at(every[:1], ids[:, last:], cache=cache)
    except CandidateFailure as error:
        return error.message
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # recurrent models have another cache, or none
        return _line(error)
    finally:
        live.layers.restore()
    if not same:
        return "with new modules its own layers give other logits"
    apart = float((cached[0].double() - twice[last].double()).abs().max())
    if apart > 0.05 * float((twice[last].double() - twice[0].double()).abs().max()):
        return "with each layer twice the logits with a cache are not those without"
    return ""


def _line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
