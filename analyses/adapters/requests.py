"""What other tools ask of a model, in our symbols: a context and perhaps a continuation of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hijacklens.errors import unknown
from hijacklens.models.hooked import HookedLanguageModel
from hijacklens.probe import Probe
from hijacklens.prompts.layout import mark
from hijacklens.prompts.spans import AT, positions
from hijacklens.prompts.tokens import TokenIds
from probes.specification import parse

AFTER = ("last", "target")
"""Spans of a continuation, besides `at:` positions of a context; a request has no others."""


def probes_of(model: HookedLanguageModel, text: str) -> tuple[Probe, ...]:
    """Return the probes of a text, as `hijacklens hijack --probe` takes them, joined by `;`.

    Raises:
        InputError: As `parse`, or a probe does not fit the model.
    """
    return tuple(parse(one).probe(model=model) for one in text.split(";") if one.strip())


def require_spans(spans: Sequence[str]) -> None:
    """Refuse spans that a request does not have.

    Raises:
        InputError: A span is neither `last`, `target` nor `at:`.
    """
    for span in spans:
        if span not in AFTER and not span.startswith(AT):
            raise unknown("span of a harness request", span, [*AFTER, "all", f"{AT}0"])


def cutting(stops: Sequence[str]) -> Callable[[str], str | None]:
    """Return a function that cuts a text at its first stop sequence; None if it has none."""

    def cut(text: str) -> str | None:
        at = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
        return text[: min(at)] if at else None

    return cut


def symbols_of(
    context: Sequence[int], continuation: Sequence[int], spans: Sequence[str]
) -> TokenIds:
    """Return the symbols of a request, which mark the spans of the probes."""
    n, ids = len(context), [*context, *continuation]
    found = {"last": range(max(n - 1, 0), len(ids)), "target": range(n, len(ids))}
    return mark(ids, [found[span] if span in AFTER else positions(span, n) for span in spans])
