"""Objective kind `lm_eval`: one lm-eval task, scored on the live model through lm-eval's own API.

Requests are built once per split by lm-eval (prompts, few-shot examples, chat templates); per candidate
only the model's answers, lm-eval's filters and its per-item metric run. The aggregate is lm-eval's own.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge import registry
from evomerge.errors import ConfigError, Problem
from evomerge.objectives import SPLITS, ObjectiveSpec, Scores, resolve_path
from evomerge.objectives._aggregate import aggregated, numbers_of
from evomerge.objectives._canonical import canonical
from evomerge.objectives._fewshot import content_hash, example_hashes, fewshot_problems, keep_examples_apart
from evomerge.objectives._options import LmEvalOptions, read_options
from evomerge.objectives._task_files import installed_task_file, is_installed, load_local_task

if TYPE_CHECKING:
    import numpy as np

    from evomerge.model import LiveModel

OUTPUT_TYPES = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")
UNIT_METRICS = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "f1")
HELD_OUT = ("validation", "test")
DERIVED_SHARES = {"search": 0.6, "validation": 0.2, "test": 0.2}
FEWSHOT_SEED = 1234  # lm-eval's own default
REHEARSED_ITEMS = 50


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
    `batch_size` (default 64); `apply_chat_template`; `fewshot_as_multiturn`. Few-shot examples of derived
    splits are drawn from the search split; those of named splits must not be in validation or test.

    Raises:
        ConfigError: an unknown or ill-typed option.
    """

    def __init__(self, spec: ObjectiveSpec) -> None:
        self.spec = spec
        self.name = spec.name
        self.options = read_options(LmEvalOptions, spec.options, f"objective {spec.name}")
        self.metric, _, self._filter = self.options.metric.partition(",")
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
        config = dict(self._configuration())
        config.pop("dataset_kwargs", None)  # holds absolute paths; the documents themselves follow
        if getattr(config.get("custom_dataset"), "__module__", "").startswith("evomerge."):
            del config["custom_dataset"]
        options = self.options.model_dump(exclude={"file", "batch_size"}, exclude_none=True)
        whole = hashlib.sha256(canonical([options, config]).encode())
        for split in self.splits:
            task = self._task(split)
            docs = task.eval_docs
            for digest in [*(content_hash(docs[i]) for i in self._ids(split, task)), *example_hashes(task)]:
                whole.update(digest.encode())
        return whole.hexdigest()

    def check(self) -> list[Problem]:
        """Task, output type, splits, few-shot examples and metric, without a model."""
        where = f"objective {self.name}"
        try:
            task = self._task("search")
        except ConfigError as error:
            return list(error.problems)
        if task.OUTPUT_TYPE not in OUTPUT_TYPES:
            return [Problem(f"output type {task.OUTPUT_TYPE} is not scored here", where)]
        problems = self._check_splits(where)
        try:
            self._rehearse(task)
        except ConfigError as error:
            problems += error.problems
        except Exception as error:  # task code, lm-eval and its metrics raise whatever they meet
            problems.append(Problem(f"dummy answers cannot be aggregated to {self.metric}: {error!r:.300}", where))
        return problems

    def _rehearse(self, task: Any) -> list[Any]:
        """Build, answer and aggregate a few items, so that what cannot be scored is found before the search."""
        ids = self._ids("search", task)[:REHEARSED_ITEMS]
        if not ids:
            return []
        ready = self._prepare(task, ids)
        for instance in ready.instances:
            answer = -1.0 - (instance.idx + instance.doc_id) % 3
            kinds = {"loglikelihood": (answer, False), "loglikelihood_rolling": answer}
            instance.resps = [kinds.get(instance.request_type, "answer")] * instance.repeats
        items = self._items(ready)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ready.task.aggregation()[self.metric](items)
        return items

    @cached_property
    def partial(self) -> bool:
        """Whether items are numbers: metrics of a whole corpus of texts (BLEU) have no parts."""
        return numbers_of(self._rehearse(self._task("search"))) is not None

    def size(self, split: str) -> int:
        """The number of documents."""
        return len(self._ids(split, self._task(split)))

    def score(self, live: LiveModel, split: str, positions: Sequence[int] | None = None) -> Scores:
        """Score the live model on a split; items keep the order of the data set."""
        ready = self._ready(split, live)
        if positions is not None:
            docs = [ready.docs[i] for i in positions]
            wanted = {doc_id for doc_id, _ in docs}
            ready = _Split(ready.task, docs, [i for i in ready.instances if i.doc_id in wanted])
        for instance in ready.instances:
            instance.resps, instance.filtered_resps = [], {}
        live.forget_logits()
        _answer(_harness(live, self.options.batch_size), ready.instances)
        live.require_finite_logits()
        return self._aggregated(self._items(ready), ready.task)

    def aggregate(self, items: np.ndarray) -> Scores:
        """lm-eval's aggregate of items that are numbers."""
        rows = items.tolist() if items.ndim == 1 else [tuple(row) for row in items.tolist()]
        return self._aggregated(rows, self._task("search"))

    def _aggregated(self, items: list[Any], task: Any) -> Scores:
        return aggregated(f"{self.name}: {self.metric}", task.aggregation()[self.metric], items)

    def _items(self, ready: _Split) -> list[Any]:
        """The metric's raw value for each document, from the answers in the instances."""
        ready.task._instances = ready.instances
        ready.task.apply_filters()
        by_doc: dict[int, list[Any]] = defaultdict(list)
        for instance in ready.instances:
            by_doc[instance.doc_id].append(instance)
        filters = list(ready.instances[0].filtered_resps)
        chosen = self._filter or filters[0]
        if chosen not in filters:
            raise self._error(f"no filter {chosen!r}", f"it has {', '.join(filters)}")
        items = []
        for doc_id, doc in ready.docs:
            answers = sorted(by_doc[doc_id], key=lambda i: i.idx)
            metrics = ready.task.process_results(doc, [a.filtered_resps[chosen] for a in answers])
            if self.metric not in metrics or self.metric not in ready.task.aggregation():
                known = sorted(metrics.keys() & ready.task.aggregation().keys())
                message = f"task {ready.task.config.task} has no metric {self.metric!r}"
                raise self._error(message, f"it has {', '.join(known)}")
            items.append(metrics[self.metric])
        return items

    def _error(self, message: str, hint: str = "") -> ConfigError:
        return ConfigError.of([Problem(message, f"objective {self.name}", hint)])

    def _ready(self, split: str, live: LiveModel) -> _Split:
        if split not in self._prepared:
            task = self._task(split)
            self._prepared[split] = self._prepare(task, self._ids(split, task), live)
        return self._prepared[split]

    def _prepare(self, task: Any, ids: list[int], live: LiveModel | None = None) -> _Split:
        """Let lm-eval build the prompts; without a model, there is no chat template around them."""
        chat = self.options.apply_chat_template and live is not None
        try:
            task.build_all_requests(
                samples=ids,
                rank=0,
                world_size=1,
                apply_chat_template=chat,
                fewshot_as_multiturn=self.options.fewshot_as_multiturn and chat,
                chat_template=_chat_template(live.tokenizer) if chat and live else None,
                tokenizer_name=live.path if chat and live else "",
            )
        except Exception as error:  # templates, samplers and task code raise whatever they meet
            raise self._error(f"lm-eval cannot build the prompts: {error!r:.300}") from error
        docs = list(task.doc_iterator(rank=0, world_size=1, samples=ids))
        return _Split(task, docs, list(task.instances))

    def _ids(self, split: str, task: Any) -> list[int]:
        """Positions of the split's items among the task's documents, ascending."""
        return self._all_ids(split, task.eval_docs)[: self.options.limit_of(split)]

    def _all_ids(self, split: str, docs: Any) -> list[int]:
        if self._named_splits() is not None:
            return list(range(len(docs)))
        low, high = _share(split)
        return [i for i, doc in enumerate(docs) if low <= _unit_hash(doc) < high]

    def _named_splits(self) -> dict[str, str] | None:
        """Our split -> the data set's split, or None when splits are derived by hash."""
        if self.options.splits is not None:
            return {str(s): name for s, name in self.options.splits.items()}
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
            task = self._build({})
            docs = task.eval_docs
            held_out = {content_hash(docs[i]) for s in HELD_OUT for i in self._all_ids(s, docs)}
            keep_examples_apart(task, held_out)
            return task
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
        task = self._build({"test_split": named[split]})
        keep_examples_apart(task, set())
        return task

    def _build(self, overrides: dict[str, Any]) -> Any:
        _quiet()
        from lm_eval.tasks import TaskManager

        config = self._configuration()
        if self.options.num_fewshot is not None:
            overrides = {**overrides, "num_fewshot": self.options.num_fewshot}
        where = f"objective {self.name}"
        try:
            # A copy: lm-eval fills in defaults, which would show in the fingerprint.
            loaded = TaskManager(include_defaults=False).load([copy.deepcopy({**config, **overrides})])
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
            if self.options.file is not None:
                path = resolve_path(self.spec, self.options.file)
                if not path.is_file():
                    raise ConfigError(f"objective {self.name}: no task file {path}")
                self._config = load_local_task(path, allow_code=self.spec.allow_code)
            else:
                self._config = _installed_config(self.name, str(self.options.task))
        return self._config

    def _check_splits(self, where: str) -> list[Problem]:
        seen: dict[str, str] = {}
        held_out: dict[str, str] = {}
        tasks: list[Any] = []
        problems: list[Problem] = []
        for split in self._named_splits() or SPLITS:
            try:
                task = self._task(split)
            except ConfigError as error:
                problems += error.problems
                continue
            tasks.append(task)
            docs = task.eval_docs
            ids = self._all_ids(split, docs)
            if not ids:
                problems.append(Problem(f"the {split} split is empty", where))
            hashes = [content_hash(docs[i]) for i in ids]
            if split in HELD_OUT:
                held_out |= dict.fromkeys(hashes, split)
            for digest in hashes[: self.options.limit_of(split)]:
                other = seen.setdefault(digest, split)
                if other != split:
                    hint = "scores on shared items are not honest"
                    problems.append(Problem(f"the {other} and {split} splits share items", where, hint))
                    break
        found = [p for task in tasks for p in fewshot_problems(task, held_out, where)]
        return problems + list(dict.fromkeys(found))


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
        path = Path(entry.yaml_path)
    if not is_installed(path):
        raise ConfigError(
            f"objective {name}: {path} is not one of lm-eval's own task files", hint="put it under `file:`"
        )
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


def _unit_hash(doc: dict[str, Any]) -> float:
    return int(content_hash(doc)[:15], 16) / 16**15


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
