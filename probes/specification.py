"""Probes written as text, as the command line takes them: a kind, a colon, options.

    knock-out:source=last,target=hijack,layers=8-11
    rescale:factor=2,source=last,target=subject,heads=8.3+9.1
    redirect:source=last,target=text:Eiffel Tower, Paris
    low-rank-value:rank=4,layers=3
    ablate:heads=8.3+9.1,kind=mean

The options are the arguments of the Python function, with `-` for `_`. `+` joins the items of a
list, `8-11` is a range with both ends, and `8.3` is layer 8, head 3. A value can be quoted as in
JSON; a text that contains something like `,layers=` must be quoted. `hijacklens probes` lists the
kinds with their options.

The key of a probe is its text: `parse(probe.key).probe().key == probe.key`. The exceptions are
probes whose keys hold a hash or a name, since no text can carry their tensors or functions: mean
ablations, `attention.transplant`, `activations.patch`, `HookProbe`, and replacements of
matrices other than the kinds here.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hijacklens.errors import InputError, choice, number, one_of_type, unknown, warn, whole_number
from hijacklens.prompts.spans import FORMS, atoms
from probes.checks import check_factor, check_heads, check_when

if TYPE_CHECKING:  # the names of the kinds, which shells complete, need no torch
    from hijacklens.facts.fact import FactSet
    from hijacklens.models.hooked import HookedModel
    from hijacklens.probe import Probe

SEE = "`hijacklens probes` lists the kinds with their options."
OLD_KINDS = {"patch": "redirect"}
OLD_OPTIONS = {"from": "source", "to": "target", "share": "split"}
_PART = re.compile(
    r"""(?:
        to=(?:[^,"]*\+)?text:.*                         # in old texts it takes the rest
        | [a-z_-]+="(?:[^"\\]|\\.)*"(?=,|\Z)            # quoted
        | .*?
    ) (?:,(?=[a-z][a-z_-]*=)|\Z)""",
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a kind of probe."""

    name: str
    read: Callable[[str], Any]
    """From the text of the option to its value; raises ValueError if the text cannot be read."""
    form: str
    """The allowed values, in words."""
    default: str | None
    """The default, in words; None if the option is required."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of probe that can be written as text."""

    name: str
    summary: str
    function: str
    """The function in `probes` whose arguments are the options; one that makes a replacement of
    matrices also has those of `values.replace`."""
    example: str
    arguments: str
    """The arguments of the function that a text can carry, each with its default if it has one."""

    @property
    def options(self) -> tuple[Option, ...]:
        """The options; a test compares them with the signature of the function."""
        made = self.function.startswith("values.")
        words = (self.arguments + (VALUE_ARGUMENTS if made else "")).split()
        return tuple(_option(*word.partition("=")[::2], of_values=made) for word in words)

    def make(self, options: Mapping[str, Any]) -> Probe:
        """Return the probe with these options, named as in Python."""
        from probes import values

        function = _function(self.function)
        if not self.function.startswith("values."):
            return function(**options)
        rest = dict(options)
        names = inspect.signature(function).parameters.keys() & rest.keys()
        replacement = function(**{name: rest.pop(name) for name in names})
        replace = values.replace_circuit if rest.pop("of", "") == "circuit" else values.replace
        return replace(replacement, **rest)


KINDS: Mapping[str, Kind] = {
    name: Kind(name, *row)
    for name, row in {
        "knock-out": (
            "Remove attention from some tokens to others.",
            "attention.knock_out",
            "knock-out:source=last,target=hijack,layers=8-11",
            "source target layers=all heads=all when=before renormalise=yes",
        ),
        "rescale": (
            "Multiply attention weights (after the softmax) or scores (before it).",
            "attention.rescale",
            "rescale:factor=2,source=last,target=subject,heads=8.3+9.1",
            "factor source target layers=all heads=all when=after renormalise=yes",
        ),
        "redirect": (
            "Move all attention of some tokens onto others.",
            "attention.redirect",
            "redirect:source=last,target=subject,layers=8-11",
            "source target split=uniform layers=all heads=all",
        ),
        "zero-value": ("Replace W_V by zero.", "values.zero", "zero-value:layers=3,heads=0", ""),
        "identity-value": (
            "Replace W_V by ones on the diagonal.",
            "values.identity",
            "identity-value:layers=3",
            "",
        ),
        "low-rank-value": (
            "Replace W_V by its best approximation of a rank.",
            "values.low_rank",
            "low-rank-value:rank=4",
            "rank",
        ),
        "scale-value": (
            "Multiply W_V.",
            "values.scaled",
            "scale-value:factor=0.5,layers=8-11",
            "factor",
        ),
        "random-value": (
            "Replace W_V by a random matrix of its norm.",
            "values.random",
            "random-value:seed=0,layers=3",
            "seed",
        ),
        "ablate": (
            "Replace outputs of heads, attention layers or MLPs by zero or their mean.",
            "ablation.ablate",
            "ablate:heads=8.3+9.1,kind=mean",
            "heads=all layers=all site=z kind=zero span=all",
        ),
    }.items()
}
"""Kinds of probes by name."""


@dataclass(frozen=True, slots=True)
class Specification:
    """A probe as text, read and checked."""

    text: str
    kind: Kind
    options: Mapping[str, Any] = field(default_factory=dict)
    """Values of the options, named as in Python."""

    @property
    def needs_model(self) -> bool:
        """Whether the probe needs one model, since it contains means of the model's outputs."""
        return self.options.get("kind") == "mean"

    def probe(
        self,
        *,
        model: HookedModel | None = None,
        facts: FactSet | None = None,
        quiet: bool = False,
    ) -> Probe:
        """Make the probe; if `needs_model`, for this model with means over the facts' bare queries.

        Raises:
            InputError: The values of the options contradict each other.
        """
        options = dict(self.options)
        try:
            if self.needs_model:
                from probes.ablation import mean_outputs

                if model is None or facts is None:
                    raise InputError(
                        "kind=mean takes the means of a model's outputs on facts; give both, or "
                        "kind=zero."
                    )
                where = {name: options[name] for name in ("site", "span") if name in options}
                options["means"] = mean_outputs(model, facts, quiet=quiet, **where)
            return self.kind.make(options)
        except InputError as error:
            raise InputError(f"--probe {self.text!r}: {error}") from error


def parse(text: str) -> Specification:
    """Read a probe that is written as text.

    Raises:
        InputError: A kind or option is unknown, an option is missing or given twice, or a value
            cannot be read.

    Warns:
        FutureWarning: The text has the old name of a kind or option.
    """
    one_of_type("a probe as text", text, str, "'knock-out:source=last,target=hijack'")
    typed, _, rest = text.partition(":")
    name = OLD_KINDS.get(typed, typed)
    old_names = {typed: name} if name != typed else {}
    if name not in KINDS:
        raise unknown("kind of probe", name, KINDS, f"Write kind:option=value,... {SEE}")
    kind = KINDS[name]
    allowed = {option.name: option for option in kind.options}
    values: dict[str, Any] = {}
    for part in _parts(rest):
        key, equals, value = part.partition("=")
        if not equals:
            raise InputError(
                f"--probe {text!r}: {part!r} is not an option; write option=value, with the "
                f"options {', '.join(allowed)}. Items of a list are joined by +."
            )
        option = key.replace("_", "-")
        if OLD_OPTIONS.get(option) in allowed:
            option = old_names[key] = OLD_OPTIONS[option]
        if option not in allowed:
            raise unknown(f"option of {name}", key, allowed, SEE)
        if option in values:
            raise InputError(f"--probe {text!r}: {key} is given twice; give it once.")
        try:
            plain = json.loads(value) if value.startswith('"') else value
            values[option] = allowed[option].read(plain)
        except ValueError as error:
            raise InputError(
                f"--probe {text!r}: {key}={value} cannot be read; allowed: {allowed[option].form}."
            ) from error
    for option in kind.options:
        if option.default is None and option.name not in values:
            raise InputError(
                f"--probe {text!r} lacks {option.name} ({option.form}); for example {kind.example}"
            )
    if old_names:
        new = ", ".join(f"{old} is now called {new}" for old, new in old_names.items())
        note = f"--probe {text!r}: {new}; the next release drops the old name."
        warn(note, FutureWarning)
    values = {option.replace("-", "_"): value for option, value in values.items()}
    try:  # refuse options that contradict each other, without the imports that a probe needs
        given: dict[str, Any] = {name: one.default for name, one in allowed.items()} | values
        check_when(given.get("when", "after"), values.get("renormalise", True))
        check_factor(given.get("factor", 1), given.get("when"))
        check_heads(given.get("site", "z"), values.get("heads"))
    except InputError as error:
        raise InputError(f"--probe {text!r}: {error}") from error
    return Specification(text, kind, values)


def _parts(rest: str) -> Iterator[str]:
    start = 0
    while start < len(rest):
        match = _PART.match(rest, start)
        assert match is not None
        start = match.end()
        yield match[0] if start == len(rest) else match[0].removesuffix(",")


def _function(name: str) -> Callable[..., Any]:
    from probes import ablation, attention, values

    modules = {"ablation": ablation, "attention": attention, "values": values}
    module, _, function = name.partition(".")
    return getattr(modules[module], function)


NUMBERS = "a number, a range 8-11, or several joined by +"


def _numbers(text: str) -> tuple[int, ...]:
    numbers: list[int] = []
    for item in text.split("+"):
        first, last = _two(item if "-" in item else f"{item}-{item}", "-")
        if last < first:
            raise ValueError(item)
        numbers.extend(range(first, last + 1))
    return tuple(numbers)


def _heads(text: str) -> list[int] | tuple[tuple[int, int], ...]:
    if "." in text:
        return tuple(_two(item, ".") for item in text.split("+"))
    return list(_numbers(text))


def _two(text: str, mark: str) -> tuple[int, int]:
    match = re.fullmatch(rf"(\d{{1,4}})\{mark}(\d{{1,4}})", text)
    if match is None:
        raise ValueError(text)
    return int(match[1]), int(match[2])


# An InputError is a ValueError, which `parse` reports with the allowed forms.


def _count(least: int) -> Callable[[str], int]:
    return lambda text: whole_number("option", int(text), least=least)


def _span(text: str) -> str:
    atoms(text)
    return text


def _choice(*names: str) -> Callable[[str], str]:
    return lambda text: choice("option", text, names)


def _finite(text: str) -> float:
    return number("option", float(text))


def _yes(text: str) -> bool:
    return choice("option", text, ("yes", "no")) == "yes"


HEADS = f"{NUMBERS}; or layer.head pairs: 8.3+9.1"
VALUE_ARGUMENTS = " layers=all heads=all keep-bias=yes of=value"
"""The arguments of `values.replace`."""
READERS: Mapping[str, tuple[Callable[[str], Any], str]] = {
    **dict.fromkeys(("source", "target", "span"), (_span, FORMS)),
    "layers": (_numbers, NUMBERS),
    "heads": (_heads, f"query heads: {HEADS}"),
    "factor": (_finite, "a number"),
    "rank": (_count(1), "a whole number from 1"),
    "seed": (_count(0), "a whole number"),
    "renormalise": (_yes, "yes or no; no needs when=after"),
    "keep-bias": (_yes, "yes or no: whether b_V stays"),
    "when": (_choice("before", "after"), "before or after (the softmax)"),
    "split": (
        _choice("uniform", "proportional"),
        "uniform or proportional (to what the model gives there)",
    ),
    "of": (_choice("value", "circuit"), "value (W_V) or circuit (W_V W_O)"),
    "site": (_choice("z", "attn_out", "mlp_out"), "z, attn_out or mlp_out (z: heads)"),
    "kind": (
        _choice("zero", "mean"),
        "zero or mean (mean: over the bare queries of the facts)",
    ),
}
"""Option -> how its text is read, and the allowed values in words."""


def _option(name: str, default: str, *, of_values: bool) -> Option:
    read, form = READERS[name]
    if name == "heads" and of_values:
        form = f"key/value heads, or query heads with of=circuit: {HEADS}"
    return Option(name, read, form, default or None)
