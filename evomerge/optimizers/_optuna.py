"""What the optimizers on Optuna's samplers share: one in-memory study, quiet, and seeded per ask."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from evomerge.optimizers._core import Array

if TYPE_CHECKING:
    import optuna


def gene(i: int) -> str:
    """Return Optuna's parameter name of dimension i; zero-padded, so that sorting keeps the order."""
    return f"x{i:05d}"


def seed_for(seed: int, number: int) -> int:
    """Return the 32-bit seed of the sampler that answers `ask(number)`."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Optuna's messages and its warnings about experimental parts, for a while."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(level)


def new_study(n_goals: int) -> optuna.Study:
    """Return an empty in-memory study that maximises every objective."""
    import optuna

    return optuna.create_study(study_name="memory", directions=["maximize"] * n_goals)


def fresh(study: optuna.Study) -> optuna.Study:
    """Return another view of the same in-memory study.

    A Study object caches its trials from the first sampling on, until its own `ask` is called: a view that is used
    once never sees a stale list.
    """
    import optuna

    return optuna.load_study(study_name=study.study_name, storage=study._storage, sampler=study.sampler)


def distributions(dim: int) -> dict[str, optuna.distributions.BaseDistribution]:
    """Return the unit cube as Optuna describes it."""
    import optuna

    return {gene(i): optuna.distributions.FloatDistribution(0.0, 1.0) for i in range(dim)}


def trial(x: Array, values: Array | None, **system_attrs: Any) -> optuna.trial.FrozenTrial:
    """Return a finished trial, or a running one where `values` is None."""
    import optuna

    state = optuna.trial.TrialState
    return optuna.trial.create_trial(
        state=state.RUNNING if values is None else state.COMPLETE,
        values=None if values is None else values.tolist(),
        params={gene(i): float(value) for i, value in enumerate(x)},
        distributions=distributions(len(x)),
        system_attrs=system_attrs,
    )


def point(params: dict[str, Any], dim: int) -> Array:
    """Return the vector `(dim,)` of a trial's parameters."""
    return np.array([params[gene(i)] for i in range(dim)], dtype=np.float64)
