"""Hijack schemes: rules that turn a fact into the hijacking sentence before its query.

A scheme is a template with placeholders. The built-in ones are in `schemes.csv`: `do-not-think` is
the generic scheme of the paper (section 2, Figure 2a), `relation` has the sentences of Figures 2b
and B.2, `near-word` those of Figure B.4, and each `-true` scheme is the reverse. The controls are
ours: they distinguish mention from negation and content from length.

    add_scheme("never-say", "Never say {target_false}.")     # your own, in one call
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from string import Formatter
from typing import Literal, cast

from hijacklens.errors import (
    InputError,
    choice,
    is_text,
    one_of_type,
    several,
    shown,
    strict,
    unknown,
)
from hijacklens.facts.fact import Fact
from hijacklens.facts.relations import relation_id, relations

Direction = Literal["hijack", "reverse", "control"]
DIRECTIONS = ("hijack", "reverse", "control")
PLACEHOLDERS = {
    "subject": "the subject of the fact",
    "target_true": "the true target",
    "target_false": "the false target",
    "near_true": "a word close in meaning to the true target",
    "near_false": "a word close in meaning to the false target",
    "other_false": "a false target of another fact of the same relation, drawn by seed",
    "distractor": "the text about the false target that the fact itself has (NQ-Swap, MQuAKE)",
}
"""Placeholder of a template -> its meaning."""


class Unusable(Exception):
    """A scheme cannot make a sentence for a fact; the message is the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemeRecord:
    """What a result records of a scheme. Results of early versions may have the name alone."""

    name: str
    direction: Direction | None = None
    text: str | Mapping[str, str] | None = None
    """The template, or relation id -> template."""

    def scheme(self) -> Scheme:
        """Return the scheme again."""
        return Scheme(
            name=self.name,
            direction=self.direction or "hijack",
            template=self.text if isinstance(self.text, str) else None,
            templates=self.text if isinstance(self.text, Mapping) else None,
        )


@strict
@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """A rule that makes one sentence from a fact.

    Raises:
        InputError: The name, direction or a template is not usable; the message names it.
    """

    name: str
    template: str | None = None
    """The sentence with placeholders; None if there is one per relation."""
    templates: Mapping[str, str] | None = dataclasses.field(default=None, repr=False)
    """Relation id or name -> sentence with placeholders, if there is one per relation."""
    direction: Direction = "hijack"
    """Towards the false target, towards the true one, or a control with little effect."""
    summary: str = "added by the user"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.name):
            raise InputError(
                f"scheme name {self.name!r}: use lower-case letters, digits and single hyphens, "
                "such as 'never-say'."
            )
        if self.templates is not None:
            one_of_type("templates, by relation,", self.templates, Mapping, "{'P36': '...'}")
            by_id = {relation_id(str(key)): text for key, text in self.templates.items()}
            object.__setattr__(self, "templates", by_id)
        for text in self._all_templates():
            if not is_text(text):
                raise InputError(f"scheme {self.name!r}: a template is text, not {shown(text)}.")
        if self.name == "all":
            raise InputError("the scheme name 'all' means every scheme in tables; choose another.")
        choice("direction", self.direction, DIRECTIONS)
        if (self.template is None) == (not self.templates):  # neither, or both
            raise InputError(f"scheme {self.name!r} needs either one template or one per relation.")
        for template in self._all_templates():
            _check_template(self.name, template)

    @property
    def needs(self) -> tuple[str, ...]:
        """The placeholders of the templates, in the order of `PLACEHOLDERS`."""
        parts = [part for template in self._all_templates() for part in Formatter().parse(template)]
        used = {field for _, field, _, _ in parts}
        return tuple(name for name in PLACEHOLDERS if name in used)

    def record(self) -> SchemeRecord:
        """Return what a result records of this scheme."""
        text = self.template if self.template is not None else dict(self.templates or {})
        return SchemeRecord(name=self.name, direction=self.direction, text=text)

    def _all_templates(self) -> list[str]:
        return list((self.templates or {}).values()) if self.template is None else [self.template]

    def sentence(self, fact: Fact, *, pool: Sequence[str] = (), seed: int = 0) -> str:
        """Return the sentence for one fact.

        Args:
            fact: The fact.
            pool: False targets of the same relation, for templates with {other_false}.
            seed: Seeds the draw from the pool, together with the fact's case id.

        Raises:
            Unusable: The fact has no subject, near word or distractor, its relation no sentence,
                or the pool no other target; the message says which.
        """
        template = self.template
        if template is None:
            template = (self.templates or {}).get(fact.relation_id)
            if template is None:
                relation = repr(fact.relation_id) if fact.relation_id else "(none)"
                raise Unusable(f"{self.name} has no sentence for relation {relation}")
        # Filled in piece by piece, so that braces in a subject or target stay text.
        text = "".join(
            text + (_value(field, fact, pool, seed) if field else "")
            for text, field, _, _ in Formatter().parse(template)
        )
        # A subject with an article ("the United Kingdom") may begin the sentence.
        starts_with_words = template.startswith("{") and not template.startswith("{{")
        return f"The {text[4:]}" if starts_with_words and text.startswith("the ") else text


def _value(placeholder: str, fact: Fact, pool: Sequence[str], seed: int) -> str:
    """Return the words of a placeholder."""
    if placeholder == "other_false":
        others = sorted(set(pool) - {fact.target_true, fact.target_false})
        if not others:
            raise Unusable(f"no other false target of relation {fact.relation_id!r} to draw")
        # Seeded by the fact, so that its draw does not depend on its position in the set.
        key = hashlib.sha256(f"{seed} {fact.case_id}".encode()).digest()
        return random.Random(key).choice(others)
    words = getattr(fact, placeholder)
    if not words:
        if placeholder in ("subject", "distractor"):
            raise Unusable(f"the fact has no {placeholder}, which the scheme puts in its sentence")
        side = placeholder.removeprefix("near_")
        target = getattr(fact, f"target_{side}")
        raise Unusable(f"no near word is known for the {side} target {target!r}")
    return words


def _check_template(name: str, template: str) -> None:
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise InputError(
            f"scheme {name!r}: the template {template!r} is malformed ({error}). Placeholders "
            "have single braces; write a brace itself as {{ or }}."
        ) from None
    for _, field, spec, conversion in parts:
        if field is not None and (field not in PLACEHOLDERS or spec or conversion):
            text = field + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise unknown(
                f"placeholder in the template of scheme {name!r}",
                "{" + text + "}",
                ["{" + allowed + "}" for allowed in PLACEHOLDERS],
                "{target_false} is the false target, {target_true} the true one.",
            )
    if not template.strip() or template != template.strip() or len(template.splitlines()) > 1:
        raise InputError(
            f"scheme {name!r}: the template {template!r} must be one sentence on one line, "
            "without spaces around it."
        )


def _built_in() -> dict[str, Scheme]:
    """Read the built-in schemes; those without a template have a sentence per relation."""
    text = resources.files("hijacklens.prompts").joinpath("schemes.csv").read_text("utf-8")
    wordings = {
        "relation": {key: relation.hijack for key, relation in relations().items()},
        "relation-true": {key: relation.reverse for key, relation in relations().items()},
    }
    built_in: dict[str, Scheme] = {}
    for row in csv.DictReader(text.splitlines()):
        template = row["template"] or None
        built_in[row["name"]] = Scheme(
            name=row["name"],
            template=template,
            templates=None if template else wordings[row["name"]],
            direction=cast("Direction", row["direction"]),
            summary=row["summary"],
        )
    return built_in


REGISTRY = _built_in()


def schemes() -> dict[str, Scheme]:
    """Return all registered schemes by name: the built-in ones, then those added."""
    return dict(REGISTRY)


@strict
def add_scheme(
    name: str,
    template: str,
    *,
    direction: Direction = "hijack",
    summary: str = "added by the user",
) -> Scheme:
    """Register a scheme of your own; refer to it by its name like the built-in ones.

    Args:
        name: Lower-case letters, digits and hyphens.
        template: One sentence, with placeholders of `PLACEHOLDERS` in braces.
        direction: `hijack`, `reverse` or `control`; for tables and plots.
        summary: One line on what it does.

    Raises:
        InputError: A different scheme has the name, or name or template are not usable.
    """
    scheme = Scheme(name=name, template=template, direction=direction, summary=summary)
    known = REGISTRY.get(name)
    if known is not None and known != scheme:
        raise InputError(
            f"scheme {name!r} exists already ({known.template or 'one sentence per relation'!r}); "
            "choose another name."
        )
    REGISTRY[name] = scheme
    return scheme


def get_scheme(name: str | Scheme) -> Scheme:
    """Return the scheme of a name; a scheme is returned unchanged.

    Raises:
        InputError: No scheme has that name.
    """
    if isinstance(name, Scheme):
        return name
    known = choice("scheme", name, REGISTRY, "Add your own with add_scheme or --template.")
    return REGISTRY[known]


def get_schemes(schemes: str | Scheme | Iterable[str | Scheme]) -> list[Scheme]:
    """Return one or several schemes, each as `get_scheme` does.

    Raises:
        InputError: There is none, or one is unknown or given twice.
    """
    one = isinstance(schemes, (str, Scheme))
    listed = [schemes] if one else several("schemes", schemes, "['do-not-think', 'relation']")
    registered = [get_scheme(scheme) for scheme in listed]
    names = [scheme.name for scheme in registered]
    if not names or len(set(names)) < len(names):
        raise InputError(f"name at least one scheme, and each once; given: {names or 'none'}.")
    return registered
