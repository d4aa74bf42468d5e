"""Objective kind `lm_eval`: one lm-eval task, scored on the live model through lm-eval's own API.

Requests are built once per split by lm-eval (prompts, few-shot examples, chat templates); per candidate
only the model's answers, lm-eval's filters and its per-item metric run. The aggregate is lm-eval's own.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from evomerge import registry
from evomerge.errors import CandidateFailure, ConfigError, Problem
from evomerge.objectives import SPLITS, ObjectiveSpec, Scores, resolve_path
from evomerge.objectives._aggregate import aggregated, numbers_of
from evomerge.objectives._canonical import canonical
from evomerge.objectives._compiled import (
    Compiled,
    Part,
    Prepared,
    misfits,
    obstacle,
    quiet,
    tokens_of,
    unknown_note,
)
from evomerge.objectives._fewshot import content_hash, example_hashes, fewshot_problems, keep_examples_apart
from evomerge.objectives._items import split_of
from evomerge.objectives._options import LmEvalOptions, read_options
from evomerge.objectives._public import benchmark_problems
from evomerge.objectives._task_files import installed_config, load_local_task
from evomerge.objectives._vector_metrics import guessing, vector_metric
from evomerge.scoring import Likelihoods, backing_off

if TYPE_CHECKING:
    from evomerge.model import LiveModel, Outline

OUTPUT_TYPES = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")
UNIT_METRICS = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "f1")
HELD_OUT = ("validation", "test")
FEWSHOT_SEED = 1234  # lm-eval's own default
REHEARSED_ITEMS = 50
PROOFS = 5  # sets of made-up answers on which a vectorised metric must agree with lm-eval
KNOWN_ANSWERS = 50_000  # texts whose metric is remembered


class LmEvalObjective:
    """One metric of one lm-eval task.

    Options (the keys of the study file): `task` (an installed task's name) or `file` (a local task YAML);
    `metric` ("acc" or lm-eval's "acc,none"); `splits` (search, validation and test -> a split of the
    data set; if absent, splits of those names are used, and failing that the task's documents are
    divided 60/20/20 by the hash of their content); `limit` (items per split); `num_fewshot`;
    `batch_size` (the most rows in a forward pass; default: as memory allows); `apply_chat_template`;
    `fewshot_as_multiturn`. Few-shot examples of derived splits are drawn from the search split; those of
    named splits must not be in validation or test.

    Raises:
        ConfigError: an unknown or ill-typed option.
    """

    def __init__(self, spec: ObjectiveSpec) -> None:
        self.spec = spec
        self.name = spec.name
        self.options = read_options(LmEvalOptions, spec.options, f"objective {spec.name}")
        self.metric, _, self._filter = self.options.metric.partition(",")
        self._config: dict[str, Any] | None = None
        self._tasks: dict[str, Any] = {}
        self._prepared: dict[str, Prepared] = {}
        self._parts: dict[tuple[str, tuple[int, ...] | None], Part] = {}
        self._datasets: Any = None

    @property
    def maximize(self) -> bool:
        """lm-eval's direction of the metric."""
        return bool(self._task("search").higher_is_better().get(self.metric, True))

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """0 and 1 for shares of right answers; unknown otherwise."""
        return (0.0, 1.0) if self.metric in UNIT_METRICS else (None, None)

    @cached_property
    def chance(self) -> float | None:
        """Mean over the search items of 1 / number of choices, for the accuracy of multiple-choice tasks."""
        task = self._task("search")
        return guessing(task, [task.eval_docs[i] for i in self._ids("search", task)], self.metric)

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
        problems += benchmark_problems(self.spec, self._configuration(), self._named_splits())
        try:
            self._rehearse(task)
        except ConfigError as error:
            problems += error.problems
        except Exception as error:  # task code, lm-eval and its metrics raise whatever they meet
            problems.append(Problem(f"dummy answers cannot be aggregated to {self.metric}: {error!r:.300}", where))
        return problems

    def fit(self, outline: Outline) -> tuple[list[Problem], list[str]]:
        """What of the items cannot be fed to this model, and what people should know of how they are scored.

        Prompts of the other splits are built only for documents longer than all of the search split's.
        """
        problems: list[Problem] = []
        notes: list[str] = []
        longest = -1
        for split in self.splits:
            where = f"objective {self.name}, {split} split"
            task = self._task(split)
            sizes = {i: len(canonical(task.eval_docs[i])) for i in self._ids(split, task)}
            chosen = [i for i, size in sizes.items() if size > longest]
            longest = max(longest, *sizes.values(), -1)
            instances = self._prepare(task, chosen, outline).instances if chosen else []
            try:
                reason = obstacle(instances, outline)
                lines = [f"answered by lm-eval itself: {reason}"] if reason else misfits(instances, outline)
            except CandidateFailure as failure:
                problems.append(Problem(failure.message, where, failure.hint))
                continue
            if split == "search":
                texts = ["".join(a for a in i.args if isinstance(a, str)) for i in instances[:REHEARSED_ITEMS]]
                lines += unknown_note(outline.tokenizer, texts)
            notes += [f"{where}: {line}" for line in lines]
        return problems, notes

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
        part = self._part(split, positions, live)
        live.forget_logits()
        found = backing_off(live, lambda: part.answer(live))
        live.require_finite_logits()
        return self._aggregated(self._results(part, found), part.split.task)

    def _results(self, part: Part, found: Likelihoods | None) -> list[Any]:
        """The items: all at once where the metric has such a form, and it has proved equal to lm-eval's own."""
        if part.vector is None or found is None:
            return self._items(part.split)
        items: list[Any] = part.vector(found).tolist()
        if not part.proved:
            theirs = self._items(part.split)
            if theirs != items or not self._agrees(part):
                part.vector = None
                return theirs
            part.proved = True
        return items

    def _agrees(self, part: Part) -> bool:
        """Whether the vectorised metric is lm-eval's on made-up answers too: a model may get nothing right."""
        assert part.vector is not None and part.compiled is not None
        rng = np.random.default_rng(0)
        for _ in range(PROOFS):
            n = len(part.compiled.likely)
            made = Likelihoods(-10.0 * rng.random(n), rng.random(n) < 0.5)
            for instance, total, hit in zip(part.compiled.likely, made.total, made.greedy, strict=True):
                instance.resps, instance.filtered_resps = [(float(total), bool(hit))], {}
            if self._items(part.split) != part.vector(made).tolist():
                return False
        return True

    def _part(self, split: str, positions: Sequence[int] | None, live: LiveModel) -> Part:
        """Some or all items of a split with their requests made ready, kept for the next candidates."""
        key = (split, None if positions is None else tuple(positions))
        if key not in self._parts:
            ready = self._ready(split, live)
            if positions is not None:
                docs = [ready.docs[i] for i in positions]
                wanted = {doc_id for doc_id, _ in docs}
                ready = Prepared(ready.task, docs, [i for i in ready.instances if i.doc_id in wanted])
            part = Part(ready, self.options.batch_size)
            reason = obstacle(ready.instances, live)
            if reason is None:
                part.compiled = Compiled(ready.instances, live, self.options.batch_size)
                part.vector = vector_metric(ready.task, ready.docs, part.compiled.likely, self.metric)
            else:
                live.note(f"objective {self.name} is answered by lm-eval itself: {reason}")
            for line in part.compiled.notes if part.compiled is not None else ():
                live.note(f"objective {self.name}, {split} split: {line}")
            self._parts[key] = part
        return self._parts[key]

    def aggregate(self, items: np.ndarray) -> Scores:
        """lm-eval's aggregate of items that are numbers."""
        rows = items.tolist() if items.ndim == 1 else [tuple(row) for row in items.tolist()]
        return self._aggregated(rows, self._task("search"))

    def _aggregated(self, items: list[Any], task: Any) -> Scores:
        return aggregated(f"{self.name}: {self.metric}", task.aggregation()[self.metric], items)

    def _items(self, ready: Prepared) -> list[Any]:
        """The metric's raw value for each document, from the answers in the instances."""
        if len(ready.known) > KNOWN_ANSWERS:
            ready.known.clear()
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
            answers = [a.filtered_resps[chosen] for a in sorted(by_doc[doc_id], key=lambda i: i.idx)]
            known = (doc_id, tuple(answers)) if all(isinstance(a, str) for a in answers) else None
            if known in ready.known:  # a text that another candidate gave
                items.append(ready.known[known])
                continue
            metrics = ready.task.process_results(doc, answers)
            if self.metric not in metrics or self.metric not in ready.task.aggregation():
                there = sorted(metrics.keys() & ready.task.aggregation().keys())
                message = f"task {ready.task.config.task} has no metric {self.metric!r}"
                raise self._error(message, f"it has {', '.join(there)}")
            items.append(metrics[self.metric])
            if known is not None:
                ready.known[known] = items[-1]
        return items

    def _error(self, message: str, hint: str = "") -> ConfigError:
        return ConfigError.of([Problem(message, f"objective {self.name}", hint)])

    def _ready(self, split: str, live: LiveModel | Outline) -> Prepared:
        if split not in self._prepared:
            task = self._task(split)
            self._prepared[split] = self._prepare(task, self._ids(split, task), live)
        return self._prepared[split]

    def _prepare(self, task: Any, ids: list[int], live: LiveModel | Outline | None = None) -> Prepared:
        """Let lm-eval build the prompts; without a model, there is no chat template around them."""
        chat = self.options.apply_chat_template and live is not None
        task.set_fewshot_seed(FEWSHOT_SEED)  # the same examples, whatever was built before
        try:
            task.build_all_requests(
                samples=ids,
                rank=0,
                world_size=1,
                apply_chat_template=chat,
                fewshot_as_multiturn=self.options.fewshot_as_multiturn and chat,
                chat_template=tokens_of(live).apply_chat_template if chat and live else None,
                tokenizer_name=live.path if chat and live else "",
            )
        except Exception as error:  # templates, samplers and task code raise whatever they meet
            raise self._error(f"lm-eval cannot build the prompts: {error!r:.300}") from error
        docs = list(task.doc_iterator(rank=0, world_size=1, samples=ids))
        return Prepared(task, docs, list(task.instances))

    def _ids(self, split: str, task: Any) -> list[int]:
        """Positions of the split's items among the task's documents, ascending."""
        return self._all_ids(split, task.eval_docs)[: self.options.limit_of(split)]

    def _all_ids(self, split: str, docs: Any) -> list[int]:
        if self._named_splits() is not None:
            return list(range(len(docs)))
        return [i for i, doc in enumerate(docs) if split_of(content_hash(doc)) == split]

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
        if split not in self._tasks:
            self._tasks[split] = self._make_task(split)
        return self._tasks[split]

    def _make_task(self, split: str) -> Any:
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
        quiet()
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
        return next(iter(loaded["tasks"].values()))

    def _configuration(self) -> dict[str, Any]:
        if self._config is None:
            if self.options.file is not None:
                path = resolve_path(self.spec, self.options.file)
                if not path.is_file():
                    raise ConfigError(f"objective {self.name}: no task file {path}")
                self._config = load_local_task(path, allow_code=self.spec.allow_code)
            else:
                self._config = installed_config(self.name, str(self.options.task))
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


registry.register("objectives", "lm_eval", LmEvalObjective)
