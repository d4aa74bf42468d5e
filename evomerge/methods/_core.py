"""What a merge method is: a function of `Inputs` whose annotated keywords are its genes.

    @method("ties", source="Yadav et al. 2023, arXiv 2306.01708")
    def ties(x: Inputs, *, weight: Annotated[PerExpert, Range(0, 1.5)] = 1.0, ...) -> Tensor:

The keywords are at once the YAML keys (a trailing underscore is stripped: `lambda_` is "lambda"),
the default search ranges and the documentation. A method never writes to its inputs. It may
return one of its inputs itself, which says "a pure copy": `merge_tensor` then keeps every bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from torch import Tensor

from evomerge import registry
from evomerge.errors import ConfigError, WeightsError


@dataclass(frozen=True)
class Range:
    """What a search uses for a parameter unless told otherwise, and what it may be at all (`limits`)."""

    low: float
    high: float
    log: bool = False
    limits: tuple[float, float] | None = None


class _Marker:
    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


_PER_EXPERT = _Marker("per expert")
PerExpert = Annotated[float | Sequence[float], _PER_EXPERT]
"""One value per expert; inside a method read it with `x.each(value)`."""

EXTENSION = _Marker("extension")
"""Annotates a parameter that mergekit does not have."""

Kind = Literal["float", "int", "bool", "choice"]


@dataclass(frozen=True)
class Param:
    """One parameter of a method. `low` and `high` are the default search range, if it has one."""

    name: str
    kind: Kind
    default: Any = None
    per_expert: bool = False
    low: float | None = None
    high: float | None = None
    log: bool = False
    limits: tuple[float, float] | None = None
    choices: tuple[str, ...] = ()
    accepts_bool: bool = False  # a choice that may be given as true/false too
    required: bool = False
    extension: bool = False


@dataclass(frozen=True, eq=False)
class Inputs:
    """The tensors of one name that a method merges.

    `base` and the K `experts` have one shape, dtype and device. `streams` numbers the experts'
    random masks, `seed` seeds them. `keep(i)` replaces the mask of expert i where it returns one
    (tests inject recorded masks with it).

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
        """The base, checked to be there."""
        if self.base is None:
            raise ConfigError(f"the merge of {self.name!r} needs a base model")
        return self.base

    @cached_property
    def deltas(self) -> tuple[Tensor, ...]:
        """The task vectors (K tensors), computed once and shared: never write to them."""
        return tuple(expert - self.reference for expert in self.experts)

    def delta(self, i: int) -> Tensor:
        """Returns the task vector of expert i as a temporary that the caller may overwrite."""
        if "deltas" in self.__dict__:
            return self.deltas[i].clone()
        return self.experts[i] - self.reference

    def each(self, value: float | Sequence[float]) -> tuple[float, ...]:
        """Returns one float per expert from a scalar or a sequence of K."""
        if isinstance(value, Sequence):
            return tuple(value)
        return (value,) * len(self.experts)


F = TypeVar("F", bound=Callable[..., Tensor])


@dataclass(frozen=True, eq=False)
class Method:
    """A registered merge method; call it with Inputs and its parameters by YAML key."""

    name: str
    function: Callable[..., Tensor]
    summary: str
    source: str
    parameters: tuple[Param, ...]
    needs_base: bool
    n_experts: tuple[int, int | None]
    mergekit: bool  # mergekit has a method of this name
    random: bool  # its result depends on the seed
    symmetric: bool  # the order of the experts does not count (up to rounding)
    identity: bool  # one expert at the defaults (required ones at their top) gives that expert

    def parameter(self, name: str) -> Param | None:
        """Returns the parameter with the YAML key `name`, or None."""
        return next((param for param in self.parameters if param.name == name), None)

    def __call__(self, x: Inputs, **parameters: Any) -> Tensor:
        """Merges; scalars given for per-expert parameters hold for every expert.

        Raises:
            ConfigError: for an unknown or missing parameter, or a wrong number of experts.
        """
        self.check_count(len(x.experts), x.name)
        if self.needs_base and x.base is None:
            raise ConfigError(f"method {self.name} needs a base model", hint="set base_model")
        given = {name.rstrip("_"): value for name, value in parameters.items()}
        keywords = {}
        for param in self.parameters:
            if param.name in given:
                keywords[_keyword(param.name)] = self._checked(x, param, given.pop(param.name))
            elif param.required:
                raise ConfigError(f"method {self.name} needs the parameter {param.name!r}")
        if given:
            known = ", ".join(param.name for param in self.parameters)
            raise ConfigError(
                f"method {self.name} has no parameter {', '.join(sorted(given))}",
                hint=f"it has {known}",
            )
        return self.function(x, **keywords)

    def check_count(self, n: int, subject: str) -> None:
        """Raises ConfigError unless the method can merge `n` models (the base not counted)."""
        low, high = self.n_experts
        if n < low or (high is not None and n > high):
            wanted = f"exactly {low}" if low == high else f"at least {low}"
            beside = " beside the base" if self.needs_base else ""
            raise ConfigError(f"method {self.name} merges {wanted}{beside}, not {n} ({subject})")

    def _checked(self, x: Inputs, param: Param, value: Any) -> Any:
        if not param.per_expert:
            return value
        values = x.each(value)
        if len(values) != len(x.experts):
            raise ConfigError(f"{param.name}: {len(values)} values for {len(x.experts)} experts of {x.name!r}")
        return values


def method(
    name: str,
    *,
    source: str,
    needs_base: bool = True,
    n_experts: tuple[int, int | None] = (1, None),
    mergekit: bool = False,
    random: bool = False,
    symmetric: bool = True,
    identity: bool = True,
) -> Callable[[Callable[..., Tensor]], Method]:
    """Registers the decorated function as the merge method `name`.

    `n_experts` is (fewest, most or None), the base not counted when `needs_base`. The last four
    say what is true of the method; `evomerge.testing.check_method` checks `random`, `symmetric`
    and `identity`.

    Raises:
        TypeError: when a keyword parameter has no usable annotation.
    """

    def decorate(function: Callable[..., Tensor]) -> Method:
        doc = inspect.getdoc(function) or ""
        made = Method(
            name=name,
            function=function,
            summary=doc.split("\n", 1)[0],
            source=source,
            parameters=_read_parameters(function),
            needs_base=needs_base,
            n_experts=n_experts,
            mergekit=mergekit,
            random=random,
            symmetric=symmetric,
            identity=identity,
        )
        registry.register("methods", name, made, module=function.__module__)
        return made

    return decorate


def _keyword(name: str) -> str:
    return f"{name}_" if name == "lambda" else name


def _read_parameters(function: Callable[..., Tensor]) -> tuple[Param, ...]:
    hints = get_type_hints(function, include_extras=True)
    signature = inspect.signature(function).parameters.values()
    keywords = [entry for entry in signature if entry.kind is entry.KEYWORD_ONLY]
    return tuple(_read_parameter(entry, hints.get(entry.name)) for entry in keywords)


def _read_parameter(entry: inspect.Parameter, hint: Any) -> Param:
    extras: tuple[Any, ...] = ()
    if get_origin(hint) is Annotated:
        hint, *rest = get_args(hint)
        extras = tuple(rest)
    span = next((extra for extra in extras if isinstance(extra, Range)), None)
    literals = [arg for arg in (hint, *get_args(hint)) if get_origin(arg) is Literal]
    choices = tuple(str(choice) for literal in literals for choice in get_args(literal))
    kind: Kind
    if choices:
        kind = "choice"
    elif hint is bool:
        kind = "bool"
    elif hint is int:
        kind = "int"
    elif hint is float or _PER_EXPERT in extras:
        kind = "float"
    else:
        raise TypeError(f"parameter {entry.name!r} needs an annotation: float, bool, PerExpert ...")
    required = entry.default is entry.empty
    return Param(
        name=entry.name.rstrip("_"),
        kind=kind,
        default=None if required else entry.default,
        per_expert=_PER_EXPERT in extras,
        low=span.low if span else None,
        high=span.high if span else None,
        limits=span.limits if span else None,
        log=bool(span and span.log),
        choices=choices,
        accepts_bool=bool(choices) and bool in get_args(hint),
        required=required,
        extension=EXTENSION in extras,
    )
