"""The errors that evomerge raises on purpose; each carries a hint and an exit code.

    EvomergeError                 1   anything below
    ├── ConfigError               2   what a person wrote is wrong; lists every problem at once
    │   └── RecipeError           2   ... and it is a recipe
    ├── EnvironmentProblem        3   the machine, the files or the installation are wrong
    │   ├── WeightsError          3   a checkpoint is missing, damaged or does not fit the others
    │   └── StorageError          3   the study's database cannot be used
    ├── StudyConflict             4   the study on disk is not the one that was asked for
    ├── TooManyFailures           5   too many candidates failed for the search to make sense
    ├── Interrupted             130   a person stopped it before there was anything to continue
    └── CandidateFailure          1   one candidate is infeasible: recorded, the search goes on
        └── NonFinite             1   ... because of a NaN or an infinity

Every error survives pickling, so that a worker's error reaches the search with its hint.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in something that a person wrote.

    `where` is a place that the reader can go to ("study.yaml:12", a tensor, a gene).
    """

    message: str
    where: str = ""
    hint: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        hint = f" ({self.hint})" if self.hint else ""
        return " ".join(f"{place}{self.message}{hint}".split())


class EvomergeError(Exception):
    """Base of every error that evomerge raises on purpose."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)  # both in args: unpickling calls type(self)(*args)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class ConfigError(EvomergeError):
    """What a person wrote is wrong. `problems` has at least one entry."""

    exit_code = 2

    def __init__(self, message: str, hint: str = "", problems: Iterable[Problem] = ()) -> None:
        super().__init__(message, hint)
        self.problems = tuple(problems) or (Problem(message, hint=hint),)

    @classmethod
    def of(cls, problems: Iterable[Problem], subject: str = "configuration") -> Self:
        """Builds the error whose message is the list of `problems`; they must not be empty."""
        found = tuple(problems)
        if not found:
            raise ValueError("ConfigError.of needs at least one problem")
        if len(found) == 1:
            return cls(str(found[0]), problems=found)
        lines = "".join(f"\n  - {problem}" for problem in found)
        return cls(f"{len(found)} problems in {subject}:{lines}", problems=found)


class RecipeError(ConfigError):
    """A merge recipe is wrong."""


class EnvironmentProblem(EvomergeError):
    """The machine, the files or the installation do not fit what was asked for."""

    exit_code = 3


class WeightsError(EnvironmentProblem):
    """A checkpoint is missing, damaged, or does not fit the other checkpoints."""


class StorageError(EnvironmentProblem):
    """The study's database cannot be opened, read or written."""


class StudyConflict(EvomergeError):
    """The study in the database is not the study that was asked for."""

    exit_code = 4


class TooManyFailures(EvomergeError):
    """So many candidates failed that going on would waste the machine."""

    exit_code = 5


class Interrupted(EvomergeError):
    """Somebody pressed Ctrl-C before there was anything to continue."""

    exit_code = 130  # what shells give for SIGINT


class CandidateFailure(EvomergeError):
    """One candidate cannot be built or scored; it is recorded as failed and the search goes on.

    `reason` is a short word for grouping ("non_finite", "out_of_memory"), by default the class's.
    """

    default_reason = "failed"

    def __init__(self, message: str, hint: str = "", reason: str = "") -> None:
        super().__init__(message, hint)
        self.reason = reason or self.default_reason


class NonFinite(CandidateFailure):
    """A merged tensor or a score holds a NaN or an infinity."""

    default_reason = "non_finite"
