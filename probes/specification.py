"""Probes written as text, as the command line takes them: a kind, a colon, options.

    knock-out:layers=8-11,from=last,to=hijack
    rescale:factor=2,heads=8.3+9.1,from=last,to=subject
    patch:from=last,to=text:Eiffel Tower, Paris
    low-rank-value:rank=4,layers=3
    ablate:heads=8.3+9.1,kind=mean

`+` joins the items of a list, `8-11` is a range with both ends, and `8.3` is layer 8, head 3. A
text in a span may hold commas; in `to=` it takes the rest of the line, so `to` comes last.
`hijacklens probes` lists the kinds with their options.

>>> parse("knock-out:layers=8-11,from=last,to=hijack").probe().key
'knock-out:layers=8-11,from=last,to=hijack'
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hijacklens.errors import InputError, one_of_type, unknown
from hijacklens.prompts.spans import FORMS, TEXT, atoms

if TYPE_CHECKING:  # naming kinds of probes, as completion does, imports no torch
    from hijacklens.facts.fact import FactSet
    from hijacklens.models.hooked import HookedModel
    from hijacklens.probe import Probe

SEE = "`hijacklens probes` lists the kinds with their options."


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a kind of probe."""

    name: str
    read: Callable[[str], Any]
    """From its text to its value; raises ValueError where it cannot be read."""
    form: str
    """What is allowed, in words."""
    default: str | None
    """What holds where it is left out, in words; None if it has to be given."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of probe that can be written as text."""

    name: str
    summary: str
    make: Callable[..., Probe]
    """From the options given, under their own names with `_` for `-`, to the probe."""
    options: tuple[Option, ...]
    example: str


@dataclass(frozen=True, slots=True)
class Specification:
    """A probe as it was written, read and checked."""

    text: str
    kind: Kind
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs_model(self) -> bool:
        """Whether the probe is made for one model: means are those of its own outputs."""
        return self.options.get("kind") == "mean"

    def probe(
        self,
        *,
        model: HookedModel | None = None,
        facts: FactSet | None = None,
        quiet: bool = False,
    ) -> Probe:
        """The probe.

        Args:
            model: The model that it is for, if `needs_model`.
            facts: Means are over their bare queries.
            quiet: Draw no progress bar while means are taken.

        Raises:
            InputError: The values of the options do not go together.
        """
        given = {name.replace("-", "_"): value for name, value in self.options.items()}
        if self.needs_model:
            given |= {"model": model, "facts": facts, "quiet": quiet}
        try:
            return self.kind.make(**given)
        except InputError as error:
            raise InputError(f"--probe {self.text!r}: {error}") from error


def parse(text: str) -> Specification:
    """Read a probe that is written as text.

    Raises:
        InputError: An unknown kind or option, one that is missing or given twice, or a value
            that cannot be read; the message says what is allowed.
    """
    one_of_type("a probe as text", text, str, "'knock-out:from=last,to=hijack'")
    name, _, rest = text.partition(":")
    if name not in KINDS:
        raise unknown("kind of probe", name, KINDS, f"Write kind:option=value,... {SEE}")
    kind = KINDS[name]
    allowed = {option.name: option for option in kind.options}
    values: dict[str, Any] = {}
    for part in _parts(rest):
        key, equals, value = part.partition("=")
        if not equals:
            raise InputError(
                f"--probe {text!r}: {part!r} is no option; write option=value, with the options "
                f"{', '.join(allowed)}. Items of a list are joined by +."
            )
        if key not in allowed:
            raise unknown(f"option of {name}", key, allowed, SEE)
        if key in values:
            raise InputError(f"--probe {text!r}: {key} is given twice; give it once.")
        try:
            values[key] = allowed[key].read(value)
        except ValueError as error:
            raise InputError(
                f"--probe {text!r}: {key}={value} cannot be read; allowed: {allowed[key].form}."
            ) from error
    for option in kind.options:
        if option.default is None and option.name not in values:
            raise InputError(
                f"--probe {text!r} lacks {option.name} ({option.form}); for example {kind.example}"
            )
    found = Specification(text, kind, values)
    if not found.needs_model:
        found.probe()  # so that options that do not go together show before a model is loaded
    return found


def _parts(rest: str) -> list[str]:
    """The options; behind `to=text:` nothing is taken apart."""
    if not rest:
        return []
    parts = re.split(r",(?=[a-z][a-z-]*=)", rest)
    for i, part in enumerate(parts):
        if part.startswith("to=") and f"+{TEXT}" in part.replace("=", "+", 1):
            return [*parts[:i], ",".join(parts[i:])]
    return parts


def _numbers(text: str) -> tuple[int, ...]:
    found: list[int] = []
    for item in text.split("+"):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", item)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(item)
        found.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(dict.fromkeys(found))


def _heads(text: str) -> tuple[int, ...] | tuple[tuple[int, int], ...]:
    if "." not in text:
        return _numbers(text)
    pairs = []
    for item in text.split("+"):
        match = re.fullmatch(r"(\d{1,4})\.(\d{1,4})", item)
        if match is None:
            raise ValueError(item)
        pairs.append((int(match[1]), int(match[2])))
    return tuple(dict.fromkeys(pairs))


def _span(text: str) -> str:
    atoms(text)  # an InputError is a ValueError, so it is reported with what is allowed
    return text


def _choice(*names: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in names:
            raise ValueError(text)
        return text

    return read


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _yes(text: str) -> bool:
    return _choice("yes", "no")(text) == "yes"


def _attention(name: str) -> Callable[..., Probe]:
    def make(**options: Any) -> Probe:
        from probes import attention

        source, target = options.pop("from"), options.pop("to")
        return getattr(attention, name)(source=source, target=target, **options)

    return make


def _value(name: str) -> Callable[..., Probe]:
    def make(*, layers: Any = None, heads: Any = None, of: str = "value", **options: Any) -> Probe:
        from probes import values

        bias = {"keep_bias": options.pop("keep_bias")} if "keep_bias" in options else {}
        put = values.replace if of == "value" else values.replace_circuit
        return put(getattr(values, name)(**options), layers=layers, heads=heads, **bias)

    return make


def _ablation(
    *,
    model: HookedModel | None = None,
    facts: FactSet | None = None,
    quiet: bool = False,
    **options: Any,
) -> Probe:
    from probes import ablation

    if options.get("kind") == "mean":
        if model is None or facts is None:
            raise InputError(
                "kind=mean takes the means of a model's outputs on facts; give both, or kind=zero."
            )
        about = {name: options[name] for name in ("site", "span") if name in options}
        options["means"] = ablation.mean_outputs(model, facts, quiet=quiet, **about)
    return ablation.ablate(**options)


_NUMBERS = "a number, a range 8-11, or several joined by +"
_LAYERS = Option("layers", _numbers, _NUMBERS, "all")
_HEADS = Option("heads", _heads, f"query heads: {_NUMBERS}; or layer.head pairs: 8.3+9.1", "all")
_EDGES = (
    Option("from", _span, FORMS, None),
    Option("to", _span, FORMS, None),
)
_RENORMALISE = Option("renormalise", _yes, "yes or no; no goes with when=after", "yes")
_SIDES = "before or after (the softmax)"
_VALUES = (
    _LAYERS,
    Option(
        "heads",
        _heads,
        f"key/value heads, or query heads with of=circuit: {_NUMBERS}; or layer.head pairs",
        "all",
    ),
    Option("of", _choice("value", "circuit"), "value (W_V) or circuit (W_V W_O)", "value"),
    Option("keep-bias", _yes, "yes or no: whether b_V stays", "yes"),
)
_FACTOR = Option("factor", _finite, "a number", None)

KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "knock-out",
            "Take away attention from some tokens to others.",
            _attention("knock_out"),
            (
                _LAYERS,
                _HEADS,
                Option("when", _choice("before", "after"), _SIDES, "before"),
                _RENORMALISE,
                *_EDGES,
            ),
            "knock-out:layers=8-11,from=last,to=hijack",
        ),
        Kind(
            "rescale",
            "Multiply attention weights (after the softmax) or scores (before it).",
            _attention("rescale"),
            (
                _FACTOR,
                _LAYERS,
                _HEADS,
                Option("when", _choice("before", "after"), _SIDES, "after"),
                _RENORMALISE,
                *_EDGES,
            ),
            "rescale:factor=2,heads=8.3+9.1,from=last,to=subject",
        ),
        Kind(
            "patch",
            "Put all attention of some tokens on others.",
            _attention("patch"),
            (
                _LAYERS,
                _HEADS,
                Option(
                    "share",
                    _choice("uniform", "proportional"),
                    "uniform or proportional (to what the model gives there)",
                    "uniform",
                ),
                *_EDGES,
            ),
            "patch:layers=8-11,from=last,to=subject",
        ),
        Kind(
            "zero-value",
            "Replace W_V by zero.",
            _value("zero"),
            _VALUES,
            "zero-value:layers=3,heads=0",
        ),
        Kind(
            "identity-value",
            "Replace W_V by ones on the diagonal.",
            _value("identity"),
            _VALUES,
            "identity-value:layers=3",
        ),
        Kind(
            "low-rank-value",
            "Replace W_V by its best approximation of a rank.",
            _value("low_rank"),
            (Option("rank", int, "a whole number from 1", None), *_VALUES),
            "low-rank-value:rank=4",
        ),
        Kind(
            "scale-value",
            "Multiply W_V.",
            _value("scaled"),
            (_FACTOR, *_VALUES),
            "scale-value:factor=0.5,layers=8-11",
        ),
        Kind(
            "random-value",
            "Replace W_V by a random matrix of its norm.",
            _value("random"),
            (Option("seed", int, "a whole number", None), *_VALUES),
            "random-value:seed=0,layers=3",
        ),
        Kind(
            "ablate",
            "Replace outputs of heads, attention layers or MLPs by zero or their mean.",
            _ablation,
            (
                _LAYERS,
                _HEADS,
                Option(
                    "site",
                    _choice("z", "attn_out", "mlp_out"),
                    "z (heads), attn_out or mlp_out",
                    "z",
                ),
                Option(
                    "kind",
                    _choice("zero", "mean"),
                    "zero or mean (over the bare queries of the facts)",
                    "zero",
                ),
                Option("span", _span, FORMS, "all"),
            ),
            "ablate:heads=8.3+9.1,kind=mean",
        ),
    )
}
"""Kinds of probes by name."""
