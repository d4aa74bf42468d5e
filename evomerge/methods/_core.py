"""What a merge method is: a function of `Inputs` whose annotated keywords are its genes.

    @method("ties", source="Yadav et al. 2023, arXiv 2306.01708")
    def ties(x: Inputs, *, weight: Annotated[PerExpert, Range(0, 1.2)] = 1.0, ...) -> Tensor:

The keywords are at once the YAML keys (a trailing underscore is stripped: `lambda_` is "lambda"),
the default search ranges and the documentation. A method never writes to its inputs. It may
return one of its inputs itself, which says "a pure copy": `merge_tensor` then keeps every bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from torch import Tensor

from evomerge import registry
from evomerge.errors import ConfigError
from evomerge.methods._inputs import Inputs
from evomerge.methods._lines import LINES_PARAMETERS, depth_scale, lines, matched, scaled, take_lines
from evomerge.methods._ranges import EXTENSION, PER_EXPERT, Range

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
    optional_base: bool = False  # a base that a recipe names is handed over as such, but none is needed

    @property
    def takes_base(self) -> bool:
        """True when a recipe's base model reaches the method apart from the experts."""
        return self.needs_base or self.optional_base

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
        return self._merge(replace(x, parameters=self._resolved(keywords)), keywords)

    def _merge(self, x: Inputs, keywords: dict[str, Any]) -> Tensor:
        """Calls the function, with the depth line of LiNeS on its merged task vector if one is given.

        A merged task vector is linear in `lambda`, so methods that have one keep their single pass.
        """
        if not self.needs_base:
            return self.function(x, **keywords)
        for param in self.parameters:
            if param.name in LINES_PARAMETERS:
                keywords.setdefault(param.name, param.default)
        alpha, beta, match = take_lines(keywords)
        if match:
            alpha = matched(x, alpha, self._without_lines)
        scale = depth_scale(x, alpha, beta)
        if scale == 1.0 or self.parameter("lambda") is None:
            return scaled(x, self.function(replace(x, target=None) if scale != 1.0 else x, **keywords), scale)
        return self.function(x, **{**keywords, "lambda_": x.parameters["lambda"] * scale})

    def _without_lines(self, x: Inputs) -> Tensor:
        """Merges a tensor of the family with its own parameters and no depth line."""
        keywords = {_keyword(name): value for name, value in x.parameters.items()}
        take_lines(keywords)
        return self.function(replace(x, target=None), **keywords)

    def _resolved(self, keywords: Mapping[str, Any]) -> dict[str, Any]:
        """Returns every parameter's value by YAML key, defaults included."""
        given = {name.rstrip("_"): value for name, value in keywords.items()}
        return {param.name: given.get(param.name, param.default) for param in self.parameters}

    def check_count(self, n: int, subject: str) -> None:
        """Raises ConfigError unless the method can merge `n` models (the base not counted)."""
        low, high = self.n_experts
        if n < low or (high is not None and n > high):
            wanted = f"exactly {low}" if low == high else f"at least {low}"
            beside = " beside the base" if self.takes_base else ""
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
    optional_base: bool = False,
) -> Callable[[Callable[..., Tensor]], Method]:
    """Registers the decorated function as the merge method `name`.

    `n_experts` is (fewest, most or None), the base not counted when `needs_base` or `optional_base`: with the
    latter `x.base` is the recipe's base model, or None if it names none. The other flags say what is true of the
    method; `evomerge.testing.check_method` checks `random`, `symmetric` and `identity`.

    Raises:
        TypeError: when a keyword parameter has no usable annotation.
    """

    def decorate(function: Callable[..., Tensor]) -> Method:
        doc = inspect.getdoc(function) or ""
        own, shared = _read_parameters(function), _read_parameters(lines) if needs_base else ()
        named = {param.name for param in own}  # a method may declare the line itself, for other defaults
        made = Method(
            name=name,
            function=function,
            summary=doc.split("\n", 1)[0],
            source=source,
            parameters=own + tuple(param for param in shared if param.name not in named),
            needs_base=needs_base,
            n_experts=n_experts,
            mergekit=mergekit,
            random=random,
            symmetric=symmetric,
            identity=identity,
            optional_base=optional_base,
        )
        registry.register("methods", name, made, module=function.__module__)
        return made

    return decorate


def _keyword(name: str) -> str:
    return f"{name}_" if name == "lambda" else name


def _read_parameters(function: Callable[..., Any]) -> tuple[Param, ...]:
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
    elif hint is float or PER_EXPERT in extras:
        kind = "float"
    else:
        raise TypeError(f"parameter {entry.name!r} needs an annotation: float, bool, PerExpert ...")
    required = entry.default is entry.empty
    return Param(
        name=entry.name.rstrip("_"),
        kind=kind,
        default=None if required else entry.default,
        per_expert=PER_EXPERT in extras,
        low=span.low if span else None,
        high=span.high if span else None,
        limits=span.limits if span else None,
        log=bool(span and span.log),
        choices=choices,
        accepts_bool=bool(choices) and bool in get_args(hint),
        required=required,
        extension=EXTENSION in extras,
    )
