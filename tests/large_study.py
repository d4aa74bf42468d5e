"""A study of many candidates with made-up scores, written in bulk: what a long search leaves behind."""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import sqlalchemy
from optuna.storages._rdb import models as tables
from optuna.trial import TrialState

from evomerge._study_rows import distribution, item_rows
from evomerge.objectives import mean_scores
from evomerge.recipe import Recipe
from evomerge.study import Header, Study

GENES = 16
NAMES = ("math", "latin")
PART = 5_000


def domains() -> dict[str, tuple[float, float, bool]]:
    return {f"expert{i:02d}.weight": (0.0, 1.2, False) for i in range(GENES)}


def recipe_of(point: np.ndarray) -> Recipe:
    experts = {f"expert{i:02d}": {"weight": round(float(w), 6)} for i, w in enumerate(point)}
    return Recipe.build("task_arithmetic", "base", experts)


def header() -> Header:
    return Header({"seed": 1, "known_recipes": False}, dict.fromkeys(NAMES, True), {"text": "name: large\n"})


def large_study(url: str, name: str, count: int, items: int = 100) -> Study:
    """`count` finished candidates of GENES genes and two objectives; every 20th failed, every 10th was stopped."""
    import optuna

    study = Study.create(url, name, header())
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 1.2, (count, GENES))
    quality = 0.5 + 0.1 * np.tanh(points @ rng.normal(size=(GENES, 2)) / 4) + rng.normal(0, 0.01, (count, 2))
    dists = {g: optuna.distributions.distribution_to_json(distribution(d)) for g, d in domains().items()}
    example = recipe_of(points[0]).to_yaml()
    packed = item_rows({"search": {n: mean_scores(rng.integers(0, 2, items).astype(float)) for n in NAMES}})
    with study._session() as session:
        first = (session.execute(sqlalchemy.text("select max(trial_id) from trials")).scalar() or 0) + 1
    numbers = iter(range(count))
    while part := list(islice(numbers, PART)):
        trials, params, values, user, system = [], [], [], [], []
        for n in part:
            trial_id = first + n
            state = TrialState.FAIL if n % 20 == 7 else TrialState.PRUNED if n % 10 == 3 else TrialState.COMPLETE
            trials.append({"trial_id": trial_id, "number": n, "study_id": study._id, "state": state})
            params += [
                {"trial_id": trial_id, "param_name": g, "param_value": float(w), "distribution_json": dists[g]}
                for g, w in zip(dists, points[n], strict=True)
            ]
            attrs = {"recipe": example, "recipe_id": f"{n:064x}", "arrival": n, "elapsed_s": 5.0 * n}
            if state is TrialState.FAIL:
                attrs |= {"reason": "non_finite", "message": "a NaN in q_proj"}
            else:
                attrs |= {
                    "t_merge_s": 0.25,
                    "t_eval_s": 4.5,
                    "peak_bytes": 10**9,
                    "worker": n % 8,
                    "batch_tokens": 4096,
                }
                kind = "value" if state is TrialState.COMPLETE else "estimate"
                stderr = "stderr" if state is TrialState.COMPLETE else "estimate_stderr"
                for j, objective in enumerate(NAMES):
                    attrs |= {f"{kind}.search.{objective}": float(quality[n, j]), f"{stderr}.search.{objective}": 0.02}
                system += [{"trial_id": trial_id, "key": k, "value_json": json.dumps(v)} for k, v in packed.items()]
            if state is TrialState.PRUNED:
                attrs |= {"share": 0.25, "beaten_by": max(0, n - 10), "stop_rule": "beaten"}
            if state is TrialState.COMPLETE:
                kind_of = tables.TrialValueModel.TrialValueType.FINITE
                values += [
                    {"trial_id": trial_id, "objective": j, "value": float(quality[n, j]), "value_type": kind_of}
                    for j in range(2)
                ]
            user += [{"trial_id": trial_id, "key": k, "value_json": json.dumps(v)} for k, v in attrs.items()]
        with study._session() as session:
            for table, rows in (
                (tables.TrialModel, trials),
                (tables.TrialParamModel, params),
                (tables.TrialValueModel, values),
                (tables.TrialUserAttributeModel, user),
                (tables.TrialSystemAttributeModel, system),
            ):
                session.execute(sqlalchemy.insert(table.__table__), rows)
    return study
