"""Objective kind `python`: a function of yours scores each item; its file runs only if a flag says that it may."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from evomerge import registry
from evomerge.errors import CandidateFailure, ConfigError, Problem
from evomerge.objectives import ObjectiveSpec, Scores, mean_scores, resolve_path
from evomerge.objectives._items import Items
from evomerge.objectives._options import PythonOptions, read_options

if TYPE_CHECKING:
    from evomerge.model import LiveModel

FLAG = "pass --allow-task-code if you wrote the file or have read it"


class PythonObjective:
    """The mean of what a Python function says of each item.

    Options: `file` and `function` (called as function(model, tokenizer, items) with the merged transformers model, its
    tokenizer and a list of dicts; returns one number per item, each depending on its own item alone), `items` (JSON
    lines: one file, divided 60/20/20, or one for each of search, validation and test), `limit` (items per split),
    `maximize` (default true).

    The function runs without gradients and must not change the model. An exception in it fails the candidate, with
    the traceback in the study. The file's content is part of the fingerprint; what it imports is not.

    Raises:
        ConfigError: an unknown or ill-typed option.
    """

    partial = True
    bounds: tuple[float | None, float | None] = (None, None)

    def __init__(self, spec: ObjectiveSpec) -> None:
        self.spec = spec
        self.name = spec.name
        self.options = read_options(PythonOptions, spec.options, f"objective {spec.name}")
        self.maximize = self.options.maximize
        self.path = resolve_path(spec, self.options.file)
        self.items = Items(spec, self.options.items, (), self.options.limit)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that there are items for."""
        return self.items.splits

    def check(self) -> list[Problem]:
        """The flag, the file, the function, and the items."""
        try:
            _ = self._function
            found: list[Problem] = []
        except ConfigError as error:
            found = list(error.problems)
        if "search" not in self.splits:
            found.append(Problem("`items:` names no search file", f"objective {self.name}"))
        return found + self.items.check()

    def fingerprint(self) -> str:
        """Hash of the file's content, the function's name and the items; runs nothing."""
        parts = [self._source, self.options.function.encode(), self.items.fingerprint().encode()]
        return hashlib.sha256(b"\0".join([*parts, str(self.maximize).encode()])).hexdigest()

    def size(self, split: str) -> int:
        """The number of items."""
        return len(self.items.of(split))

    def score(self, live: LiveModel, split: str, positions: Sequence[int] | None = None) -> Scores:
        """items: (N,) what the function returned."""
        items = self.items.of(split)
        chosen = items if positions is None else [items[i] for i in positions]
        function = self._function
        live.forget_logits()
        try:
            with torch.no_grad():
                answer = function(live.model, live.tokenizer, [copy.deepcopy(item.doc) for item in chosen])
            values = np.asarray([float(value) for value in answer], dtype=np.float64)
        except (torch.OutOfMemoryError, MemoryError):
            raise  # a reason of its own
        except Exception:  # it is the user's: whatever it raises is this candidate's
            raise CandidateFailure(f"{self.name}: {traceback.format_exc()}", reason="objective") from None
        live.require_finite_logits()
        name = f"{self.name}: {self.options.function} in {self.path}"
        if len(values) != len(chosen):
            raise CandidateFailure(f"{name} gave {len(values)} numbers for {len(chosen)} items", reason="objective")
        if not np.isfinite(values).all():
            at = chosen[int(np.flatnonzero(~np.isfinite(values))[0])].where
            raise CandidateFailure(f"{name} gave a number that is not finite, first for {at}", reason="objective")
        return self.aggregate(values)

    def aggregate(self, items: np.ndarray) -> Scores:
        """The mean over items."""
        return mean_scores(items)

    @cached_property
    def _source(self) -> bytes:
        try:
            return Path(self.path).read_bytes()
        except OSError as error:
            raise self._error(f"cannot read {self.path}: {error.strerror}") from None

    @cached_property
    def _function(self) -> Callable[..., Any]:
        """The function; its file runs here, once per content."""
        if not self.spec.allow_code:
            raise self._error(f"{self.path} is Python code, which is not run unasked", FLAG)
        name = f"evomerge_objective_{hashlib.sha256(str(self.path).encode() + self._source).hexdigest()[:16]}"
        if name not in sys.modules:
            made = importlib.util.spec_from_file_location(name, self.path)
            if made is None or made.loader is None:
                raise self._error(f"{self.path} is not a Python file", "its name must end in .py")
            module = importlib.util.module_from_spec(made)
            sys.modules[name] = module  # dataclasses and pickle look the module up while it runs
            try:
                made.loader.exec_module(module)
            except Exception:
                del sys.modules[name]
                raise self._error(f"{self.path} fails when it is loaded: {traceback.format_exc(limit=-1)}") from None
        function = getattr(sys.modules[name], self.options.function, None)
        if not callable(function):
            raise self._error(f"{self.path} has no function {self.options.function!r}")
        found: Callable[..., Any] = function
        return found

    def _error(self, message: str, hint: str = "") -> ConfigError:
        return ConfigError.of([Problem(message, f"objective {self.name}", hint)])


registry.register("objectives", "python", PythonObjective)
