"""Reading a layer-order space from plain data: every problem is collected before it raises.

    description: text
    path: choices                # or edits, or indicators
    sources: [math, cipher]      # default: all experts in order, then merged if there is one; base may be named
    backbone: search             # or a source; default: merged if it is a source, else the only source, else search
    frozen: 0.1                  # share of the layers at each end, at least one; or [first, last] numbers
    longest: 1.5                 # times the base's layers, 1 to 3
    scales: [0.5, 2]             # or off
    match: true
    passes: 1                    # choices
    edits: 8                     # edits, as are kinds and block
    kinds: [repeat, skip, splice, swap, share]
    block: 4                     # or all
    repeats: 3                   # indicators
    matrix: true

The whole grammar, with examples: docs/spaces.md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from evomerge._path_choices import OWN, SKIP, Choices
from evomerge._path_edits import KINDS, REPEAT, SHARE, SPLICE, SWAP, Edits
from evomerge._path_indicators import MOST_GENES, Indicators
from evomerge._path_steps import Encoding, Ground
from evomerge._space_methods import suggestion
from evomerge._space_parts import WORD
from evomerge.errors import ConfigError, Problem
from evomerge.path_space import PathSpace
from evomerge.scale_folding import foldable

COMMON = ("description", "path", "sources", "backbone", "frozen", "longest", "scales", "match")
OWN_KEYS = {"choices": ("passes",), "edits": ("edits", "kinds", "block"), "indicators": ("repeats", "matrix")}
OF_COEFFICIENTS = ("method", "layer_groups", "components", "genes", "fixed", "compat")
BASE, MERGED, SEARCH = "base", "merged", "search"
RESERVED = (BASE, MERGED, SEARCH, OWN, SKIP)  # what a key or a gene may say in the place of an expert
FROZEN, LONGEST, SCALES, OFF = 0.1, 1.5, (0.5, 2.0), "off"
STACKED = 3.0  # a live model has at most this many times the layers of the base
MOST_EDITS, MOST_REPEATS = 8, 8
DEFAULT_KINDS = KINDS[:4]  # without share


def read_path_space(
    spec: Mapping[str, Any],
    base: str,
    experts: Mapping[str, str],
    n_layers: int,
    model_type: str,
    merged: str | None,
    seed: int,
) -> PathSpace:
    """Return the checked space.

    Raises:
        ConfigError: with every problem found.
    """
    reader = _Reader(base, dict(experts), merged, n_layers, model_type)
    space = reader.read(spec, seed)
    if space is None or reader.problems:
        raise ConfigError.of(reader.problems, "the search space")
    return space


class _Reader:
    def __init__(
        self, base: str, experts: Mapping[str, str], merged: str | None, n_layers: int, model_type: str
    ) -> None:
        self.base = base
        self.experts = experts
        self.pool = {**experts, **({MERGED: merged} if merged is not None else {})}
        self.known = {BASE: base, **self.pool}
        self.n_layers = n_layers
        self.model_type = model_type
        self.problems: list[Problem] = []
        self.top: dict[str, Any] = {}

    def bad(self, where: str, message: str, hint: str = "") -> None:
        self.problems.append(Problem(message, where, hint))

    def read(self, spec: Any, seed: int) -> PathSpace | None:
        if not isinstance(spec, Mapping):
            self.bad("", f"expected a mapping, found {spec!r}")
            return None
        kind = self._keys(spec)
        self._check_experts()
        sources = self._sources()
        backbones = self._backbones(sources)
        head, tail = self._frozen()
        scales, match = self._scales(), self._switch("match", True)
        if scales is None and self.top.get("match") is True:
            self.bad("match", "no scales are searched that could be matched", "leave `match` out")
        ground = Ground(sources, backbones, self.n_layers, head, tail, self._longest(), scales)
        encoding = self._encoding(kind, ground)
        if self.problems or encoding is None:
            return None
        names = {gene.name for gene in encoding.genes}
        if len(names) < len(encoding.genes):
            hint = "give the experts names without dots"
            self.bad("sources", f"two genes of {', '.join(sources)} would have one name", hint)
        return PathSpace(
            base=self.base,
            experts=tuple(self.experts.items()),
            sources=tuple((name, self.known[name]) for name in sources),
            ground=ground,
            encoding=encoding,
            match=match,
            model_type=self.model_type,
            seed=seed,
            description=str(self.top.get("description", "")),
        )

    # ---------------------------------------------------------------- keys

    def _keys(self, spec: Mapping[Any, Any]) -> str:
        """Keep the known entries that are not null, complain about the rest; return the encoding's name, or ""."""
        kind = spec.get("path")
        if not isinstance(kind, str) or kind not in OWN_KEYS:
            hint = suggestion(str(kind), tuple(OWN_KEYS))
            self.bad("path", f"there is no encoding of paths {kind!r}", hint)
            kind = ""
        known = (*COMMON, *(OWN_KEYS[kind] if kind else (key for keys in OWN_KEYS.values() for key in keys)))
        for key in spec:
            owner = next((name for name, keys in OWN_KEYS.items() if key in keys), None)
            if key not in known and owner is not None:
                self.bad(key, f"`{key}` is for `path: {owner}`, and this is `path: {kind}`", "leave it out")
            elif key in OF_COEFFICIENTS:
                self.bad(key, f"`{key}` is for spaces of coefficients, and this is one of layer orders", "leave it out")
            elif key not in known:
                self.bad(str(key), f"unknown key {key!r}", suggestion(str(key), known))
        self.top = {key: spec[key] for key in known if spec.get(key) is not None}
        return kind

    def _switch(self, key: str, default: bool) -> bool:
        given = self.top.get(key, default)
        if not isinstance(given, bool):
            self.bad(key, f"{given!r} is not true or false")
            return default
        return given

    def _whole(self, key: str, default: int, most: int, what: str) -> int:
        given = self.top.get(key, default)
        if type(given) is not int or not 1 <= given <= most:
            self.bad(key, f"{given!r} is not a number of {what}", f"a whole number from 1 to {most}")
            return default
        return int(given)

    # ---------------------------------------------------------------- models

    def _check_experts(self) -> None:
        for name, path in self.experts.items():
            if not WORD.fullmatch(name):
                self.bad(f"experts.{name}", "an expert's name is letters, digits, dots, - and _")
            elif name in RESERVED:
                self.bad(f"experts.{name}", f"`{name}` means something else in a space of layer orders", "rename it")
            if path == self.base or list(self.experts.values()).count(path) > 1:
                self.bad(f"experts.{name}", f"{path!r} is the base or another expert too")
        if not self.experts:
            self.bad("experts", "a search needs an expert")
        merged = self.pool.get(MERGED)
        if merged is not None and MERGED not in self.experts and merged in (self.base, *self.experts.values()):
            self.bad(MERGED, f"{merged!r} is the base or an expert too", "the checkpoint of a merge of the experts")

    def _sources(self) -> tuple[str, ...]:
        given = self.top.get("sources", list(self.pool))
        if not isinstance(given, list) or not given:
            self.bad("sources", f"{given!r} is not a list of models", f"such as [{', '.join(self.known)}]")
            return tuple(self.pool)
        for i, name in enumerate(given):
            if name == MERGED and MERGED not in self.pool:
                hint = "set `merged:` in the study file to the folder of an exported merge"
                self.bad("sources", "the study has no model `merged`", hint)
            elif not isinstance(name, str) or name not in self.known:
                self.bad("sources", f"there is no model {name!r}", suggestion(str(name), tuple(self.known)))
            elif name in given[:i]:
                self.bad("sources", f"{name!r} is listed twice")
        return tuple(dict.fromkeys(name for name in given if isinstance(name, str) and name in self.known))

    def _backbones(self, sources: tuple[str, ...]) -> tuple[str, ...]:
        given = self.top.get("backbone", MERGED if MERGED in sources else SEARCH)
        if given == SEARCH:
            return sources
        if not isinstance(given, str) or given not in sources:
            listed = isinstance(given, str) and given in self.known
            hint = "add it to `sources:`" if listed else suggestion(str(given), (*sources, SEARCH))
            self.bad("backbone", f"{given!r} is not one of the sources", hint)
            return sources
        return (given,)

    # ---------------------------------------------------------------- the form of paths

    def _frozen(self) -> tuple[int, int]:
        """Return how many layers are frozen at the start and at the end."""
        given, n = self.top.get("frozen", FROZEN), self.n_layers
        if isinstance(given, list):
            if len(given) != 2 or any(type(size) is not int or size < 0 for size in given):
                self.bad(
                    "frozen", f"{given!r} does not say how many layers are frozen", "[first, last], such as [2, 2]"
                )
                return 1, 1
            if sum(given) == 0:
                self.bad("frozen", "no layer is frozen, so that a path could be empty", "at least [1, 0]")
            head, tail = given
        elif _number(given) and 0 <= given < 0.5:
            head = tail = max(1, math.floor(given * n + 0.5))
        else:
            hint = "a share of the layers from 0 to 0.5, or [first, last]"
            self.bad("frozen", f"{given!r} does not say how much is frozen at each end", hint)
            return 1, 1
        if head + tail >= n:
            what = f"{head} + {tail} frozen layers leave none of {n} to be searched"
            self.bad("frozen", what, "freeze fewer, such as [1, 0]" if n > 1 else "")
        return head, tail

    def _longest(self) -> int:
        """Return how many layers a path has at most."""
        given = self.top.get("longest", LONGEST)
        if not _number(given) or not 1 <= given <= STACKED:
            hint = f"1 to {STACKED:g}, times the {self.n_layers} layers of the base"
            self.bad("longest", f"{given!r} is not how long a path may be", hint)
            return self.n_layers
        most: int = math.ceil(given * self.n_layers - 1e-9)  # 1.1 * 10 is 11
        return most

    def _scales(self) -> tuple[float, float] | None:
        folds = foldable(self.model_type)
        given = self.top.get("scales", list(SCALES) if folds else OFF)
        if given is False or given == OFF:
            return None
        if not isinstance(given, list) or len(given) != 2 or not all(map(_number, given)):
            self.bad("scales", f"{given!r} is not a range of scales", f"[low, high], such as {list(SCALES)}, or off")
            return None
        low, high = map(float, given)
        if not folds:
            what = f"scales between the layers of a {self.model_type} model cannot be folded into its weights"
            self.bad("scales", what, "scales: off")
        if low <= 0:
            self.bad("scales", f"a scale cannot be {low:g}", "positive numbers: 0 would erase the hidden state")
        if low >= high:
            hint = "`scales: off` leaves the hidden state as it is" if low == high else ""
            self.bad("scales", f"low {low:g} is not below high {high:g}", hint)
        return low, high

    # ---------------------------------------------------------------- encodings

    def _encoding(self, kind: str, ground: Ground) -> Encoding | None:
        if kind == "choices":
            return Choices(ground, self._whole("passes", 1, 2, "passes"))
        if kind == "edits":
            return self._edits(ground)
        if kind == "indicators":
            return self._indicators(ground)
        return None

    def _edits(self, ground: Ground) -> Edits:
        free = max(1, len(ground.free))
        slots = self._whole("edits", MOST_EDITS if "edits" in self.top else min(MOST_EDITS, free), MOST_EDITS, "edits")
        kinds = self._kinds(ground, free)
        block = free if self.top.get("block") == "all" else self.top.get("block", max(1, free // 2))
        if type(block) is not int or not 1 <= block <= free:
            hint = f"a whole number from 1 to the {free} layers that are not frozen, or all"
            self.bad("block", f"{block!r} is not the length of a block", hint)
            block = 1
        return Edits(ground, slots, kinds, block)

    def _kinds(self, ground: Ground, free: int) -> tuple[str, ...]:
        """Return the kinds of edits, by default those that this ground has room for."""
        useless = {}
        if len(ground.sources) < 2:
            useless[SPLICE] = "there is only one source to take layers from"
        if free < 2:
            useless |= dict.fromkeys((SWAP, SHARE), "it takes two layers that are not frozen")
        given = self.top.get("kinds", [kind for kind in DEFAULT_KINDS if kind not in useless])
        if given == []:
            self.bad("kinds", "is empty: nothing could be edited", f"any of {', '.join(KINDS)}")
            return DEFAULT_KINDS
        if not isinstance(given, list):
            self.bad("kinds", f"{given!r} is not a list of kinds of edits", f"any of {', '.join(KINDS)}")
            return DEFAULT_KINDS
        for i, kind in enumerate(given):
            if kind in given[:i]:
                self.bad("kinds", f"{kind!r} is listed twice")
            elif not isinstance(kind, str) or kind not in KINDS:
                self.bad("kinds", f"there is no kind of edit {kind!r}", suggestion(str(kind), KINDS))
            elif kind in useless:
                self.bad("kinds", f"{kind} is not possible: {useless[kind]}", "leave it out")
        if set(map(str, given)) == {REPEAT} and ground.longest == ground.n_layers:
            hint = "raise `longest`, or name another kind too, such as skip"
            self.bad("kinds", "with `longest: 1` and repeats alone no layer can be repeated", hint)
        return tuple(kind for kind in given if kind in KINDS)

    def _indicators(self, ground: Ground) -> Indicators:
        made = Indicators(ground, self._whole("repeats", 3, MOST_REPEATS, "repetitions"), self._switch("matrix", True))
        if ground.scales is None and self.top.get("matrix") is True:
            self.bad("matrix", "no scales are searched that could form a matrix", "leave `matrix` out")
        elif made.n_genes > MOST_GENES:
            key = "matrix" if made.matrix and ground.scales is not None else "repeats"
            hint = "`matrix: false` has one scale per layer of the list; fewer sources or repeats, more frozen layers"
            self.bad(key, f"the space would have {made.n_genes:,} genes, and at most {MOST_GENES:,} are searched", hint)
        return made


def _number(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) < sys.float_info.max  # as whole numbers beyond that have no float; false for NaN
