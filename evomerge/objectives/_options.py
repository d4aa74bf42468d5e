"""The options of each kind of objective, checked strictly: every mistake is named before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from evomerge.errors import ConfigError, Problem

Split = Literal["search", "validation", "test"]
Count = Annotated[int, Field(gt=0)]
Text = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
# Never a path: the name is looked for below lm-eval's own folder, whose files may run code.
TaskName = Annotated[str, StringConstraints(pattern=r"^\w[\w.+-]*$", max_length=200)]
Metric = Annotated[str, StringConstraints(pattern=r"^[^,]+(,[^,]+)?$", max_length=200)]


class _Options(BaseModel):
    """Every field's description ends the sentence "`key:` must be ..."; null is the same as no key."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LmEvalOptions(_Options):
    """Options of kind `lm_eval`; see `LmEvalObjective`."""

    task: TaskName | None = Field(None, description="the name of an installed task")
    file: Text | None = Field(None, description="the path of a task YAML")
    metric: Metric = Field("acc", description='a metric such as "acc" or "acc,none"')
    splits: dict[Split, Text] | None = Field(
        None, description="a mapping of search, validation and test to splits of the data set"
    )
    limit: Count | dict[Split, Count] | None = Field(
        None, description="a positive number of items, or one for each of search, validation and test"
    )
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(None, description="a number of examples, 0 or more")
    batch_size: Count = Field(64, description="a positive number")
    apply_chat_template: bool = Field(False, description="true or false")
    fewshot_as_multiturn: bool = Field(False, description="true or false")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.task is None) == (self.file is None):
            raise ValueError("give `task:` (an installed task) or `file:` (a task YAML)")
        if self.splits is not None and "search" not in self.splits:
            raise ValueError("`splits:` names no search split")
        return self

    def limit_of(self, split: str) -> int | None:
        """The largest number of items of a split, None for all."""
        if isinstance(self.limit, dict):
            return next((n for s, n in self.limit.items() if s == split), None)
        return self.limit


class PerplexityOptions(_Options):
    """Options of kind `perplexity`; see `PerplexityObjective`."""

    files: dict[Split, Text] = Field(description="a mapping of search (and validation, test) to text files")
    limit: Count | None = Field(None, description="a positive number of documents")
    # The first token of a window may be context only: with one token, every text would score 0.
    max_tokens: Annotated[int, Field(ge=2)] | None = Field(None, description="a number of tokens, 2 or more")
    batch_size: Count = Field(16, description="a positive number")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if "search" not in self.files:
            raise ValueError("`files:` names no search file")
        return self


Model = TypeVar("Model", bound=_Options)


def read_options(model: type[Model], options: Mapping[str, Any], where: str) -> Model:
    """The options as an object.

    Raises:
        ConfigError: with one problem per key that is unknown, missing or of the wrong type.
    """
    given = {k: v for k, v in options.items() if v is not None}
    try:
        return model.model_validate(given)
    except ValidationError as error:
        found: dict[str, Problem] = {}
        for item in error.errors(include_url=False):
            key = str(item["loc"][0]) if item["loc"] else ""
            found.setdefault(key, _problem(model, key, item["type"], item["msg"], given, where))
        raise ConfigError.of(found.values(), where) from None


def _problem(model: type[Model], key: str, kind: str, message: str, given: Mapping[str, Any], where: str) -> Problem:
    if not key:
        return Problem(message.removeprefix("Value error, "), where)
    field = model.model_fields.get(key)
    if field is None:
        return Problem(f"unknown key {key!r}", where, hint=f"known: {', '.join(sorted(model.model_fields))}")
    if kind == "missing" and key not in given:
        return Problem(f"the key `{key}:` is missing: {field.description}", where)
    return Problem(f"`{key}:` must be {field.description}, not {given[key]!r:.200}", where)
