"""YAML for files that people write: plain data only, and every complaint names its line.

What is refused, because it hides mistakes or can run code: duplicate keys, anchors and aliases,
tags, keys that are not strings, several documents in one file, more than 1 MB, deep nesting.
Scalars follow YAML 1.2's core schema: only true/false are booleans ("no" and "on" are strings),
`1e-4` is a number, dates are strings, and an integer with leading zeros stays a string.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from evomerge.errors import ConfigError, Problem

MAX_BYTES = 1_000_000
MAX_DEPTH = 40

Path = tuple[str | int, ...]

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"(true|True|TRUE)|false|False|FALSE")
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_LEADING_ZERO_INT = re.compile(r"[-+]?0[0-9]+")
_SPECIAL = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True)
class Document:
    """Parsed data together with the line of every entry (lines count from 1)."""

    data: Any
    name: str = "<string>"
    lines: dict[Path, int] = field(default_factory=dict, repr=False)

    def line(self, path: Path) -> int:
        """Returns the line of the entry at `path`, or of its nearest known ancestor."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def where(self, path: Path) -> str:
        """Returns "name:line" of the entry at `path`."""
        return f"{self.name}:{self.line(path)}"


def load_yaml(text: str, name: str = "<string>") -> Document:
    """Parses one strict YAML document.

    Raises:
        ConfigError: with one Problem per finding, each at "name:line".
    """
    size = len(text.encode("utf-8", errors="surrogatepass"))
    if size > MAX_BYTES:
        problem = Problem(f"{size} bytes of YAML, more than the {MAX_BYTES} allowed", name)
        raise ConfigError.of([problem])
    try:
        _refuse_features(text, name)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError.of([_syntax_problem(error, name, text)]) from error
    document = Document(None, name)
    problems: list[Problem] = []
    data = None if node is None else _convert(node, (), document, problems)
    if problems:
        raise ConfigError.of(problems, name)
    return Document(data, name, document.lines)


def dump_yaml(data: Any) -> str:
    """Writes plain data in block style, keys in their own order, floats by `repr`.

    What `load_yaml` reads back equals `data` (tuples become lists). Strings that YAML 1.1 or
    `load_yaml` would take for something else are quoted, so other YAML readers agree too.
    """
    text: str = yaml.dump(
        data,
        Dumper=_Dumper,
        default_flow_style=False,
        sort_keys=False,
        allow_unicode=True,
        width=100,
    )
    return text


def _refuse_features(text: str, name: str) -> None:
    """Raises for anchors, aliases, tags and deep nesting, from the events: before any recursion."""
    problems = []
    depth = documents = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = f"{name}:{event.start_mark.line + 1 if event.start_mark else 1}"
        anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
        if isinstance(event, yaml.AliasEvent):
            problems.append(Problem(f"alias *{anchor} is not allowed", where, "repeat it"))
        elif anchor:
            problems.append(Problem(f"anchor &{anchor} is not allowed", where, "remove it"))
        if tag:
            problems.append(Problem(f"tag {tag} is not allowed", where, "plain data only"))
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                problems.append(Problem(f"nested more than {MAX_DEPTH} levels deep", where))
                break
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                problems.append(Problem("a second YAML document starts here", where, "keep one"))
                break
    if problems:
        raise ConfigError.of(problems, name)


def _syntax_problem(error: yaml.YAMLError, name: str, text: str) -> Problem:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        what = ", ".join(part for part in (error.context, error.problem) if part)
        return Problem(f"not valid YAML: {what}", f"{name}:{line}")
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return Problem("a character that YAML does not allow", f"{name}:{line}")
    return Problem(f"not valid YAML: {error}", name)


def _convert(node: yaml.Node, path: Path, document: Document, problems: list[Problem]) -> Any:
    document.lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        return _convert_mapping(node, path, document, problems)
    if isinstance(node, yaml.SequenceNode):
        return [_convert(item, (*path, index), document, problems) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode) and not node.style:
        return _plain_scalar(node.value, document.where(path), problems)
    return node.value


def _convert_mapping(node: yaml.MappingNode, path: Path, document: Document, problems: list[Problem]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        where = f"{document.name}:{line}"
        key = key_node.value
        if isinstance(key_node, yaml.ScalarNode) and not key_node.style:
            key = _plain_scalar(key, where, [])
        if not isinstance(key, str):
            hint = "put the key in quotes" if isinstance(key_node, yaml.ScalarNode) else ""
            problems.append(Problem("a mapping key that is not a string", where, hint))
            continue
        if key in result:
            first = document.lines[(*path, key)]
            problems.append(Problem(f"key {key!r} appears twice (first on line {first})", where))
            continue
        document.lines[(*path, key)] = line
        result[key] = _convert(value_node, (*path, key), document, problems)
    return result


def _plain_scalar(text: str, where: str, problems: list[Problem]) -> Any:
    if _NULL.fullmatch(text):
        return None
    if match := _BOOL.fullmatch(text):
        return match[1] is not None
    if _INT.fullmatch(text):
        return int(text)
    if _LEADING_ZERO_INT.fullmatch(text):
        return text  # YAML 1.1 would read octal, 1.2 decimal: a revision such as 0123456 is neither
    if _FLOAT.fullmatch(text):
        if text.lstrip("+-").isdigit():
            problems.append(Problem(f"the integer {text[:24]} has more than 18 digits", where))
            return None
        return float(text)
    if match := _SPECIAL.fullmatch(text):
        return float((match[1] or "") + (match[2] or match[3]))
    return text


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True  # a list that occurs twice must not become an anchor


# Quotes every string that our reader would take for a number, on top of YAML 1.1's rules.
_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(rf"^(?:{_FLOAT.pattern}|{_SPECIAL.pattern})$"),
    list("-+.0123456789"),
)
