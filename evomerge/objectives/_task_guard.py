"""Which lm-eval task files are plain data: a list of what is allowed, since what runs code cannot be listed.

lm-eval renders templates with an unrestricted Jinja environment, loads metric scripts by name, imports the
functions that `!function` names, and reads prompt libraries as unsafe YAML. A task file that keeps to the
keys, values and template expressions below can do none of that.
"""

from __future__ import annotations

import re
from pathlib import Path

import jinja2
import yaml
from jinja2 import nodes

from evomerge.errors import Problem

MAX_BYTES = 1_000_000
MAX_DEPTH = 40
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # lm-eval's own choice of parser
HINT = "pass --allow-task-code if you wrote the file or have read it"
DATA_TAGS = ("str", "int", "float", "bool", "null", "seq", "map", "timestamp", "merge")
DATA_BUILDERS = ("json", "csv", "parquet", "arrow", "text")
HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
KEYS = {
    "task", "task_alias", "tag", "include", "dataset_path", "dataset_name", "dataset_kwargs", "training_split",
    "validation_split", "test_split", "fewshot_split", "output_type", "doc_to_text", "doc_to_target",
    "doc_to_choice", "doc_to_decontamination_query", "should_decontaminate", "description", "target_delimiter",
    "fewshot_delimiter", "num_fewshot", "fewshot_config", "generation_kwargs", "metric_list", "filter_list",
    "repeats", "gen_prefix", "metadata",
}  # fmt: skip
METRIC_KEYS = {"metric", "aggregation", "higher_is_better", "ignore_case", "ignore_punctuation", "ignore_numbers",
               "regexes_to_ignore", "multi_target"}  # fmt: skip
GENERATION_KEYS = {
    "until", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens", "max_length", "do_sample",
    "temperature", "top_p", "top_k", "min_p", "typical_p", "num_beams", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "min_new_tokens", "min_length", "early_stopping", "seed",
}  # fmt: skip
KWARGS_KEYS = {"data_files", "name", "revision", "split"}
NODES = (
    nodes.Output, nodes.TemplateData, nodes.Name, nodes.Const, nodes.Getitem, nodes.Getattr, nodes.Filter, nodes.Test,
    nodes.Call, nodes.Concat, nodes.Compare, nodes.Operand, nodes.CondExpr, nodes.If, nodes.For, nodes.List,
    nodes.Tuple, nodes.Add, nodes.Sub, nodes.Mul, nodes.Mod, nodes.FloorDiv, nodes.Not, nodes.And, nodes.Or,
    nodes.Neg, nodes.Assign, nodes.Slice, nodes.Template,
)  # fmt: skip
FILTERS = {"abs", "capitalize", "default", "first", "int", "join", "last", "length", "list", "lower", "regex_replace",
           "replace", "reverse", "round", "string", "title", "trim", "upper"}  # fmt: skip
METHODS = {"capitalize", "endswith", "index", "join", "lower", "lstrip", "replace", "rstrip", "split", "startswith",
           "strip", "title", "upper"}  # fmt: skip
NOT_COLUMNS = {"cycler", "joiner", "namespace", "lipsum", "self", "caller", "super", "dict", "loop"}


def code_in(path: Path, seen: set[Path] | None = None) -> list[Problem]:
    """Everything in a task file, and in the files that it includes, that is not plain data.

    `seen` holds the files that were read already.
    """
    seen = set() if seen is None else seen
    seen.add(path.resolve())
    try:
        if path.stat().st_size > MAX_BYTES:
            return [Problem(f"larger than {MAX_BYTES} bytes", where=str(path))]
        text = path.read_text(encoding="utf-8")
        if malformed := _form_problem(text, path):
            return [malformed]
        node = yaml.compose(text, Loader=Loader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        return [Problem(f"not readable as YAML: {error}", where=str(path))]
    if not isinstance(node, yaml.MappingNode):
        return [Problem("a task file is a mapping of keys", where=str(path))]
    found: list[Problem] = []

    def note(what: str, at: yaml.Node) -> None:
        found.append(Problem(what, where=f"{path}:{at.start_mark.line + 1}", hint=HINT))

    for at in _every(node):
        if at.tag.removeprefix("tag:yaml.org,2002:") not in DATA_TAGS:
            note(f"the tag {at.tag} can name code to run", at)
        elif isinstance(at, yaml.ScalarNode) and (problem := template_problem(str(at.value))):
            note(f"a Jinja template {problem}", at)
    return found + _key_problems(node, path, seen)


def _form_problem(text: str, path: Path) -> Problem | None:
    """Aliases and deep nesting, from the events: composed, a few lines of them fill the memory or the stack."""
    depth = 0
    for event in yaml.parse(text, Loader=Loader):
        where = f"{path}:{event.start_mark.line + 1}" if event.start_mark else str(path)
        if isinstance(event, yaml.AliasEvent):
            return Problem(f"the alias *{event.anchor} is not allowed", where, "repeat what it stands for")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            return Problem(f"nested more than {MAX_DEPTH} levels deep", where)
    return None


def _key_problems(node: yaml.MappingNode, path: Path, seen: set[Path]) -> list[Problem]:
    found: list[Problem] = []
    for key, value in node.value:
        where = f"{path}:{key.start_mark.line + 1}"
        if str(key.value) not in KEYS:
            found.append(Problem(f"the key `{key.value!s:.80}` is not plain data", where, HINT))
        elif key.value == "dataset_path":
            name = str(value.value)
            if name not in DATA_BUILDERS and not (HUB_NAME.match(name) and not Path(name).exists()):
                allowed = ", ".join(DATA_BUILDERS)
                found.append(Problem(f"`dataset_path: {name}` is not one of {allowed} or a hub name", where, HINT))
        elif key.value == "dataset_kwargs":
            found += _unknown_keys(value, KWARGS_KEYS, path)
        elif key.value == "generation_kwargs":  # the rest goes to transformers, where `custom_generate` runs files
            found += _unknown_keys(value, GENERATION_KEYS, path)
            if not isinstance(value, yaml.MappingNode):
                found.append(Problem("`generation_kwargs:` must be a mapping", where))
        elif key.value == "metric_list":
            for entry in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                found += _unknown_keys(entry, METRIC_KEYS, path)
                found += _unknown_metrics(entry, path)
        elif key.value == "include":
            for file in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                inner = (path.parent / str(file.value)).resolve()
                if inner not in seen:
                    found += code_in(inner, seen)
    return found


def template_problem(text: str) -> str | None:
    """What a string could do as a Jinja template beyond putting a document's columns together, or None."""
    if "{{" not in text and "{%" not in text:
        return None
    try:
        every = list(jinja2.Environment().parse(text).find_all(nodes.Node))
    except jinja2.TemplateError as error:
        return f"does not parse: {error}"
    except RecursionError:
        return "is nested too deeply"
    for node in every:
        if not isinstance(node, NODES):
            return f"uses {type(node).__name__.lower()}"
        if isinstance(node, nodes.Name) and (node.name in NOT_COLUMNS or node.name.startswith("_")):
            return f"reads {node.name}"
        if isinstance(node, nodes.Getattr) and node.attr.startswith("_"):
            return f"reaches for the attribute {node.attr}"
        if isinstance(node, nodes.Getitem) and not _plain_index(node.arg):
            return "computes the name of an item"
        if isinstance(node, nodes.Filter) and node.name not in FILTERS:
            return f"uses the filter {node.name}"
        if isinstance(node, nodes.Call) and not (
            (isinstance(node.node, nodes.Getattr) and node.node.attr in METHODS)
            or (isinstance(node.node, nodes.Name) and node.node.name == "range")
        ):
            return "calls something"
    return None


def _plain_index(arg: nodes.Node) -> bool:
    """Columns by name, positions by number or by another column; never a string put together, nor `_x`."""
    if isinstance(arg, nodes.Const):
        return not (isinstance(arg.value, str) and arg.value.startswith("_"))
    # An item named by a column is data of the document; Jinja falls back to attributes for strings,
    # so a column could hold "__class__". Arithmetic gives numbers only if it holds no string.
    if isinstance(arg, nodes.Slice):
        return True
    return isinstance(arg, nodes.Add | nodes.Sub | nodes.Neg) and all(
        not isinstance(c.value, str) for c in arg.find_all(nodes.Const)
    ) and not list(arg.find_all(nodes.Name))  # fmt: skip


def _every(node: yaml.Node) -> list[yaml.Node]:
    found = [node]
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            found += _every(child)
    elif isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            found += [*_every(key), *_every(child)]
    return found


def _unknown_keys(node: yaml.Node, known: set[str], path: Path) -> list[Problem]:
    if not isinstance(node, yaml.MappingNode):
        return []
    return [
        Problem(f"the key `{key.value}` is not plain data", f"{path}:{key.start_mark.line + 1}", HINT)
        for key, _ in node.value
        if str(key.value) not in known
    ]


def _unknown_metrics(node: yaml.Node, path: Path) -> list[Problem]:
    import lm_eval.api.metrics  # noqa: F401  (registers lm-eval's own metrics)
    from lm_eval.api import registry

    known = {"metric": set(registry.metric_registry), "aggregation": set(registry.AGGREGATION_REGISTRY)}
    if not isinstance(node, yaml.MappingNode):
        return []
    return [
        Problem(
            f"the {key.value} {value.value} is not one of lm-eval's own", f"{path}:{value.start_mark.line + 1}", HINT
        )
        for key, value in node.value
        if str(key.value) in known and str(value.value) not in known[key.value]
    ]
