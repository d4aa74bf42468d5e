"""Objective kind `lm_eval`: one lm-eval task, scored on the live model through lm-eval's own API.

Requests are built once per split by lm-eval (prompts, few-shot examples, chat templates); per candidate
only the model's answers, lm-eval's filters and its per-item metric run. The aggregate is lm-eval's own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from evomerge import registry
from evomerge.errors import CandidateFailure, ConfigError, Problem
from evomerge.objectives import SPLITS, ObjectiveSpec, Scores, mean_scores, resolve_path
from evomerge.objectives._task_files import installed_task_file, load_local_task

if TYPE_CHECKING:
    from evomerge.model import LiveModel

OPTIONS = {
    "task", "file", "metric", "splits", "limit", "num_fewshot", "batch_size",
    "apply_chat_template", "fewshot_as_multiturn",
}  # fmt: skip
OUTPUT_TYPES = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")
UNIT_METRICS = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "f1")
DERIVED_SHARES = {"search": 0.6, "validation": 0.2, "test": 0.2}
FEWSHOT_SEED = 1234  # lm-eval's own default
BOOTSTRAP_RESAMPLES = 200


@dataclass
class _Split:
    """One split made ready: lm-eval's task object, the chosen documents and their requests."""

    task: Any
    docs: list[tuple[int, Any]]
    instances: list[Any]


class LmEvalObjective:
    """One metric of one lm-eval task.

    Options (the keys of the study file): `task` (an installed task's name) or `file` (a local task YAML);
    `metric` ("acc" or lm-eval's "acc,none"); `splits` (search, validation and test -> a split of the
    data set; if absent, splits of those names are used, and failing that the task's documents are
    divided 60/20/20 by the hash of their content); `limit` (items per split); `num_fewshot`;
    `batch_size` (default 64); `apply_chat_template`; `fewshot_as_multiturn`.

    Raises:
        ConfigError: an unknown or ill-typed option.
    """

    def __init__(self, spec: ObjectiveSpec) -> None:
        self.spec = spec
        self.name = spec.name
        self.options = dict(spec.options)
        problems = _check_options(self.options)
        if problems:
            raise ConfigError.of(problems, f"objective {spec.name}")
        metric, _, self._filter = str(self.options.get("metric", "acc")).partition(",")
        self.metric = metric
        self._config: dict[str, Any] | None = None
        self._prepared: dict[str, _Split] = {}
        self._datasets: Any = None

    @property
    def maximize(self) -> bool:
        """lm-eval's direction of the metric."""
        return bool(self._task("search").higher_is_better().get(self.metric, True))

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """0 and 1 for shares of right answers; unknown otherwise."""
        return (0.0, 1.0) if self.metric in UNIT_METRICS else (None, None)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that the task's data set gives."""
        named = self._named_splits()
        return tuple(s for s in SPLITS if named is None or s in named)

    def fingerprint(self) -> str:
        """Hash of the options, the task's configuration and the documents of every split."""
        config = {k: str(v) for k, v in self._configuration().items() if not callable(v)}
        config.pop("dataset_kwargs", None)  # holds absolute paths; the documents themselves follow
        options = {k: v for k, v in self.options.items() if k not in ("file", "batch_size")}
        whole = hashlib.sha256(json.dumps([options, config], sort_keys=True).encode())
        for split in self.splits:
            task = self._task(split)
            for i in self._ids(split, task):
                whole.update(_content_hash(task.eval_docs[i]).encode())
        return whole.hexdigest()

    def check(self) -> list[Problem]:
        """Task, metric, output type and splits, without a model."""
        where = f"objective {self.name}"
        try:
            task = self._task("search")
            known = list(task.aggregation())
        except ConfigError as error:
            return list(error.problems)
        problems = []
        if self.metric not in known:
            problems.append(
                Problem(
                    f"task {task.config.task} has no metric {self.metric!r}",
                    where=where,
                    hint=f"it has {', '.join(known)}",
                )
            )
        if task.OUTPUT_TYPE not in OUTPUT_TYPES:
            problems.append(Problem(f"output type {task.OUTPUT_TYPE} is not scored here", where))
        filters = [f.name for f in getattr(task, "_filters", [])]
        if self._filter and filters and self._filter not in filters:
            problems.append(Problem(f"no filter {self._filter!r}", where, hint=f"it has {', '.join(filters)}"))
        return problems + self._check_splits(where)

    def score(self, live: LiveModel, split: str) -> Scores:
        """Score the live model on a split; items keep the order of the data set."""
        ready = self._ready(split, live)
        for instance in ready.instances:
            instance.resps, instance.filtered_resps = [], {}
        live.forget_logits()
        _answer(_harness(live, int(self.options.get("batch_size", 64))), ready.instances)
        live.require_finite_logits()
        ready.task._instances = ready.instances
        ready.task.apply_filters()
        items = self._items(ready)
        array = np.asarray(items, dtype=np.float64)
        if not np.isfinite(array).all():
            raise CandidateFailure(f"{self.name}: an item's {self.metric} is not finite", reason="scores")
        aggregate = ready.task.aggregation()[self.metric]
        if array.ndim == 1 and getattr(aggregate, "__name__", "") == "mean":
            return mean_scores(array)
        return _bootstrapped(aggregate, items, array)

    def _items(self, ready: _Split) -> list[Any]:
        by_doc: dict[int, list[Any]] = defaultdict(list)
        for instance in ready.instances:
            by_doc[instance.doc_id].append(instance)
        chosen = self._filter or next(iter(ready.instances[0].filtered_resps))
        items = []
        for doc_id, doc in ready.docs:
            answers = sorted(by_doc[doc_id], key=lambda i: i.idx)
            metrics = ready.task.process_results(doc, [a.filtered_resps[chosen] for a in answers])
            items.append(metrics[self.metric])
        return items

    def _ready(self, split: str, live: LiveModel) -> _Split:
        if split not in self._prepared:
            task = self._task(split)
            ids = self._ids(split, task)
            chat = bool(self.options.get("apply_chat_template", False))
            tokenizer = live.tokenizer
            task.build_all_requests(
                samples=ids,
                rank=0,
                world_size=1,
                apply_chat_template=chat,
                fewshot_as_multiturn=bool(self.options.get("fewshot_as_multiturn", False)),
                chat_template=_chat_template(tokenizer) if chat else None,
                tokenizer_name=live.path if chat else "",
            )
            docs = list(task.doc_iterator(rank=0, world_size=1, samples=ids))
            self._prepared[split] = _Split(task, docs, list(task.instances))
        return self._prepared[split]

    def _ids(self, split: str, task: Any) -> list[int]:
        """Positions of the split's items among the task's documents, ascending."""
        ids = list(range(len(task.eval_docs)))
        if self._named_splits() is None:
            low, high = _share(split)
            ids = [i for i in ids if low <= _unit_hash(task.eval_docs[i]) < high]
        limit = self.options.get("limit")
        limit = limit.get(split) if isinstance(limit, dict) else limit
        return ids[: int(limit)] if limit else ids

    def _named_splits(self) -> dict[str, str] | None:
        """Our split -> the data set's split, or None when splits are derived by hash."""
        if "splits" in self.options:
            return dict(self.options["splits"])
        available = list(self._dataset_splits())
        return {s: s for s in SPLITS} if set(SPLITS) <= set(available) else None

    def _dataset_splits(self) -> Iterable[str]:
        if self._datasets is None:
            self._datasets = self._build({}).dataset
        return list(self._datasets)

    def _task(self, split: str) -> Any:
        """lm-eval's task object over the documents that hold a split."""
        if split in self._prepared:
            return self._prepared[split].task
        named = self._named_splits()
        if named is None:
            return self._build({})
        if split not in named:
            raise ConfigError(
                f"objective {self.name} has no {split} split",
                hint=f"name one under `splits:`; it has {', '.join(named)}",
            )
        if named[split] not in self._dataset_splits():
            known = ", ".join(self._dataset_splits())
            raise ConfigError(
                f"objective {self.name}: the data set has no split {named[split]!r}", hint=f"it has {known}"
            )
        return self._build({"test_split": named[split]})

    def _build(self, overrides: dict[str, Any]) -> Any:
        _quiet()
        from lm_eval.tasks import TaskManager

        config = self._configuration()
        if "num_fewshot" in self.options:
            overrides = {**overrides, "num_fewshot": int(self.options["num_fewshot"])}
        where = f"objective {self.name}"
        try:
            loaded = TaskManager(include_defaults=False).load([{**config, **overrides}])
        except ConfigError:
            raise
        except Exception as error:
            # lm-eval and datasets raise whatever they meet: a name that the hub lacks, no network, a bad split.
            raise ConfigError(
                f"{where}: lm-eval cannot load task {config.get('task')}: {error}",
                hint="its data set must be on this machine; tasks are read offline",
            ) from error
        task = next(iter(loaded["tasks"].values()))
        task.set_fewshot_seed(FEWSHOT_SEED)
        return task

    def _configuration(self) -> dict[str, Any]:
        if self._config is None:
            if "file" in self.options:
                path = resolve_path(self.spec, self.options["file"])
                if not path.is_file():
                    raise ConfigError(f"objective {self.name}: no task file {path}")
                self._config = load_local_task(path, allow_code=self.spec.allow_code)
            else:
                self._config = _installed_config(self.name, self.options["task"])
        return self._config

    def _check_splits(self, where: str) -> list[Problem]:
        seen: dict[str, str] = {}
        problems: list[Problem] = []
        for split in self._named_splits() or SPLITS:
            try:
                task = self._task(split)
                ids = self._ids(split, task)
            except ConfigError as error:
                problems += error.problems
                continue
            if not ids:
                problems.append(Problem(f"the {split} split is empty", where))
            shared = {_content_hash(task.eval_docs[i]) for i in ids}
            for digest in shared:
                other = seen.setdefault(digest, split)
                if other != split:
                    problems.append(
                        Problem(f"the {other} and {split} splits share items", where,
                                hint="scores on shared items are not honest")
                    )  # fmt: skip
                    break
        return problems


def _check_options(options: dict[str, Any]) -> list[Problem]:
    problems = [
        Problem(f"unknown key {key!r}", hint=f"known: {', '.join(sorted(OPTIONS))}")
        for key in options
        if key not in OPTIONS
    ]
    if ("task" in options) == ("file" in options):
        problems.append(Problem("give `task:` (an installed task) or `file:` (a task YAML)"))
    for split in options.get("splits") or {}:
        if split not in SPLITS:
            problems.append(Problem(f"unknown split {split!r}", hint=f"known: {', '.join(SPLITS)}"))
    if "splits" in options and "search" not in (options["splits"] or {}):
        problems.append(Problem("`splits:` names no search split"))
    limits = options.get("limit")
    for value in limits.values() if isinstance(limits, dict) else [limits]:
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            problems.append(Problem(f"`limit:` must be a positive number of items, not {value!r}"))
    batch = options.get("batch_size", 1)
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        problems.append(Problem(f"`batch_size:` must be a positive number, not {batch!r}"))
    return problems


def _installed_config(name: str, task: str) -> dict[str, Any]:
    """The configuration of a task that lm-eval brings; its own functions are trusted as lm-eval is."""
    _quiet()
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    path = installed_task_file(task)
    if path is None:
        entry = TaskManager().task_index.get(task)
        if entry is None or entry.yaml_path is None:
            raise ConfigError(
                f"objective {name}: lm-eval has no task {task!r}",
                hint="`lm-eval ls tasks` lists them; a task file of your own goes under `file:`",
            )
        path = entry.yaml_path
    config: dict[str, Any] = load_yaml(path, resolve_func=True)
    if not isinstance(config.get("task"), str):
        raise ConfigError(f"objective {name}: {task} is a group; name one of its tasks")
    return config


def _harness(live: LiveModel, batch_size: int) -> Any:
    """lm-eval's view of the live model. The batch size must be given: its default is 1."""
    key = f"lm_eval:{batch_size}"
    if key not in live.adapters:
        _quiet()
        from lm_eval.models.huggingface import HFLM

        live.adapters[key] = HFLM(pretrained=live.model, tokenizer=live.tokenizer, batch_size=batch_size)
    return live.adapters[key]


def _answer(harness: Any, instances: list[Any]) -> None:
    """Let the model answer every request, as lm-eval's evaluator does."""
    by_type: dict[str, list[Any]] = defaultdict(list)
    for instance in instances:
        by_type[instance.request_type] += [instance] * instance.repeats
    for request_type, requests in by_type.items():
        answers = getattr(harness, request_type)(requests, disable_tqdm=True)
        for answer, request in zip(answers, requests, strict=True):
            request.resps.append(answer)


def _bootstrapped(aggregate: Any, items: list[Any], array: np.ndarray) -> Scores:
    """A corpus metric: its standard error by resampling items with a fixed seed."""
    rng = np.random.default_rng(0)
    values = []
    for _ in range(BOOTSTRAP_RESAMPLES):
        chosen = rng.integers(0, len(items), len(items))
        values.append(float(aggregate([items[i] for i in chosen])))
    value = float(aggregate(items))
    if not np.isfinite(value):
        raise CandidateFailure("the aggregate is not finite", reason="scores")
    return Scores(value, float(np.std(values, ddof=1)), array)


def _chat_template(tokenizer: Any) -> Any:
    def apply(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text: str = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    return apply


def _content_hash(doc: dict[str, Any]) -> str:
    text = json.dumps(doc, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _unit_hash(doc: dict[str, Any]) -> float:
    return int(_content_hash(doc)[:15], 16) / 16**15


def _share(split: str) -> tuple[float, float]:
    low = 0.0
    for name, share in DERIVED_SHARES.items():
        if name == split:
            return low, low + share if name != "test" else 1.0
        low += share
    raise ConfigError(f"unknown split {split!r}")


def _quiet() -> None:
    """lm-eval reports its progress at INFO and on tqdm bars; ours is elsewhere."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    for name in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


registry.register("objectives", "lm_eval", LmEvalObjective)
