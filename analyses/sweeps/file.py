r"""The file of a sweep: TOML, checked key by key before anything runs.

    [scoring]     models x schemes x facts x seeds
    [training]    tasks x recipes, each recipe with all its seeds and learning rates

>>> plan = read_sweep('[scoring]\nmodels = ["gpt2"]\nseeds = [0, 1]\ndoses = "0-2"')
>>> plan.scoring.seeds, plan.scoring.schemes, plan.scoring.doses, plan.training
((0, 1), ('do-not-think',), (0, 1, 2), None)
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analyses.texts import read_doses
from hijacklens.errors import InputError, unknown
from hijacklens.files import named_path
from hijacklens.renamed import with_new_names

TASK_KEYS = ("bits", "omega", "beta", "length", "support")


@dataclass(frozen=True, slots=True, kw_only=True)
class FactsEntry:
    """A set of facts, as the options of `hijacklens hijack` choose one."""

    source: str = "atlas"
    relations: tuple[str, ...] = ()
    cases: tuple[int, ...] = ()
    limit: int | None = None
    name: str = ""
    """What the table calls it; by default its source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """A model, as `hijacklens.load_model` takes it."""

    source: str
    dtype: str = "float32"
    device: str | None = None
    devices: int = 1
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringPlan:
    """What is scored."""

    models: tuple[ModelEntry, ...]
    schemes: tuple[str, ...] = ("do-not-think",)
    templates: Mapping[str, str] = field(default_factory=dict)
    facts: tuple[FactsEntry, ...] = (FactsEntry(),)
    seeds: tuple[int, ...] = (0,)
    doses: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    probes: tuple[str, ...] = ()
    rule: str = "first"
    """The rule of the table; the results of the cells hold all three."""
    batch_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """What is trained: the arguments of `ConceptTask`, and those of `hijacklens.train`."""

    tasks: tuple[Mapping[str, Any], ...]
    recipes: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """A sweep as it was written, read and checked."""

    scoring: ScoringPlan | None = None
    training: TrainingPlan | None = None


def load_sweep(path: Path) -> SweepPlan:
    """Read the file of a sweep.

    Raises:
        InputError: It is not there, is no TOML, or says something that cannot be done.
    """
    path = named_path(path, "sweep")
    try:
        if not path.is_file() and path.exists() and not path.is_dir():
            raise OSError("it is no file")  # a pipe would be waited for
        text = path.read_text(encoding="utf-8")
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
        InputError: It is no TOML, has an unknown key or a value that does not fit, or asks for
            nothing; the message names the key and what is allowed.
    """
    toml: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        given = toml.loads(text)
    except toml.TOMLDecodeError as error:
        raise InputError(f"this is no TOML: {error}.") from error
    _known(given, ("scoring", "training"), "the file")
    if not given:
        raise InputError("it asks for nothing; it needs a table [scoring] or [training].")
    tables = {name: _table(value, f"[{name}]") for name, value in given.items()}
    return SweepPlan(
        scoring=_scoring(tables["scoring"]) if "scoring" in tables else None,
        training=_training(tables["training"]) if "training" in tables else None,
    )


def _scoring(given: Mapping[str, Any]) -> ScoringPlan:
    from hijacklens.prompts.schemes import Scheme, schemes
    from hijacklens.scoring.efficacy import RULES
    from probes.specification import parse

    where = "[scoring]"
    _known(given, [f.name for f in dataclasses.fields(ScoringPlan)], where)
    found: dict[str, Any] = {}
    if "models" not in given:
        raise InputError(f'{where} lacks models; write models = ["smollm2-135m"].')
    found["models"] = _distinct(
        [_model(item) for item in _items(given["models"], f"{where} models")], f"{where} models"
    )
    if "templates" in given:
        templates = _table(given["templates"], "[scoring.templates]")
        for name, text in templates.items():
            if name in schemes():
                raise InputError(f"[scoring.templates] {name}: this scheme exists; rename yours.")
            Scheme(name=name, template=_of(str, text, f"[scoring.templates] {name}", "a text"))
        found["templates"] = dict(templates)
    if "schemes" in given:
        names = _distinct(_texts(given["schemes"], f"{where} schemes"), f"{where} schemes")
        allowed = [*schemes(), *found.get("templates", {})]
        for name in names:
            if name not in allowed:
                raise unknown("scheme", name, allowed, "Your own stand in [scoring.templates].")
        found["schemes"] = names
    if "facts" in given:
        entries = [_facts(item) for item in _items(given["facts"], f"{where} facts")]
        found["facts"] = _distinct(entries, f"{where} facts")
    if "seeds" in given:
        found["seeds"] = _seeds(given["seeds"], where)
    if "doses" in given:
        found["doses"] = _doses(given["doses"])
    if "probes" in given:
        found["probes"] = _texts(given["probes"], f"{where} probes", empty=True)
        for probe in found["probes"]:
            if parse(probe).needs_model:
                raise InputError(
                    f"{where} probes: {probe!r} is made for one model from its own outputs, which "
                    "a sweep cannot do. Take kind=zero, or `hijacklens hijack`."
                )
    if "rule" in given:
        found["rule"] = _of(str, given["rule"], f"{where} rule", "a text")
        if found["rule"] not in RULES:
            raise unknown("rule", found["rule"], RULES)
    if "batch_tokens" in given:
        found["batch_tokens"] = _whole(given["batch_tokens"], f"{where} batch_tokens", 1)
    return ScoringPlan(**found)


def _model(given: Any) -> ModelEntry:
    from hijacklens.models.loading import DTYPES

    where = "[scoring] models"
    if isinstance(given, str):
        return ModelEntry(source=given)
    table = _table(given, where, "a name, or a table such as { source = 'gpt2', dtype = ... }")
    _known(table, [f.name for f in dataclasses.fields(ModelEntry)], where)
    if "source" not in table:
        raise InputError(f"{where}: {dict(table)} lacks source, the model's name or folder.")
    for key, value in table.items():
        if key == "devices":
            _whole(value, f"{where} devices", 1)
        else:
            kind = bool if key == "trust_remote_code" else str
            _of(kind, value, f"{where} {key}", "true or false" if kind is bool else "a text")
    if table.get("dtype", "float32") not in DTYPES:
        raise unknown("dtype", table["dtype"], DTYPES)
    return ModelEntry(**table)


def _facts(given: Any) -> FactsEntry:
    where = "[scoring] facts"
    if isinstance(given, str):
        return FactsEntry(source=given)
    table = dict(_table(given, where, "a source, or a table such as { source = 'atlas' }"))
    _known(table, [f.name for f in dataclasses.fields(FactsEntry)], where)
    for key, value in table.items():
        if key == "relations":
            table[key] = _texts(value, f"{where} relations")
        elif key == "cases":
            cases = _items(value, f"{where} cases")
            table[key] = tuple(_whole(case, f"{where} cases") for case in cases)
        elif key == "limit":
            _whole(value, f"{where} limit", 1)
        else:
            _of(str, value, f"{where} {key}", "a text")
    return FactsEntry(**table)


def _training(given: Mapping[str, Any]) -> TrainingPlan:
    from hijacklens.one_layer.recipe import RENAMED, Recipe
    from hijacklens.one_layer.task import ConceptTask

    where = "[training]"
    _known(given, ("tasks", "recipes", "seeds", "learning_rates"), where)
    shared = {key: given[key] for key in ("seeds", "learning_rates") if key in given}
    lists: dict[str, list[Mapping[str, Any]]] = {}
    for name, example in (("tasks", "bits = 5"), ("recipes", "d_model = 16")):
        if name not in given:
            raise InputError(f"{where} lacks {name}; write [[training.{name}]] and {example}.")
        there = f"[[training.{name}]]"
        lists[name] = [_table(item, there) for item in _items(given[name], there)]
    keys = [f.name for f in dataclasses.fields(Recipe)]
    tasks, recipes = [], []
    for table in lists["tasks"]:
        _known(table, TASK_KEYS, "[[training.tasks]]")
        tasks.append(_made(ConceptTask, table, "[[training.tasks]]", "bits").configuration())
    for table in lists["recipes"]:
        table = with_new_names(table, RENAMED)
        _known(table, keys, "[[training.recipes]]")
        chosen = {**shared, **table}
        chosen["seeds"] = _seeds(chosen.get("seeds", 5), "[training]")
        for name in ("learning_rates", "freeze"):
            if name in chosen:
                chosen[name] = tuple(_items(chosen[name], f"[[training.recipes]] {name}"))
        recipe = _made(Recipe, chosen, "[[training.recipes]]", "d_model")
        for task in tasks:
            recipe.runs(ConceptTask.from_configuration(task))  # what does not go together shows
        recipes.append(dataclasses.asdict(recipe))
    return TrainingPlan(
        tasks=_distinct(tasks, f"{where} tasks"), recipes=_distinct(recipes, f"{where} recipes")
    )


def _made(kind: Callable[..., Any], given: Mapping[str, Any], where: str, needed: str) -> Any:
    if needed not in given:
        raise InputError(f"{where} lacks {needed}.")
    try:
        return kind(**given)
    except (InputError, TypeError) as error:
        raise InputError(f"{where}: {error}") from error


def _known(given: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    for key in given:
        if key not in allowed:
            raise unknown(f"key in {where}", key, allowed)


def _table(value: Any, where: str, form: str = "a table") -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where} is {value!r}; give {form}.")
    return value


def _items(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where} is {value!r}; give a list with at least one item.")
    return value


def _of(kind: type, value: Any, where: str, form: str) -> Any:
    if not isinstance(value, kind):
        raise InputError(f"{where} is {value!r}; give {form}.")
    return value


def _texts(value: Any, where: str, *, empty: bool = False) -> tuple[str, ...]:
    if empty and value == []:
        return ()
    return tuple(_of(str, item, where, "texts") for item in _items(value, where))


def _whole(value: Any, where: str, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{where} is {value!r}; give a whole number of at least {least}.")
    return value


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    """A number of seeds, or a list of them."""
    if isinstance(value, (list, tuple)) and value:
        seeds = tuple(_whole(seed, f"{where} seeds") for seed in value)
        return _distinct(seeds, f"{where} seeds")
    return tuple(range(_whole(value, f"{where} seeds", 1)))


def _doses(value: Any) -> tuple[int, ...]:
    if isinstance(value, list):
        value = ",".join(map(str, value))
    try:
        return read_doses(str(value))
    except InputError as error:
        raise InputError(str(error).replace("--doses", "[scoring] doses", 1)) from error


def _distinct(items: Sequence[Any], where: str) -> tuple[Any, ...]:
    for i, item in enumerate(items):
        if item in items[:i]:
            raise InputError(f"{where}: {item!r} stands there twice; give it once.")
    return tuple(items)
