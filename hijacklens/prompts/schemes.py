"""Hijack schemes: rules that turn a fact into the sentence that is put before its query.

A scheme is a template with placeholders. `do-not-think` is the generic scheme of the paper
(section 2, Figure 2a), `relation` the sentences of Figures 2b and B.2, `near-word` those of
Figure B.4, and each `-true` scheme is its reverse. The controls are ours: they tell mention from
negation and content from length.

    add_scheme("never-say", "Never say {target_false}.")     # yours, in one call
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Literal

from hijacklens.errors import InputError, choice, one_of_type, shown, unknown
from hijacklens.facts.fact import Fact, is_text
from hijacklens.facts.relations import relations

Direction = Literal["hijack", "reverse", "control"]
DIRECTIONS = ("hijack", "reverse", "control")
PLACEHOLDERS = {
    "subject": "the subject of the fact",
    "target_true": "the true target",
    "target_false": "the false target",
    "near_true": "a word close in meaning to the true target",
    "near_false": "a word close in meaning to the false target",
    "other_false": "a false target of another fact of the same relation, drawn by seed",
}
"""What a template may name; each in braces."""


class Unusable(Exception):
    """A scheme cannot make a sentence for a fact; the message is the reason to list."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemeRecord:
    """What a result records of a scheme. Results of early versions may have the name alone."""

    name: str
    direction: Direction | None = None
    text: str | Mapping[str, str] | None = None
    """The template, or relation id -> template."""

    def scheme(self) -> Scheme:
        """Return the scheme again."""
        form = "templates" if isinstance(self.text, Mapping) else "template"
        return Scheme(name=self.name, direction=self.direction or "hijack", **{form: self.text})


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """A rule that makes one sentence of a fact.

    Raises:
        InputError: The name, direction or a template is not usable; the message names it.
    """

    name: str
    template: str | None = None
    """The sentence with placeholders; None where there is one per relation."""
    templates: Mapping[str, str] | None = dataclasses.field(default=None, repr=False)
    """Relation id -> sentence with placeholders, where there is one per relation."""
    direction: Direction = "hijack"
    """Towards the false target, towards the true one, or a control that should do little."""
    summary: str = "added by the user"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.name):
            raise InputError(
                f"scheme name {self.name!r}: use lower-case letters, digits and single hyphens, "
                "such as 'never-say'."
            )
        if self.templates is not None:
            one_of_type("templates, by relation,", self.templates, Mapping, "{'P36': '...'}")
        for text in self._all_templates():
            if not is_text(text):
                raise InputError(f"scheme {self.name!r}: a template is text, not {shown(text)}.")
        choice("direction", self.direction, DIRECTIONS)
        if (self.template is None) == (not self.templates):  # neither, or both
            raise InputError(f"scheme {self.name!r} needs either one template or one per relation.")
        for template in self._all_templates():
            _check_template(self.name, template)

    @property
    def needs(self) -> tuple[str, ...]:
        """The placeholders of the template or templates, in the order of `PLACEHOLDERS`."""
        used = {field for template in self._all_templates() for field in _fields(template)}
        return tuple(name for name in PLACEHOLDERS if name in used)

    def record(self) -> SchemeRecord:
        """Return what a result records of this scheme."""
        text = self.template if self.template is not None else dict(self.templates or {})
        return SchemeRecord(name=self.name, direction=self.direction, text=text)

    def _all_templates(self) -> list[str]:
        if self.template is not None:
            return [self.template]
        return list((self.templates or {}).values())

    def sentence(self, fact: Fact, *, pool: Sequence[str] = (), seed: int = 0) -> str:
        """The sentence for one fact.

        Args:
            fact: The fact.
            pool: False targets of the same relation, for templates that name {other_false}.
            seed: Seeds the draw from the pool, together with the fact's case id.

        Raises:
            Unusable: The fact has no near word, its relation no wording, or the pool no other
                target; the message says which.
        """
        template = self.template
        if template is None:
            template = (self.templates or {}).get(fact.relation_id)
            if template is None:
                named = repr(fact.relation_id) if fact.relation_id else "(none)"
                raise Unusable(f"{self.name} has no sentence for relation {named}")
        # Replaced piece by piece, so that braces in a subject or target stay text.
        text = "".join(
            text + (_VALUES[field](fact, pool, seed) if field else "")
            for text, field, _, _ in Formatter().parse(template)
        )
        # An article before the subject ("the United Kingdom") begins the sentence.
        return f"The {text[4:]}" if text.startswith("the ") else text


def _near(side: Literal["true", "false"]) -> Callable[[Fact, Sequence[str], int], str]:
    def value(fact: Fact, pool: Sequence[str], seed: int) -> str:
        word = fact.near_true if side == "true" else fact.near_false
        if not word:
            target = fact.target_true if side == "true" else fact.target_false
            raise Unusable(f"no near word is known for the {side} target {target!r}")
        return word

    return value


def _other_false(fact: Fact, pool: Sequence[str], seed: int) -> str:
    others = sorted(set(pool) - {fact.target_true, fact.target_false})
    if not others:
        raise Unusable(f"no other false target of relation {fact.relation_id!r} to draw")
    # Seeded by the fact, so that it draws the same from the same pool, wherever it stands in it.
    key = hashlib.sha256(f"{seed} {fact.case_id}".encode()).digest()
    return random.Random(key).choice(others)


_VALUES: dict[str, Callable[[Fact, Sequence[str], int], str]] = {
    "subject": lambda fact, pool, seed: fact.subject,
    "target_true": lambda fact, pool, seed: fact.target_true,
    "target_false": lambda fact, pool, seed: fact.target_false,
    "near_true": _near("true"),
    "near_false": _near("false"),
    "other_false": _other_false,
}


def _check_template(name: str, template: str) -> None:
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise InputError(
            f"scheme {name!r}: the template {template!r} is malformed ({error}). Placeholders "
            "stand in single braces; write a brace itself as {{ or }}."
        ) from None
    for _, field, spec, conversion in parts:
        if field is not None and (field not in PLACEHOLDERS or spec or conversion):
            given = field + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise unknown(
                f"placeholder in the template of scheme {name!r}",
                "{" + given + "}",
                ["{" + allowed + "}" for allowed in PLACEHOLDERS],
                "{target_false} is the false target, {target_true} the true one.",
            )
    if not template.strip() or template != template.strip() or len(template.splitlines()) > 1:
        raise InputError(
            f"scheme {name!r}: the template {template!r} must be one sentence on one line, "
            "without spaces around it."
        )


def _fields(template: str) -> list[str]:
    return [field for _, field, _, _ in Formatter().parse(template) if field]


_REGISTRY: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            name="do-not-think",
            template="Do not think of {target_false}.",
            summary="the generic hijack (Figure 2a)",
        ),
        Scheme(
            name="do-not-think-true",
            template="Do not think of {target_true}.",
            direction="reverse",
            summary="its reverse (Figure B.1)",
        ),
        Scheme(
            name="relation",
            templates={key: relation.hijack for key, relation in relations().items()},
            summary="a sentence about the subject that denies the false target (Figures 2b, B.2)",
        ),
        Scheme(
            name="relation-true",
            templates={key: relation.reverse for key, relation in relations().items()},
            direction="reverse",
            summary="a sentence about the subject that states the true target (Figure B.3)",
        ),
        Scheme(
            name="near-word",
            template="Do not think of {near_false}.",
            summary="the generic hijack with a word close in meaning (Figure B.4)",
        ),
        Scheme(
            name="near-word-true",
            template="Do not think of {near_true}.",
            direction="reverse",
            summary="its reverse (Figure B.4)",
        ),
        Scheme(
            name="think",
            template="Think of {target_false}.",
            direction="control",
            summary="the hijack without its negation",
        ),
        Scheme(
            name="mention",
            template="{target_false}.",
            direction="control",
            summary="the bare mention of the false target",
        ),
        Scheme(
            name="do-not-think-other",
            template="Do not think of {other_false}.",
            direction="control",
            summary="the hijack with the false target of another fact",
        ),
        Scheme(
            name="unrelated",
            template="The weather was mild today.",
            direction="control",
            summary="a neutral sentence of like length",
        ),
    )
}


def schemes() -> dict[str, Scheme]:
    """All registered schemes by name: the built-in ones, then those that were added."""
    return dict(_REGISTRY)


def add_scheme(
    name: str,
    template: str,
    *,
    direction: Direction = "hijack",
    summary: str = "added by the user",
) -> Scheme:
    """Register a scheme of your own, to be named like the built-in ones.

    Args:
        name: Lower-case letters, digits and hyphens.
        template: One sentence; may name {subject}, {target_true}, {target_false}, {near_true},
            {near_false} and {other_false}.
        direction: `hijack`, `reverse` or `control`; for tables and plots.
        summary: One line on what it does.

    Raises:
        InputError: The name is taken by a different scheme, or name or template are not usable.
    """
    scheme = Scheme(name=name, template=template, direction=direction, summary=summary)
    known = _REGISTRY.get(name)
    if known is not None and known != scheme:
        raise InputError(
            f"scheme {name!r} exists already ({known.template or 'one sentence per relation'!r}); "
            "choose another name."
        )
    _REGISTRY[name] = scheme
    return scheme


def get_scheme(name: str | Scheme) -> Scheme:
    """The scheme of that name; a scheme is passed through.

    Raises:
        InputError: No scheme has that name.
    """
    if isinstance(name, Scheme):
        return name
    known = choice("scheme", name, _REGISTRY, "Add your own with add_scheme or --template.")
    return _REGISTRY[known]
