"""A recipe or a candidate as files: a Hub-layout checkpoint, recipes in both forms, a model card, hashes.

Everything is written into a temporary folder beside the target, flushed to disk, and renamed: a folder of
the final name is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from evomerge._recipe_write import no_mergekit_form
from evomerge.errors import CandidateFailure, ConfigError, EnvironmentProblem, NonFinite, Problem, WeightsError
from evomerge.family import check_family, measure, suspicious, unrelated
from evomerge.feasible import doubtful, drops_at_random, mixes, refused
from evomerge.layer_path import check_length
from evomerge.methods import Merge, torch_dtype
from evomerge.model import check_siblings, stacked_config
from evomerge.recipe import Recipe, TensorPlan
from evomerge.strict_yaml import Document, dump_yaml
from evomerge.strict_yaml import Path as Path_
from evomerge.weights import TOKENIZER_FILES, Checkpoint, Weights, open_all

SHARD_BYTES = 5_000_000_000


def merge(
    recipe: Recipe,
    out: str,
    *,
    device: str = "cpu",
    shard_bytes: int = SHARD_BYTES,
    document: Document | None = None,
    warn: Callable[[Problem], None] = lambda problem: None,
) -> Path:
    """Write the recipe's merged model as a Hugging Face checkpoint, tensor by tensor.

    Memory is bounded by the largest shard and one tensor's working set; inputs are memory-mapped.

    Args:
        recipe: its models are folders, relative to the working directory.
        out: folder to make; must not exist, or be empty.
        shard_bytes: largest size of one weight file.
        document: the file that the recipe was read from, so that problems can name its lines.
        warn: told what is doubtful about the merge, before it starts.

    Raises:
        ConfigError: the checkpoints do not fit together, or `out` is taken.
        WeightsError: a checkpoint is missing or broken.
        NonFinite: a merged tensor holds NaN or infinity.
    """
    require_device(device)
    require_free(out)
    donor = check_recipe_models(recipe, document, warn)
    with _new_folder(out) as folder:
        _write_merged(recipe, donor, folder, device, shard_bytes)
        (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        write_mergekit(recipe, folder)
    return Path(out)


def merged_dtype(recipe: Recipe) -> torch.dtype:
    """The dtype that transformers will load the recipe's written model in."""
    for name in (recipe.out_dtype, recipe.dtype):
        if name is not None:
            return torch_dtype(name)
    models = [Checkpoint(m) for m in recipe.models]
    if recipe.compat == "mergekit":
        return reduce(torch.promote_types, (m.dtype for m in models))
    return models[0].dtype


def require_free(out: str) -> None:
    """Raise ConfigError unless `out` can become a new folder."""
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{out} exists already", hint="name a new folder, or remove that one")


def check_recipe_models(
    recipe: Recipe, document: Document | None = None, warn: Callable[[Problem], None] = lambda problem: None
) -> Checkpoint:
    """Open and compare a recipe's models; returns the donor of configuration and tokenizer.

    Raises:
        EnvironmentProblem: a checkpoint is missing or broken.
        ConfigError: they do not fit together, or the recipe's weights cannot be merged.
    """
    for key, text in recipe.verbatim:
        if text not in ("null", '"base"'):
            raise ConfigError(
                f"the recipe's `{key}: {text}` is not supported",
                hint="the tokenizer and its chat template are the base's (or the first model's)",
            )

    def where(path: Path_) -> str:
        return document.where(path) if document is not None else ""

    places = model_places(recipe, document)
    opened, broken = open_all({m: m for m in recipe.models})
    if broken:
        lines = [str(Problem(p.message, places[p.where], p.hint)) for p in broken]
        raise EnvironmentProblem("\n  - ".join(["the recipe's models cannot be read:", *lines]))
    donor = opened[recipe.models[0]]
    others = {m: c for m, c in opened.items() if m != donor.path}
    plans = _plans(recipe, donor, where, document.name if document is not None else "the recipe")
    changes = {m: measure(donor, c) for m, c in others.items()} if mixes(plans) else {}
    found = [*check_siblings(donor, others), *check_family(donor, others), *unrelated(changes)]
    problems = [Problem(p.message, places.get(p.where, p.where), p.hint) for p in found]
    problems += refused(recipe, plans, where)
    if problems:
        raise ConfigError.of(problems, document.name if document is not None else "the recipe")
    for problem in suspicious(changes, drops=drops_at_random(plans)):
        warn(Problem(problem.message, places[problem.where], problem.hint))
    for problem in doubtful(recipe, plans, where):
        warn(problem)
    return donor


def _plans(recipe: Recipe, donor: Checkpoint, where: Callable[[Path_], str], name: str) -> list[TensorPlan]:
    """The recipe's plans, once its layers exist, are not too many, and are of one type where they meet.

    Raises:
        ConfigError: they do not, are too many, or are not.
    """
    n_layers = donor.n_layers
    problems = [
        Problem(
            f"layer_range is {list(source.layers)}, and {source.model} has {n_layers} layers",
            where(("slices", i, "sources", j, "layer_range")),
            f"[first, past last), from 0 to {n_layers}",
        )
        for i, piece in enumerate(recipe.slices)
        for j, source in enumerate(piece.sources)
        if source.layers is not None and source.layers[1] > n_layers
    ]
    plans = []
    try:
        check_length(recipe, n_layers)
        if not problems:
            plans = recipe.plan(donor.names, n_layers)
            stacked_config(donor.path, plans, n_layers)
    except CandidateFailure as failure:
        problems.append(Problem(failure.message, where(("slices",)), failure.hint))
    if problems:
        raise ConfigError.of(problems, name)
    return plans


def model_places(recipe: Recipe, document: Document | None) -> dict[str, str]:
    """For each model, "file:line: model" of its first mention, or the model alone without a file.

    "base" stands for the first model, as in the problems of a family.
    """
    lines: dict[str, int] = {}

    def look(data: Any, path: Path_) -> None:
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            if isinstance(value, (dict, list)):
                look(value, (*path, key))
            elif key in ("model", "base_model", "path") and document is not None and isinstance(value, str):
                lines.setdefault(value, document.line((*path, key)))

    if document is not None and isinstance(document.data, dict):
        look(document.data, ())
    name = document.name if document is not None else ""
    places = {m: f"{name}:{lines[m]}: {m}" if m in lines else m for m in recipe.models}
    return {"base": places[recipe.models[0]], **places}


def write_checkpoint(recipe: Recipe, folder: Path, *, device: str = "cpu", shard_bytes: int = SHARD_BYTES) -> None:
    """Write weights, config.json and tokenizer files of the merged model into an existing folder."""
    require_device(device)
    _write_merged(recipe, check_recipe_models(recipe), folder, device, shard_bytes)


def _write_merged(recipe: Recipe, donor: Checkpoint, folder: Path, device: str, shard_bytes: int) -> None:
    weights = Weights(recipe.models, device)
    plans = recipe.plan(donor.names, donor.n_layers)
    stack = stacked_config(donor.path, plans, donor.n_layers)
    merge = Merge(recipe, plans, weights)

    def merged() -> Iterator[tuple[str, Tensor]]:
        for plan in plans:
            tensor = merge.tensor(plan)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise NonFinite(f"merged tensor {plan.name} holds NaN or infinity", reason="weights")
            weights.forget(plan.inputs + ((plan.base,) if plan.base else ()))
            yield plan.name, tensor.cpu().contiguous()

    dtypes = _write_shards(merged(), folder, shard_bytes)
    _write_config(donor, folder, stack, dtypes)
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (donor.folder / name).is_file():
            shutil.copyfile(donor.folder / name, folder / name)


def require_device(device: str) -> None:
    """Raise ConfigError unless torch can compute there."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ConfigError(f"unknown device {device!r}", hint="cpu, or cuda") from None
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"torch cannot compute on {device!r} here", hint="cpu, or cuda")


def mergekit_form(recipe: Recipe) -> tuple[dict[str, Any] | None, list[str]]:
    """The recipe for mergekit, told to save as the written model is; None where that would be another model.

    Returns:
        It, and what mergekit cannot express.
    """
    if why := no_mergekit_form(recipe):
        return None, [why]
    data, lost = recipe.to_mergekit()
    with suppress(WeightsError):  # where a model is not here to ask, the notes stay as they are
        name = str(merged_dtype(recipe)).removeprefix("torch.")
        if recipe.compat == "paper" and name in ("float32", "bfloat16", "float16"):
            data["out_dtype"] = name
            lost = [line for line in lost if not line.startswith("out_dtype:")]
        donor = Checkpoint(recipe.models[0])
        stack = stacked_config(donor.path, recipe.plan(donor.names, donor.n_layers), donor.n_layers)
        lost += [
            f"{key} of config.json, one entry for each layer: mergekit 0.1.5 leaves it as it was, and stops where the "
            "number of layers is another; with the config.json written here its tensors are right"
            for key, value in stack.items()
            if isinstance(value, list)
        ]
    return data, lost


def write_mergekit(recipe: Recipe, folder: Path) -> None:
    """Write mergekit_config.yml, with a comment for what that form cannot say; no file where there is no such form."""
    data, lost = mergekit_form(recipe)
    if data is not None:
        notes = "".join(f"# mergekit cannot express: {line}\n" for line in lost)
        (folder / "mergekit_config.yml").write_text(notes + dump_yaml(data), encoding="utf-8")


def write_manifest(folder: Path) -> None:
    """Write MANIFEST.sha256 over all files of the folder, in the format of `sha256sum -c`."""
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            lines.append(f"{digest}  {path.relative_to(folder)}\n")
    (folder / "MANIFEST.sha256").write_text("".join(lines), encoding="utf-8")


def export(out: str, recipe: Recipe, card: str, *, weights: bool = True) -> Path:
    """Write a candidate for other people: recipe in both forms, checkpoint, model card, manifest."""
    with _new_folder(out) as folder:
        if weights:
            write_checkpoint(recipe, folder)
        (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        write_mergekit(recipe, folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_manifest(folder)
    return Path(out)


@contextmanager
def _new_folder(out: str) -> Iterator[Path]:
    """A temporary folder that becomes `out` if the block ends well, and vanishes if it does not."""
    require_free(out)
    target = Path(out)
    parent = target.absolute().parent
    partial = parent / f".{target.name}.partial-{os.getpid()}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for stale in parent.glob(f".{target.name}.partial-*"):
            if not _running(stale):
                shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            _share(partial)
            _flush(partial)
            if target.exists():
                target.rmdir()
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except (OSError, SafetensorError) as error:
        raise EnvironmentProblem(f"cannot write {out}: {error}") from error


def _running(partial: Path) -> bool:
    """Whether the process that writes this temporary folder still lives."""
    try:
        os.kill(int(partial.name.rpartition("-")[2]), 0)
    except (OSError, ValueError):
        return False
    return True


def _share(folder: Path) -> None:
    """Weight files get the permissions of any new file: safetensors makes them for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o666 & ~mask)


def _flush(folder: Path) -> None:
    """Everything in the folder, and the folder itself, reaches the disk."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int) -> dict[str, torch.dtype]:
    shard: dict[str, Tensor] = {}
    size = total = 0
    where: dict[str, int] = {}
    dtypes: dict[str, torch.dtype] = {}
    count = 0

    def close() -> None:
        nonlocal shard, size, count
        count += 1
        save_file(shard, str(folder / f"part-{count}"), metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, count))
        shard, size = {}, 0

    for name, tensor in tensors:
        bytes_ = tensor.numel() * tensor.element_size()
        if shard and size + bytes_ > shard_bytes:
            close()
        repeated = any(tensor.data_ptr() == other.data_ptr() for other in shard.values())
        shard[name] = tensor.clone() if repeated else tensor  # a layer used twice is stored twice
        dtypes[name] = tensor.dtype
        size += bytes_
        total += bytes_
    close()
    if count == 1:
        (folder / "part-1").rename(folder / "model.safetensors")
        return dtypes
    names = {n: f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)}
    for number, name in names.items():
        (folder / f"part-{number}").rename(folder / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {tensor: names[n] for tensor, n in sorted(where.items())},
    }
    _write_json(folder / "model.safetensors.index.json", index)
    return dtypes


def _write_config(donor: Checkpoint, folder: Path, stack: dict[str, Any], dtypes: dict[str, torch.dtype]) -> None:
    config = {**donor.config, **stack}
    config.pop("_name_or_path", None)
    floating = [d for d in dtypes.values() if d.is_floating_point]
    if floating:
        common = max(set(floating), key=floating.count)
        config.pop("torch_dtype", None)
        config["dtype"] = str(common).removeprefix("torch.")
    _write_json(folder / "config.json", config)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
