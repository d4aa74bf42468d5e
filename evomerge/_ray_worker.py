"""What runs in a Ray actor: a worker that says where it is, loads when asked, and evaluates. Does not import ray."""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.errors import EnvironmentProblem, EvomergeError
from evomerge.pool import evaluate_safely, patient_threads

if TYPE_CHECKING:
    from evomerge.worker import Failed, Job, Outcome, WorkerSpec


class RayWorker:
    """A worker as a Ray actor: placed first, loaded when asked, so that waiting for room is not taken for loading.

    Args:
        environment: variables to set.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        os.environ.update(environment)
        os.environ.update(patient_threads(os.environ))  # torch is loaded later
        os.environ["TQDM_DISABLE"] = "1"
        os.environ["HF_HUB_OFFLINE"] = "1"

    def where(self) -> tuple[str, str]:
        """Host and process, for people; and the version of evomerge."""
        return f"{os.uname().nodename}:{os.getpid()}", version("evomerge")

    def load(self, spec: WorkerSpec, folder: str) -> EvomergeError | None:
        """Load the models; what is wrong, if something is."""
        host = os.uname().nodename
        if not Path(folder).is_dir():
            hint = "start the search in a folder that every node sees under the same path"
            return EnvironmentProblem(f"{host} has no folder {folder}, to which the study's paths are relative", hint)
        os.chdir(folder)
        try:
            import torch

            from evomerge.worker import Worker

            if spec.device == "cuda" and not torch.cuda.is_available():
                seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
                hint = "does `nvidia-smi` work there, and does torch there have CUDA?"
                return EnvironmentProblem(
                    f"Ray gave a worker on {host} GPU {seen!r}, but torch sees no CUDA device", hint
                )
            self._worker = Worker(spec)
        except EvomergeError as error:
            return error
        except Exception:
            return EnvironmentProblem(f"a worker could not start on {host}:\n{traceback.format_exc()}")
        return None

    def evaluate(self, job: Job) -> Outcome | Failed:
        """What the worker finds out about a job."""
        return evaluate_safely(self._worker, job)
