"""Options declared by the types of a command's arguments.

An argument `limit: Annotated[int | None, option("How many.")] = None` becomes the option --limit.
A dataclass with such fields becomes one option per field, and the command receives one record.

>>> @click.command()
... @declared()
... def count(*, limit: Annotated[int, option("How many facts.")] = 3) -> None:
...     click.echo(f"{limit} facts")
>>> count.main(["--limit", "5"], standalone_mode=False)
5 facts
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from functools import wraps
from pathlib import Path
from string import Template
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import click

from hijacklens.errors import InputError, choice, whole_number


class Declaration(NamedTuple):
    """What the type of an argument does not say about its option or positional argument."""

    make: Callable[..., Any]
    flags: tuple[str, ...]
    settings: dict[str, Any]


def option(help: str, *flags: str, **settings: Any) -> Declaration:
    """Declare an option with its default in the help.

    Args:
        help: Its help; `$keys` and `$label` are replaced by the arguments of `declared`.
        flags: Its names; by default the name of the argument.
        settings: More settings of `click.option`.
    """
    return Declaration(click.option, flags, {"help": help, "show_default": True, **settings})


def argument(**settings: Any) -> Declaration:
    """Declare a positional argument, with the settings of `click.argument`."""
    return Declaration(click.argument, (), settings)


class RenamedOption(click.Option):
    """An option whose old name works for one release; `group` prints a note when it is used."""

    def __init__(self, *arguments: Any, formerly: str, **settings: Any) -> None:
        """Take the arguments of `click.Option` and the old name, such as `--way`."""
        super().__init__(*arguments, **settings)
        self.formerly = formerly


def declared(*keys: str, label: str = "") -> Callable[[Any], Any]:
    """Return a decorator that gives a command the options which its signature declares.

    An argument whose type is a dataclass takes a record; `Annotated[Record, ("a", "b")]` offers
    only these options, and the other fields keep their defaults.

    Args:
        keys: The keys of the document of --json, for its help.
        label: What the default folder is called, after the date, for the help of --out.
    """
    texts = {"keys": ", ".join(sorted(keys)), "label": label}

    def decorate(command: Any) -> Any:
        records: dict[str, tuple[Any, list[str]]] = {}
        options: list[Callable[[Any], Any]] = []
        for name, kind, default in _parameters(command):
            base, *more = get_args(kind) if get_origin(kind) is Annotated else (kind,)
            if not is_dataclass(base):
                options.append(_made(name, kind, default, texts))
                continue
            offered = [one for one in _parameters(base) if not more or one[0] in more[0]]
            records[name] = base, [one[0] for one in offered]
            options += [_made(*one, texts) for one in offered]

        @wraps(command)
        def call(**values: Any) -> Any:
            for name, (record, offered) in records.items():
                values[name] = record(**{key: values.pop(key) for key in offered})
            return command(**values)

        for add in reversed(options):
            add(call)
        return call

    return decorate


def _parameters(function: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name, the type and the default of each parameter, or of each field of a record."""
    # The fields that a record inherits are annotated in the module of their own class.
    record = isinstance(function, type)
    fields = get_type_hints(function, include_extras=True) if record else {}
    for parameter in inspect.signature(function, eval_str=not fields).parameters.values():
        kind = fields.get(parameter.name, parameter.annotation)
        yield parameter.name, kind, parameter.default


def _made(name: str, kind: Any, default: Any, texts: dict[str, str]) -> Callable[[Any], Any]:
    """Return the decorator of click that adds the option of a parameter."""
    base, (make, flags, settings) = get_args(kind)
    derived = _settings_of(base)
    if make is click.argument:
        if derived.pop("multiple", False):
            derived["nargs"] = -1
    else:
        settings = {**settings, "help": Template(settings["help"]).safe_substitute(texts)}
        flags = (*(flags or (f"--{name.replace('_', '-')}",)), name)
        if default is inspect.Parameter.empty:
            derived["required"] = True
        elif default not in (None, ()):
            derived["default"] = default
    return make(*(flags or (name,)), **{**derived, **settings})


def given() -> dict[str, str]:
    """Return what the command line has: the name of each parameter -> its option."""
    context, default = click.get_current_context(), click.core.ParameterSource.DEFAULT
    return {
        str(option.name): option.opts[0]
        for option in context.command.params
        if context.get_parameter_source(str(option.name)) is not default
    }


class FilePath(click.Path):
    """A path; an empty one, as of an unset variable of the shell, would mean this folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse an empty path."""
        if value == "" and param is not None:
            raise InputError(f"{param.opts[0]} is empty; name a path, or leave the option out.")
        return super().convert(value, param, ctx)


class OneOf(click.Choice):
    """One of several names; another one is refused with the nearest."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Refuse a name that is not allowed."""
        return choice(param.opts[0] if param else "name", value, self.choices)


class Whole(click.ParamType):
    """A whole number of at least `least`."""

    name = "integer"

    def __init__(self, least: int) -> None:
        """Take the smallest number that is allowed."""
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Refuse a text that is no whole number, or a number that is too small."""
        number = click.INT.convert(value, param, ctx)
        return whole_number(param.opts[0] if param else self.name, number, least=self.least)


def _settings_of(kind: Any) -> dict[str, Any]:
    """Return the settings of click for values of a type."""
    inner = [part for part in get_args(kind) if part is not NoneType]
    if kind is bool:
        return {"is_flag": True}
    if kind is Path:
        return {"type": FilePath(path_type=Path)}
    if get_origin(kind) is Literal:
        return {"type": OneOf(inner)}
    if get_origin(kind) in (tuple, list):
        return {**_settings_of(inner[0]), "multiple": True}
    return _settings_of(inner[0]) if inner else {"type": None if kind is Any else kind}
