"""Task configurations as text that is equal in every process and folder, functions included."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from pathlib import Path
from typing import Any


def canonical(value: Any) -> str:
    """JSON of a configuration: a function counts by its name and its file's content, never by its address."""
    return json.dumps(_plain(value), sort_keys=True, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return ["float", repr(value)]
    if isinstance(value, dict):
        return ["dict", sorted(([_plain(k), _plain(v)] for k, v in value.items()), key=json.dumps)]
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, set | frozenset):
        return ["set", sorted((_plain(v) for v in value), key=json.dumps)]
    if isinstance(value, functools.partial):
        return ["partial", _plain(value.func), _plain(value.args), _plain(value.keywords)]
    if inspect.isroutine(value) or isinstance(value, type):
        return ["code", *_code(value)]
    if hasattr(value, "__dict__"):
        return ["object", *_code(type(value)), _plain(vars(value))]
    return [type(value).__qualname__, str(value)]


def _code(value: Any) -> list[str]:
    """Name and source. lm-eval calls a local module by its path, of which only the last part counts."""
    module = str(getattr(value, "__module__", "")).rpartition("/")[2]
    try:
        source = Path(inspect.getsourcefile(inspect.unwrap(value)) or "").read_bytes()
    except (OSError, TypeError):
        source = b""  # built into the interpreter: its name says what it is
    return [module, str(getattr(value, "__qualname__", "")), hashlib.sha256(source).hexdigest()]
