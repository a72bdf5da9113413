r"""The file of a sweep: TOML, checked before anything runs.

    [scoring]     models x schemes x facts x seeds
    [training]    tasks x recipes, each recipe with all its seeds and learning rates

>>> plan = read_sweep('[scoring]\nmodels = ["gpt2"]\nseeds = [0, 1]\ndoses = "0-2"')
>>> plan.scoring.seeds, plan.scoring.schemes, plan.scoring.doses, plan.training
((0, 1), ('do-not-think',), (0, 1, 2), None)
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from analyses.texts import read_doses
from hijacklens.errors import InputError, choice, shown, unknown, whole_number
from hijacklens.facts.chat import Chat
from hijacklens.facts.joining import Joining
from hijacklens.files import named_path
from hijacklens.models.naming import DTYPES
from hijacklens.prompts.schemes import Scheme, schemes
from hijacklens.renamed import with_new_names
from probes.specification import parse

T = TypeVar("T")
TASK_KEYS = ("bits", "omega", "beta", "length", "support")
EXAMPLES = {
    "models": 'models = ["smollm2-135m"]',
    "source": 'source = "gpt2", the name or folder of the model',
    "tasks": "[[training.tasks]] and bits = 5",
    "recipes": "[[training.recipes]] and d_model = 16",
}
"""Required key -> what to write."""
FORMS = {
    "model_type": "a table",
    "dict_type": "a table",
    "tuple_type": "a list",
    "too_short": "a list with at least one item",
    "string_type": "a text",
    "int_type": "a whole number",
    "greater_than": "a whole number of at least 1",
    "greater_than_equal": "a whole number of at least 0",
    "bool_type": "true or false",
    "literal_error": "auto, space or none",
}
"""Type of a pydantic error -> what to give."""


def _distinct(items: tuple[T, ...]) -> tuple[T, ...]:
    for i, item in enumerate(items):
        if item in items[:i]:
            raise InputError(f"{shown(item)} is listed twice; list it once.")
    return items


def _seeds(value: Any) -> Any:
    """Return the seeds of a count."""
    if isinstance(value, list):
        return value
    from hijacklens.one_layer.recipe import MOST_SEEDS

    return tuple(range(whole_number("seeds", value, least=1, most=MOST_SEEDS)))


def _doses(value: Any) -> tuple[int, ...]:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    try:
        return read_doses(text)
    except InputError as error:
        raise InputError(str(error).removeprefix("--")) from error


def _probe(text: str) -> str:
    if parse(text).needs_model:
        raise InputError(
            f"{text!r} needs the mean outputs of one model, which a sweep cannot compute. Use "
            "kind=zero, or run `hijacklens hijack`."
        )
    return text


def _rule(rule: str) -> str:
    from hijacklens.scoring.efficacy import RULES

    return choice("rule", rule, RULES)


def _source(value: Any) -> Any:
    """Return the table that a text abbreviates."""
    return {"source": value} if isinstance(value, str) else value


def _made(kind: Callable[..., T], required: str, keys: Iterable[str], table: dict[str, Any]) -> T:
    """Make a task or recipe from a table; the library checks the values."""
    for key in table:
        if key not in keys:
            raise unknown("key", key, keys)
    if required not in table:
        raise InputError(f"it lacks {required}.")
    try:
        return kind(**table)
    except TypeError as error:
        raise InputError(str(error)) from error


# Libraries of tables and tensors are imported for the keys that need them: mistakes answer at once.


def _task(table: dict[str, Any]) -> dict[str, Any]:
    from hijacklens.one_layer.task import ConceptTask

    return _made(ConceptTask, "bits", TASK_KEYS, table).configuration()


def _recipe(table: dict[str, Any]) -> dict[str, Any]:
    from hijacklens.one_layer.recipe import RENAMED, Recipe

    keys = [field.name for field in fields(Recipe)]
    return asdict(_made(Recipe, "d_model", keys, with_new_names(table, RENAMED)))


Several = Annotated[tuple[T, ...], Field(min_length=1, strict=False)]
Distinct = Annotated[Several[T], AfterValidator(_distinct)]


class Table(BaseModel):
    """A table of the file. Unknown keys are refused, and values are not converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    settings_of_all: ClassVar[tuple[str, ...]] = ()
    """Keys that set a default for the tables below this one."""

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, given: Any) -> Any:
        """Refuse an unknown key with the nearest name."""
        for key in given if isinstance(given, dict) else ():
            if key not in cls.model_fields:
                raise unknown("key", key, [*cls.model_fields, *cls.settings_of_all])
        return given


class FactsEntry(Table):
    """A set of facts, as the options of `hijacklens hijack` choose one."""

    source: str = "atlas"
    relations: Several[str] = ()
    cases: Several[NonNegativeInt] = ()
    limit: PositiveInt | None = None
    joining: Joining = "auto"
    opening: str = ""
    chat: Chat | None = None
    name: str = ""
    """The name in the table; by default the source."""


class ModelEntry(Table):
    """A model, as `hijacklens.load_model` takes it."""

    source: str
    dtype: Annotated[str, AfterValidator(lambda dtype: choice("dtype", dtype, DTYPES))] = "float32"
    device: str | None = None
    devices: PositiveInt = 1
    revision: str | None = None
    trust_remote_code: bool = False


class ScoringPlan(Table):
    """What is scored."""

    models: Distinct[Annotated[ModelEntry, BeforeValidator(_source)]]
    schemes: Distinct[str] = ("do-not-think",)
    templates: dict[str, str] = {}
    facts: Distinct[Annotated[FactsEntry, BeforeValidator(_source)]] = (FactsEntry(),)
    seeds: Annotated[Distinct[NonNegativeInt], BeforeValidator(_seeds)] = (0,)
    doses: Annotated[Several[int], BeforeValidator(_doses)] = (0, 1, 2, 3, 4, 5)
    probes: Annotated[tuple[Annotated[str, AfterValidator(_probe)], ...], Field(strict=False)] = ()
    rule: Annotated[str, AfterValidator(_rule)] = "first"
    """The scoring rule of the sweep's table; the result of each cell has all three."""
    batch_tokens: PositiveInt | None = None

    @model_validator(mode="after")
    def _schemes_exist(self) -> ScoringPlan:
        for name, text in self.templates.items():
            if name in schemes():
                raise InputError(f"templates: the scheme {name!r} exists; choose another name.")
            Scheme(name=name, template=text)
        allowed = [*schemes(), *self.templates]
        for name in self.schemes:
            if name not in allowed:
                raise unknown("scheme", name, allowed, "Write your own in [scoring.templates].")
        return self


class TrainingPlan(Table):
    """What to train: the arguments of `ConceptTask`, and the settings of `Recipe`."""

    tasks: Distinct[Annotated[dict[str, Any], AfterValidator(_task)]]
    recipes: Distinct[Annotated[dict[str, Any], AfterValidator(_recipe)]]
    settings_of_all = ("seeds", "learning_rates")

    @model_validator(mode="before")
    @classmethod
    def _shared_settings(cls, given: Any) -> Any:
        """Add the seeds and learning rates of [training] to each recipe."""
        if not isinstance(given, dict):
            return given
        shared = {key: given[key] for key in cls.settings_of_all if key in given}
        rest = {key: value for key, value in given.items() if key not in shared}
        if isinstance(rest.get("recipes"), list):
            rest["recipes"] = [
                {**shared, **table} if isinstance(table, dict) else table
                for table in rest["recipes"]
            ]
        return rest

    @model_validator(mode="after")
    def _fit_together(self) -> TrainingPlan:
        from hijacklens.one_layer.recipe import Recipe
        from hijacklens.one_layer.task import ConceptTask

        for recipe in self.recipes:
            for task in self.tasks:
                Recipe(**recipe).runs(ConceptTask.from_configuration(task))
        return self


class SweepPlan(Table):
    """A sweep, read and checked."""

    scoring: ScoringPlan | None = None
    training: TrainingPlan | None = None


def load_sweep(path: Path) -> SweepPlan:
    """Read the file of a sweep.

    Raises:
        InputError: The file cannot be read, is not TOML, or has an unknown key or a wrong value.
    """
    path = named_path(path, "sweep")
    try:
        if not path.is_file() and path.exists() and not path.is_dir():
            raise OSError("it is not a regular file")  # reading a pipe would wait forever
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"cannot read the sweep {str(path)!r}: {reason}. Name a TOML file, such as "
            "examples/sweep.toml."
        ) from error
    try:
        return read_sweep(text)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def read_sweep(text: str) -> SweepPlan:
    """Read the text of a sweep.

    Raises:
        InputError: The text is not TOML, is empty, or has an unknown key or a wrong value; the
            message names the key and what is allowed.
    """
    toml: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        tables = toml.loads(text)
    except toml.TOMLDecodeError as error:
        raise InputError(f"this is not TOML: {error}.") from error
    if not tables:
        raise InputError("the sweep is empty; it needs a table [scoring] or [training].")
    try:
        return SweepPlan.model_validate(tables)
    except ValidationError as error:
        raise _refusal(error.errors()[0]) from error


def _refusal(error: Mapping[str, Any]) -> InputError:
    """Return the error of this package for one of pydantic's."""
    *tables, last = error["loc"] or ("",)
    if error["type"] == "missing":
        return InputError(f"{_path(tables)} lacks {last}; write {EXAMPLES[last]}.")
    path = _path(error["loc"])
    if error["type"] == "value_error":
        return InputError(f"{path}: {error['ctx']['error']}".removeprefix(": "))
    form = FORMS.get(error["type"])
    advice = f"give {form}" if form else error["msg"]
    return InputError(f"{path} is {shown(error['input'])}; {advice}.")


def _path(location: Iterable[str | int]) -> str:
    """Write the path of a key in the file, such as `scoring.models[0].dtype`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return "".join(parts).removeprefix(".")
