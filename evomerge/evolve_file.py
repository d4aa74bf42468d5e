"""A mergekit-evolve genome file read as a study file, with a message for each key without an equivalent."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigError, Problem
from evomerge.weights import has_chat_template

GENOME_KEYS = {
    "models", "merge_method", "base_model", "tokenizer_source", "layer_granularity", "normalize",
    "allow_negative_weights", "filters", "smooth",
}  # fmt: skip
TOP_KEYS = {
    "genome", "tasks", "limit", "num_fewshot", "shuffle", "random_init", "apply_chat_template",
    "fewshot_as_multiturn",
}  # fmt: skip
TASK_KEYS = {"name", "weight", "metric"}
METHODS = ("linear", "task_arithmetic", "ties", "dare_ties", "slerp")
NORMALISED = ("linear", "ties", "dare_ties")  # mergekit-evolve's own default, unlike mergekit's
DEFAULT_EVALUATIONS = 100  # mergekit-evolve's --max-fevals


def translate(data: dict[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """The study file that searches what the genome file searches.

    Returns:
        the study file's data, and one message for each key that has no equivalent here.

    Raises:
        ConfigError: with every key that neither program knows, and every value that makes no sense.
    """
    problems: list[Problem] = []
    notes: list[str] = []
    genome = data.get("genome")
    if not isinstance(genome, dict):
        raise ConfigError(f"{source}: `genome:` is a mapping")
    problems += _unknown(data, TOP_KEYS, source, "")
    problems += _unknown(genome, GENOME_KEYS, source, "genome.")
    method = genome.get("merge_method")
    if method not in METHODS:
        problems.append(Problem(f"genome.merge_method: {method!r} is not one of {METHODS}", source))
    models = genome.get("models")
    if not isinstance(models, list) or not models or not all(isinstance(m, str) for m in models):
        raise ConfigError.of([*problems, Problem("genome.models: a list of checkpoint folders", source)])
    base, experts = _models(genome, models, method, problems, notes, source)
    objectives, weights = _tasks(data, base, problems, notes, source)
    if problems:
        raise ConfigError.of(problems, source)
    for key, why in (
        ("shuffle", "items have a fixed order, so that candidates are comparable"),
        ("random_init", "every study starts from the known recipes"),
    ):
        if data.get(key):
            notes.append(f"{key}: no equivalent; {why}")
    study: dict[str, Any] = {
        "name": re.sub(r"[^A-Za-z0-9._-]", "-", Path(source).stem) or "study",
        "base": base,
        "experts": experts,
        "space": _space(genome, str(method), base, notes),
        "objectives": objectives,
        "budget": {"evaluations": DEFAULT_EVALUATIONS},
    }
    if len(objectives) > 1:
        if min(weights) > 0:
            study["optimizer"] = {
                "name": "cma_es",
                "weights": {o["name"]: w for o, w in zip(objectives, weights, strict=True)},
            }
        else:
            notes.append("tasks: a weight that is not positive is ignored; all are searched as a front")
    notes.append(f"budget: {DEFAULT_EVALUATIONS} evaluations, as --max-fevals; set it with -o budget.evaluations=N")
    return study, notes


def _unknown(data: dict[str, Any], known: set[str], source: str, prefix: str) -> list[Problem]:
    return [
        Problem(f"unknown key `{prefix}{k}`", source, hint=f"known: {', '.join(sorted(known))}")
        for k in data
        if k not in known
    ]


def _models(
    genome: dict[str, Any],
    models: list[str],
    method: Any,
    problems: list[Problem],
    notes: list[str],
    source: str,
) -> tuple[str, dict[str, str]]:
    base = genome.get("base_model")
    if base is None and method not in ("linear", "slerp"):
        problems.append(Problem(f"genome.base_model: {method} needs one", source))
    base = str(base or models[0])
    if method == "linear":
        # Every model is an ordinary input; the first also gives configuration and tokenizer.
        chosen = models
    else:
        chosen = [m for m in models if m != base]
        if base in models and method != "slerp":
            notes.append("genome.models: the base among the models has no effect and is left out")
    if method == "slerp" and len(chosen) != 1:
        problems.append(Problem("genome.models: slerp is searched between two models only", source))
    names: dict[str, str] = {}
    for path in chosen:
        stem = re.sub(r"[^A-Za-z0-9_-]", "-", Path(path).name).strip("-") or "expert"
        name = stem if stem not in names else f"{stem}-{len(names)}"
        names[name] = path
    return base, names


def _space(genome: dict[str, Any], method: str, base: str, notes: list[str]) -> dict[str, Any]:
    granularity = genome.get("layer_granularity") or 0
    filters = genome.get("filters") or []
    if isinstance(granularity, bool) or not isinstance(granularity, int) or granularity < 0:
        raise ConfigError(f"genome.layer_granularity is a number of layers, not {granularity!r}")
    if not isinstance(filters, list) or not all(isinstance(f, str) for f in filters):
        raise ConfigError(f"genome.filters is a list of name parts, not {filters!r}")
    spec: dict[str, Any] = {"method": method, "layer_groups": 1, "genes": {}}
    if granularity > 0:
        spec["layer_groups"] = max(1, _layers(base) // granularity)
    if genome.get("smooth"):
        notes.append("genome.smooth: no equivalent; layer groups are used instead")
    if genome.get("tokenizer_source"):
        notes.append("genome.tokenizer_source: no equivalent; all models must share the base's tokenizer")
    notes.append("dtype: mergekit-evolve computes in bfloat16; here in float32, rounded once to the base's dtype")
    if filters:
        spec["components"] = {str(f): [str(f)] for f in filters} | {"rest": ["*"]}
    if method == "slerp":
        spec["genes"]["t"] = {"low": 0.0, "high": 1.0, "start": 0.5, "per_group": True}
        return spec
    low = -1.5 if genome.get("allow_negative_weights") else 0.0
    spec["genes"]["weight"] = {"low": low, "high": 1.5, "per_expert": True, "per_group": True}
    if method in ("ties", "dare_ties"):
        spec["genes"]["density"] = {
            "low": 0.05, "high": 1.0, "start": 1.0, "per_expert": True, "per_group": True,
        }  # fmt: skip
    normalize = genome.get("normalize")
    spec["fixed"] = {"normalize": method in NORMALISED if normalize is None else bool(normalize)}
    return spec


def _layers(base: str) -> int:
    try:
        config = json.loads((Path(base) / "config.json").read_text(encoding="utf-8"))
        return int(config["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"genome.layer_granularity needs the number of layers, but {base}/config.json gives none"
        ) from None


def _tasks(
    data: dict[str, Any], base: str, problems: list[Problem], notes: list[str], source: str
) -> tuple[list[dict[str, Any]], list[float]]:
    common: dict[str, Any] = {k: data[k] for k in ("limit", "num_fewshot", "fewshot_as_multiturn") if data.get(k)}
    # mergekit-evolve applies the chat template unless told otherwise, and fails where there is none.
    common["apply_chat_template"] = bool(data.get("apply_chat_template", has_chat_template(base)))
    if "apply_chat_template" not in data and not has_chat_template(base):
        notes.append("apply_chat_template: off, since the base's tokenizer has no chat template")
    objectives, weights = [], []
    if not isinstance(data.get("tasks") or [], list):
        problems.append(Problem("`tasks:` is a list", source))
        return [], []
    for index, task in enumerate(data.get("tasks") or []):
        entry = {"name": task} if isinstance(task, str) else task
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            problems.append(Problem(f"tasks[{index}]: a name, or a mapping with `name:`", source))
            continue
        problems += _unknown(entry, TASK_KEYS, source, f"tasks[{index}].")
        weight = entry.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            problems.append(Problem(f"tasks[{index}].weight: a number, not {weight!r}", source))
            continue
        weights.append(float(weight))
        metric = entry.get("metric", "acc,none")
        objectives.append({"kind": "lm_eval", "name": entry["name"], "task": entry["name"], "metric": metric, **common})
    if not objectives and not problems:
        problems.append(Problem("`tasks:` names no task", source))
    if any(w < 0 for w in weights):
        notes.append("tasks: directions come from lm-eval; a negative weight is not needed to minimise")
    return objectives, weights
