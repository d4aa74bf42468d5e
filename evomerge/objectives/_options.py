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
    batch_size: Count | None = Field(None, description="a positive number of rows")
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

    file: Text | None = Field(None, description="a text file, whose documents are divided 60/20/20 into splits")
    files: dict[Split, Text] | None = Field(
        None, description="a mapping of search (and validation, test) to text files"
    )
    limit: Count | None = Field(None, description="a positive number of documents")
    # The first token of a window may be context only: with one token, every text would score 0.
    max_tokens: Annotated[int, Field(ge=2)] | None = Field(None, description="a number of tokens, 2 or more")
    batch_size: Count | None = Field(None, description="a positive number of rows")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _one_source(self.file, self.files)
        return self


class _PromptOptions(_Options):
    """Items of JSON lines, one text of each being the prompt."""

    file: Text | None = Field(None, description="a file of JSON lines, which is divided 60/20/20 into splits")
    files: dict[Split, Text] | None = Field(
        None, description="a mapping of search (and validation, test) to files of JSON lines"
    )
    prompt: Text = Field("prompt", description="the name of a column")
    limit: Count | None = Field(None, description="a positive number of items per split")
    batch_size: Count | None = Field(None, description="a positive number of prompts per forward pass")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _one_source(self.file, self.files)
        return self

    @property
    def source(self) -> str | dict[Split, str]:
        """The file, or one per split."""
        return self.file or self.files or {}


class _ResponseOptions(_PromptOptions):
    """Prompts that the model answers."""

    until: Annotated[list[Text], Field(min_length=1)] = Field(["\n"], description="a list of texts that end a response")
    max_tokens: Count = Field(64, description="the largest number of new tokens, 1 or more")
    apply_chat_template: bool = Field(False, description="true or false")


class ExactMatchOptions(_ResponseOptions):
    """Options of kind `exact_match`; see `ExactMatchObjective`."""

    answer: Text = Field("answer", description="the name of a column")
    ignore_case: bool = Field(False, description="true or false")
    ignore_punctuation: bool = Field(False, description="true or false")


class ResponseLengthOptions(_ResponseOptions):
    """Options of kind `response_length`; see `ResponseLengthObjective`."""

    maximize: bool = Field(False, description="true or false")


class EntropyOptions(_PromptOptions):
    """Options of kind `entropy`; see `EntropyObjective`."""

    max_tokens: Count = Field(1024, description="the largest number of tokens of a prompt, 1 or more")


class AgreementOptions(_Options):
    """Options of kind `agreement`; see `AgreementObjective`."""

    prompts: Annotated[dict[Text, Text | dict[Split, Text]], Field(min_length=1)] = Field(
        description="a mapping of experts to a file of JSON lines, or to one file for each split"
    )
    prompt: Text = Field("prompt", description="the name of a column")
    limit: Count | None = Field(None, description="a positive number of prompts per expert and split")
    max_tokens: Count = Field(64, description="the largest number of tokens of a prompt, 1 or more")
    batch_size: Count | None = Field(None, description="a positive number of prompts per forward pass")
    max_bytes: Count = Field(2_000_000_000, description="a positive number of bytes of memory")


class SizeOptions(_Options):
    """Options of kind `size`; see `SizeObjective`."""

    count: Literal["parameters", "layers"] = Field("parameters", description="parameters or layers")


class LatencyOptions(_Options):
    """Options of kind `latency`; see `LatencyObjective`."""

    prompt_tokens: Count = Field(32, description="a positive number of tokens")
    new_tokens: Count = Field(32, description="a positive number of tokens")
    batch_size: Count = Field(1, description="a positive number of sequences")
    runs: Annotated[int, Field(ge=3)] = Field(5, description="a number of runs, 3 or more")


class WeakestLinkOptions(_Options):
    """Options of kind `weakest_link`; see `WeakestLinkObjective`."""

    of: Annotated[tuple[Any, ...], Field(min_length=2)] = Field(description="a list of two or more objectives")
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="a positive number, in the unit of the scores"
    )


class NegativeFlipsOptions(_Options):
    """Options of kind `negative_flips`; see `NegativeFlipsObjective`."""

    of: Annotated[tuple[Any, ...], Field(min_length=1, max_length=1)] = Field(description="one objective")
    reference: Text = Field(description="`base`, an expert's name or the path of a checkpoint")


class PythonOptions(_Options):
    """Options of kind `python`; see `PythonObjective`."""

    file: Text = Field(description="the path of a Python file")
    function: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*$", max_length=200)] = Field(
        description="the name of a function in that file"
    )
    items: Text | dict[Split, Text] = Field(
        description="a file of JSON lines, which is divided 60/20/20, or one file for each split"
    )
    limit: Count | None = Field(None, description="a positive number of items per split")
    maximize: bool = Field(True, description="true or false")


def _one_source(file: str | None, files: dict[Split, str] | None) -> None:
    if (file is None) == (files is None):
        raise ValueError("give `file:` (divided into splits by content) or `files:` (one for each split)")
    if files is not None and "search" not in files:
        raise ValueError("`files:` names no search file")


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
