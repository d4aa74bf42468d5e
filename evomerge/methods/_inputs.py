"""What a merge method is given: the tensors of one name, and what it may know beside them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any, TypeVar

import torch
from torch import Tensor

from evomerge.errors import ConfigError, WeightsError
from evomerge.methods._tables import Tables

T = TypeVar("T")


@dataclass
class Target:
    """A live parameter that a method may write its rounded result to, instead of returning a new tensor.

    `finite` is what the writer found out about the values it wrote; None if nobody looked.
    """

    tensor: Tensor
    finite: bool | None = None


@dataclass(frozen=True, eq=False)
class Family:
    """All tensors of one merge. `sources` tells families apart; `recipe` tells their parameters apart too."""

    sources: Hashable
    recipe: Hashable
    inputs: Callable[[], Iterator[Inputs]]


@dataclass(frozen=True, eq=False)
class Inputs:
    """The tensors of one name that a method merges.

    `base` and the K `experts` have one shape and device, and the dtypes in which they are stored: return one of
    them itself for a pure copy, and compute on `wide_base`, `wide_experts` and `deltas`. `streams` numbers the
    experts' random masks, `seed` seeds them. `keep(i)` replaces the mask of expert i where it returns one (tests
    inject recorded masks with it).

    `layer` is the output layer (None outside the layers) of `n_layers`. `parameters` are the values that the
    method was called with. `every()` gives the Inputs of all tensors of this merge, for methods with global statistics;
    `table()` memoises what depends on the models alone. `target` is where a fused kernel may write.

    Raises:
        WeightsError: if the shapes differ.
    """

    name: str
    base: Tensor | None
    experts: tuple[Tensor, ...]
    streams: tuple[int, ...] = ()
    seed: int = 0
    compat: str = "paper"
    keep: Callable[[int], Tensor | None] | None = None
    layer: int | None = None
    n_layers: int = 1
    parameters: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[Hashable, ...] = ()  # (model, tensor name) of the base (None without one) and of each expert
    tables: Tables = field(default_factory=Tables)
    family: Family | None = None
    target: Target | None = None

    def __post_init__(self) -> None:
        if not self.streams:
            object.__setattr__(self, "streams", tuple(range(len(self.experts))))
        every = self.experts if self.base is None else (self.base, *self.experts)
        shapes = [tuple(tensor.shape) for tensor in every]
        if len(set(shapes)) > 1:
            raise WeightsError(
                f"tensor {self.name!r} has different shapes in the models: {shapes}",
                hint="merge models of one architecture and vocabulary",
            )

    @property
    def paper(self) -> bool:
        """True for our own arithmetic, False where mergekit's must be reproduced."""
        return self.compat != "mergekit"

    @property
    def reference(self) -> Tensor:
        """The base as it is stored, checked to be there."""
        if self.base is None:
            raise ConfigError(f"the merge of {self.name!r} needs a base model")
        return self.base

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of all arithmetic: at least float32, but the tensors' own under `compat: mergekit`."""
        every = self.experts if self.base is None else (self.base, *self.experts)
        start = torch.float32 if self.paper else every[0].dtype
        return reduce(torch.promote_types, (tensor.dtype for tensor in every), start)

    @cached_property
    def wide_base(self) -> Tensor:
        """The base in `dtype`; may be the base itself: never write to it."""
        return self.reference.to(self.dtype)

    @cached_property
    def wide_experts(self) -> tuple[Tensor, ...]:
        """The experts in `dtype`; may be the experts themselves: never write to them."""
        return tuple(expert.to(self.dtype) for expert in self.experts)

    @cached_property
    def deltas(self) -> tuple[Tensor, ...]:
        """The task vectors (K tensors) in `dtype`, computed once and shared: never write to them."""
        return tuple(self._difference(i) for i in range(len(self.experts)))

    def delta(self, i: int) -> Tensor:
        """Returns the task vector of expert i as a temporary that the caller may overwrite."""
        return self.deltas[i].clone() if "deltas" in self.__dict__ else self._difference(i)

    def _difference(self, i: int) -> Tensor:
        return self.experts[i].to(self.dtype) - self.wide_base

    def each(self, value: float | Sequence[float]) -> tuple[float, ...]:
        """Returns one float per expert from a scalar or a sequence of K."""
        if isinstance(value, Sequence):
            return tuple(value)
        return (value,) * len(self.experts)

    def model(self, i: int) -> Hashable:
        """Returns the model that expert i is a tensor of, as the recipe names it; its place where nobody said."""
        source = self.sources[1 + i] if self.sources else i
        return source[0] if isinstance(source, tuple) else source

    def every_with(self, i: int) -> Iterator[tuple[Inputs, int]]:
        """Yields all tensors of this merge that the model of expert i takes part in, with its place there.

        Slices of a recipe may list models in different orders, or leave some out.
        """
        for other in self.every():
            places = [j for j in range(len(other.experts)) if other.model(j) == self.model(i)]
            if places:
                yield other, places[0]

    def every(self) -> Iterator[Inputs]:
        """Yields the Inputs of all tensors that this merge computes, this one included, in the recipe's order.

        Each has its own `parameters`. A method called on one tensor alone sees a family of one.
        """
        yield from self.family.inputs() if self.family is not None else (self,)

    def table(
        self, kind: Hashable, make: Callable[[], T], experts: Sequence[int] | None = None, *, keep: bool = True
    ) -> T:
        """Returns what `make` computes from this tensor of the models alone, once per worker.

        `kind` names the computation and every setting it depends on, except the models themselves. `experts`
        lists the experts that it depends on besides the base (None: all, in their order). `keep` as in `Tables.get`.
        """
        if not self.sources:
            return make()
        chosen = self.sources[1:] if experts is None else tuple(self.sources[1 + i] for i in experts)
        return self.tables.get((*self._arithmetic(kind), self.sources[0], chosen), make, keep=keep)

    def table_if_room(self, kind: Hashable, size: int, make: Callable[[], T]) -> T | None:
        """Like `table` for a value of `size` bytes that only saves time: None where the budget has no room for it."""
        if not self.sources:
            return None
        return self.tables.get_if_room((*self._arithmetic(kind), self.sources), size, make)

    def family_table(self, kind: Hashable, make: Callable[[], T], *, parameters: bool = False) -> T:
        """Like `table`, for what is computed from all tensors of `every()`: one value for the whole merge.

        With `parameters` the value may depend on every parameter of the recipe too (then only tensors of one
        candidate share it).
        """
        if self.family is None:
            return make()
        recipe = self.family.recipe if parameters else None
        models = tuple(self.model(i) for i in range(len(self.experts)))
        return self.tables.get((*self._arithmetic(kind), self.family.sources, models, recipe), make)

    def _arithmetic(self, kind: Hashable) -> tuple[Hashable, ...]:
        """What every key begins with: the same models give other values in another arithmetic."""
        return kind, self.compat, self.dtype
