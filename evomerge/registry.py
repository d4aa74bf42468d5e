"""The one registry of merge methods, objectives and optimizers.

A name comes from one of three places, looked up lazily in this order:

1. a file of this package: evomerge/methods/ties.py registers "ties" (files that start with an
   underscore are not entries);
2. an entry point of an installed package, in the group evomerge.methods, evomerge.objectives or
   evomerge.optimizers;
3. a Python file that the user names explicitly (`load_local_file`): that file's code runs.

Importing this module imports nothing else of evomerge but its errors, and no torch.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigError, EnvironmentProblem

KINDS = ("methods", "objectives", "optimizers")


@dataclass(frozen=True)
class _Entry:
    obj: Any
    module: str


_entries: dict[str, dict[str, _Entry]] = {kind: {} for kind in KINDS}


def names(kind: str) -> tuple[str, ...]:
    """Returns the sorted names of `kind`: built-in files, entry points and registered objects."""
    found = {*_builtins(kind), *_entry_points(kind), *_entries[kind]}
    return tuple(sorted(found))


def get(kind: str, name: str) -> Any:
    """Returns the object registered as `name`, importing the file that defines it if needed.

    Raises:
        ConfigError: if there is no such name; the hint lists close matches.
        EnvironmentProblem: if its file needs a package that is not installed.
    """
    if name not in _table(kind):
        _import_definition(kind, name)
    return _entries[kind][name].obj


def register(kind: str, name: str, obj: Any, *, module: str = "") -> None:
    """Adds `obj` under `name`; `module` is where it was defined (default: `obj.__module__`).

    Registering again from the same module replaces the entry (a reload).

    Raises:
        ConfigError: if the name belongs to another module already, or to a built-in file.
    """
    table = _table(kind)
    module = module or getattr(obj, "__module__", "")
    owner = f"evomerge.{kind}.{name}" if name in _builtins(kind) else ""
    if name in table:
        owner = table[name].module
    if owner and owner != module:
        raise ConfigError(
            f"{kind}: {module or 'this object'} registers {name!r}, which {owner} already defines",
            hint="choose another name",
        )
    table[name] = _Entry(obj, module)


def load_local_file(path: str | Path) -> tuple[tuple[str, str], ...]:
    """Runs the Python file at `path` and returns the (kind, name) pairs that it registered.

    The same file with the same content is run once per process. Only call this for a path that
    the user named for the purpose: it executes code.

    Raises:
        ConfigError: if the file cannot be read, fails, or registers nothing.
    """
    file = Path(path)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the Python file {file}: {error.strerror}") from error
    digest = hashlib.blake2b(str(file.resolve()).encode() + b"\0" + content, digest_size=8)
    module = f"evomerge_local_{digest.hexdigest()}"
    if module not in sys.modules:
        _run_file(file, module)
    found = tuple(
        (kind, name) for kind in KINDS for name, entry in sorted(_entries[kind].items()) if entry.module == module
    )
    if not found:
        raise ConfigError(
            f"{file} registers no method, objective or optimizer",
            hint="decorate a function with @evomerge.methods.method(...)",
        )
    return found


def _run_file(file: Path, module: str) -> None:
    spec = importlib.util.spec_from_file_location(module, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file} is not a Python file", hint="its name must end in .py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[module] = loaded  # dataclasses and pickle look the module up while it runs
    try:
        spec.loader.exec_module(loaded)
    except Exception as error:
        del sys.modules[module]
        for kind in KINDS:
            stale = [name for name, entry in _entries[kind].items() if entry.module == module]
            for name in stale:
                del _entries[kind][name]
        if isinstance(error, ConfigError):
            raise
        line = _line_in(error, str(file))
        raise ConfigError(f"{file}{line} failed: {type(error).__name__}: {error}") from error


def _line_in(error: BaseException, filename: str) -> str:
    """Returns ":line" of the innermost frame of `error` that lies in `filename`, or ""."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f":{error.lineno}"
    line, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == filename:
            line = f":{trace.tb_lineno}"
        trace = trace.tb_next
    return line


def _table(kind: str) -> dict[str, _Entry]:
    if kind not in _entries:
        raise ConfigError(f"unknown registry {kind!r}", hint=f"one of {', '.join(KINDS)}")
    return _entries[kind]


def _builtins(kind: str) -> frozenset[str]:
    _table(kind)
    folder = str(Path(__file__).parent / kind)
    modules = pkgutil.iter_modules([folder])
    return frozenset(info.name for info in modules if not info.name.startswith("_"))


def _entry_points(kind: str) -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=f"evomerge.{kind}")}


def _import_definition(kind: str, name: str) -> None:
    """Imports what defines `name`, so that it stands in the table afterwards."""
    builtin = name in _builtins(kind)
    point = None if builtin else _entry_points(kind).get(name)
    if not builtin and point is None:
        _raise_unknown(kind, name)
    origin = f"evomerge.{kind}.{name}" if point is None else f"entry point {point.value}"
    try:
        if point is None:
            importlib.import_module(origin)
        else:
            obj = point.load()
            if name not in _entries[kind]:
                register(kind, name, obj, module=point.module)
    except ImportError as error:
        missing = f" ({error.name})" if error.name else ""
        raise EnvironmentProblem(
            f"{kind}: {name!r} cannot be imported from {origin}: {error}",
            hint=f"install the package that it needs{missing}",
        ) from error
    if name not in _entries[kind]:
        raise EnvironmentProblem(f"{kind}: {origin} does not register {name!r}")


def _raise_unknown(kind: str, name: str) -> None:
    known = names(kind)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
    raise ConfigError(f"unknown {kind[:-1]} {name!r}", hint=hint)
