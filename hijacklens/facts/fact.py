"""A fact with a true and a false target, and an immutable set of facts with a content hash.

>>> paris = Fact(
...     case_id=1, relation_id="P131", subject="Eiffel Tower",
...     template="{} is in the city of", target_true="Paris", target_false="Guam",
... )
>>> paris.prompt
'Eiffel Tower is in the city of'
"""

from __future__ import annotations

import hashlib
import json
import operator
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

from hijacklens.errors import (
    InputError,
    choice,
    is_text,
    is_whole,
    one_of_type,
    several,
    strict,
    utf8,
    whole_number,
)
from hijacklens.facts.chat import Chat
from hijacklens.facts.joining import JOININGS, Joining
from hijacklens.facts.relations import known_aliases, known_relation, relation_id

if TYPE_CHECKING:
    import pandas as pd


ALIASES = ("aliases_true", "aliases_false")
RECORDED = ("name", "note", "joining", "opening", "origin", "chat")
"""What a result records of a set of facts, and how their prompts are written."""


@strict
@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One record: subject s, relation r, prompt p, true target o* and false target o_.

    White space around texts is removed, but for the template; `load_facts` removes it from targets.
    A pair of answers to any prompt is a fact without a subject; the first answer is true.

    Raises:
        InputError: The case id is not a 64-bit whole number, a text is empty or not a string, a
            target has white space around it, the template of a subject lacks `{}` or repeats it, or
            one target is a name of the other: equal but for capitals, or among its aliases.
    """

    case_id: int
    relation_id: str
    """Wikidata property, such as `P190`, or the source's name for the relation; may be empty. The
    name of a known relation becomes its property: `capital` is `P36`."""
    subject: str
    """Empty in a pair of answers to a prompt: the template is then the prompt itself."""
    template: str
    """The prompt with `{}` for the subject. White space at its end is part of the prompt."""
    target_true: str
    """`FactSet.joining` says how it joins the prompt."""
    target_false: str
    near_true: str | None = None
    """A word close in meaning to the true target (France for French), or None."""
    near_false: str | None = None
    aliases_true: tuple[str, ...] = ()
    """Other names of the true target (USA for United States)."""
    aliases_false: tuple[str, ...] = ()
    distractor: str | None = None
    """The fact's own text about the false target, for the placeholder {distractor} of schemes."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "case_id", _case_id(self.case_id))
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            optional = name in ("near_true", "near_false", "distractor")
            texts = (value or "" if optional else value,)
            if name in ALIASES:
                texts = several(name, value, "('USA', 'U.S.')")
            if name == "case_id":
                continue
            if not all(map(is_text, texts)):
                raise InputError(f"case {self.case_id}: {name} must be text, not {value!r:.60}.")
            if name == "relation_id":
                object.__setattr__(self, name, relation_id(value.strip()))
            elif name in ALIASES:
                object.__setattr__(self, name, tuple(text.strip() for text in texts))
            elif name != "template" and value is not None:
                if name.startswith("target") and value.strip() not in ("", value):
                    raise InputError(
                        f"case {self.case_id}: {name} is {value!r}; leave out the white space. "
                        "The joining of the facts says how a target follows its prompt."
                    )
                object.__setattr__(self, name, value.strip())
        bare = not self.subject and "{}" not in self.template
        for name in ("subject", "template", "target_true", "target_false"):
            if not getattr(self, name).strip() and not (bare and name == "subject"):
                raise InputError(
                    f"case {self.case_id}: {name} is empty."
                    + " The template has {} in its place." * (name == "subject")
                )
        if self.template.count("{}") != 1 and not bare:
            raise InputError(
                f"case {self.case_id}: the template {self.template!r} must contain {{}} exactly "
                "once, in place of the subject."
            )
        if self.target_true == self.target_false:
            raise InputError(
                f"case {self.case_id}: the true and the false target are both "
                f"{self.target_true!r}; they must differ."
            )
        if self.names_one_thing():
            raise InputError(
                f"case {self.case_id}: the false target {self.target_false!r} is a name of the "
                f"true target {self.target_true!r}; they must differ."
            )

    def names_one_thing(self, *, known: bool = False) -> bool:
        """Return whether a target is among the names of the other.

        Aliases that our table gives a target count only with `known`: CounterFact has such facts.
        """
        names = []
        for side in ("true", "false"):
            target, aliases = getattr(self, f"target_{side}"), getattr(self, f"aliases_{side}")
            usual = () if known else known_aliases().get(target, ())
            names.append({same_name(x) for x in (target, *aliases) if x not in usual})
        return same_name(self.target_false) in names[0] or same_name(self.target_true) in names[1]

    @property
    def prompt(self) -> str:
        """The bare query."""
        return self.template.replace("{}", self.subject)

    @property
    def key(self) -> tuple[str, str]:
        """What a question is about: subject and relation, or the prompt if there is no subject."""
        return self.subject or self.template, self.relation_id


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record or fact that could not be used, and why."""

    case_id: int | None
    """None if the record has no readable case id; `reason` then gives its position."""
    relation_id: str
    subject: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FactsRecord:
    """What a result records of its facts."""

    name: str
    n: int
    hash: str
    """Their `content_hash`."""
    note: str = ""
    joining: Joining = "space"
    """As in `FactSet`. Results of earlier versions put a space after every prompt."""
    opening: str = ""
    origin: str = ""
    """As in `FactSet`."""
    chat: Chat | None = None

    def fact_set(self, table: pd.DataFrame) -> FactSet:
        """Return the facts of a table (`FactSet.to_dataframe`) as the set that was recorded."""
        rows: list[Any] = table.astype(object).where(table.notna(), None).to_dict("records")
        for row in rows:
            row.pop("prompt", None)
            row.update({name: tuple(row[name]) for name in ALIASES if name in row})
        about = {name: getattr(self, name) for name in RECORDED}
        return FactSet(tuple(Fact(**row) for row in rows), **about)

    @property
    def title(self) -> str:
        """The name, with the opening and the chat if there are any."""
        after = f" after {self.opening!r}" if self.opening else ""
        return f"{self.name}{after}{f' in a {self.chat.title}' if self.chat else ''}"


@strict
@dataclass(frozen=True, slots=True)
class FactSet(Sequence[Fact]):
    """An ordered, immutable set of facts with the name of its source.

    `facts[3]` is a fact, `facts[:10]` a smaller set. Every method returns a new set.
    """

    facts: tuple[Fact, ...]
    name: str
    """The source of the facts, as printed and saved."""
    note: str = ""
    """A warning about the source."""
    skipped: tuple[Skipped, ...] = ()
    """Records of the source that could not be read as facts."""
    joining: Joining = "auto"
    """How targets join their prompts (`hijacklens.facts.joining`)."""
    opening: str = ""
    """A neutral text before every prompt, bare or hijacked (`with_opening`)."""
    origin: str = ""
    """The published data set whose layout the source has, with its licence and address."""
    chat: Chat | None = None
    """How the facts are asked in a chat; None: as plain text (`in_chat`)."""

    def __post_init__(self) -> None:
        facts = several("facts", self.facts, "(fact, other_fact)")
        for fact in facts:
            one_of_type("one of the facts", fact, Fact, "hl.atlas()[0]")
        object.__setattr__(self, "facts", facts)
        utf8("the name of the facts", self.name, "'mine'")
        choice("joining", self.joining, JOININGS)
        utf8("the opening", self.opening, "'Well.'")
        if self.opening != self.opening.lstrip() or len(self.opening.splitlines()) > 1:
            raise InputError(
                f"the opening {self.opening!r} must be text on one line that does not begin with "
                "white space, such as 'Well.'; '' is none."
            )
        repeated = [case for case, n in Counter(f.case_id for f in self.facts).items() if n > 1]
        if repeated:
            raise InputError(
                f"{self.name}: case id {repeated[0]} occurs more than once; every fact needs "
                "a separate one."
            )

    @overload
    def __getitem__(self, index: int) -> Fact: ...
    @overload
    def __getitem__(self, index: slice) -> FactSet: ...
    def __getitem__(self, index: int | slice) -> Fact | FactSet:
        if isinstance(index, slice):
            return replace(self, facts=self.facts[index])
        return self.facts[index]

    def __len__(self) -> int:
        return len(self.facts)

    def __iter__(self) -> Iterator[Fact]:
        return iter(self.facts)

    def __repr__(self) -> str:
        relations = len(self.relations())
        return f"FactSet({self.name!r}, {len(self)} facts, {relations} relations)"

    def where(
        self,
        *,
        relation: str | Collection[str] | None = None,
        case_ids: Iterable[SupportsIndex] | None = None,
    ) -> FactSet:
        """Select the facts of one or several relations, or with some case ids, in their order.

        A relation is given by its id or by its name (`P36`, `capital`).

        Unreadable records stay if they may belong to the relations or have one of the case ids.

        Raises:
            InputError: The set lacks the relation or case id, or the argument is neither.
        """
        facts, skipped = self.facts, self.skipped
        if relation is not None:
            several_ids = (relation,) if isinstance(relation, str) else relation
            known = self.relations()
            what = f"relation in {self.name}"
            relations = {
                known_relation(one_of_type("a relation", each, str, "'P190'"), known, what)
                for each in several("relation", several_ids, "'P190' or a list")
            }
            facts = tuple(fact for fact in facts if fact.relation_id in relations)
            skipped = tuple(row for row in skipped if row.relation_id in {"", *relations})
        if case_ids is not None:
            ids = {_case_id(case) for case in several("case_ids", case_ids, "[3, 17]")}
            missing_ids = sorted(ids - {fact.case_id for fact in facts})
            if missing_ids:
                raise InputError(
                    f"{self.name} has no case {', '.join(map(str, missing_ids[:5]))}"
                    f"{' and others' if len(missing_ids) > 5 else ''} among its {len(facts)} "
                    "facts. `hijacklens facts` lists them."
                )
            facts = tuple(fact for fact in facts if fact.case_id in ids)
            skipped = tuple(row for row in skipped if row.case_id in ids)
        return replace(self, facts=facts, skipped=skipped)

    def sample(self, n: int, *, seed: int = 0) -> FactSet:
        """Draw `n` facts without replacement; they stay in the order of the set.

        Raises:
            InputError: `n` is not a whole number from 1 to the size of the set, or the seed is not
                a whole number.
        """
        n = whole_number(f"the size of a sample of {self.name}", n, least=1)
        if n > len(self):
            raise InputError(
                f"cannot sample {n} of the {len(self)} facts of {self.name}; limit({n}) takes them "
                "all."
            )
        draw = random.Random(whole_number("seed", seed))
        rows = sorted(draw.sample(range(len(self)), n))
        return replace(self, facts=tuple(self.facts[i] for i in rows))

    def limit(self, n: int | None, *, seed: int = 0) -> FactSet:
        """Return at most `n` facts: a sample if there are more, otherwise all. None: no limit.

        Raises:
            InputError: `n` is not a whole number from 1, or the seed is not a whole number.
        """
        if n is None or whole_number("limit", n, least=1) >= len(self):
            return self
        return self.sample(n, seed=seed)

    def with_opening(self, opening: str) -> FactSet:
        """Put a neutral text before every prompt, bare or hijacked, such as "Well.".

        If a tokenizer adds no BOS, heads rest their attention on the first word of a prompt (an
        attention sink). The opening takes that role, so that it falls neither to the sentence nor
        to the subject. A special token of the tokenizer, such as "<|endoftext|>", also works.

        Raises:
            InputError: The opening is not text on one line, or begins with white space.
        """
        return replace(self, opening=opening)

    def in_chat(self, chat: Chat | None) -> FactSet:
        """Ask the facts in a chat, in the template of the model's tokenizer; None: as plain text.

        Raises:
            InputError: Something else than a `Chat` is given.
        """
        if chat is not None:
            one_of_type("chat", chat, Chat, "hl.Chat(hijack='system')")
        return replace(self, chat=chat)

    def without_leaks(self) -> FactSet:
        """Remove the facts whose prompt already names one of the two targets."""
        return self._only(
            lambda x: x.target_true not in x.prompt and x.target_false not in x.prompt
        )

    def without_disputed(self) -> FactSet:
        """Remove the facts whose false target is the true target of a sibling.

        A sibling has the same subject and relation. CounterFact has 110 such facts (for example of
        a city with two twins); denying their false target states something false.
        """
        truths: dict[tuple[str, str], set[str]] = {}
        for fact in self.facts:
            truths.setdefault(fact.key, set()).add(fact.target_true)
        return self._only(lambda fact: fact.target_false not in truths[fact.key])

    def _only(self, keep: Callable[[Fact], bool]) -> FactSet:
        return replace(self, facts=tuple(fact for fact in self.facts if keep(fact)))

    def relations(self) -> dict[str, int]:
        """Return relation id -> number of facts, in the order of the property numbers."""
        counts = Counter(fact.relation_id for fact in self.facts)
        return dict(sorted(counts.items(), key=lambda item: property_number(item[0])))

    def content_hash(self) -> str:
        """Return the SHA-256 of the facts in order, without the aliases in `known_aliases`."""
        digest = hashlib.sha256()
        encode = json.JSONEncoder(ensure_ascii=False).encode
        for fact in self.facts:
            fields = {name: getattr(fact, name) for name in Fact.__dataclass_fields__}
            for name in ALIASES:
                usual = known_aliases().get(getattr(fact, name.replace("aliases", "target")))
                if fields[name] in ((), usual):
                    del fields[name]
            if fact.distractor is None:
                del fields["distractor"]
            digest.update(encode(fields).encode() + b"\n")
        return digest.hexdigest()

    def record(self) -> FactsRecord:
        """Return what a result records of these facts."""
        fields = {name: getattr(self, name) for name in RECORDED}
        return FactsRecord(**fields, n=len(self), hash=self.content_hash())

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row per fact: its fields and the filled-in prompt."""
        import pandas as pd  # lists of names and relations work without it

        rows = [{**asdict(fact), "prompt": fact.prompt} for fact in self.facts]
        return pd.DataFrame(rows, columns=[*Fact.__dataclass_fields__, "prompt"])


def same_name(text: str) -> str:
    """Return what names that differ in capitals or in their composition of letters share.

    >>> same_name("ZU\u0308RICH") == same_name("Z\u00fcrich")
    True
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def _case_id(value: Any) -> int:
    """Return a case id as an int; tables hold 64 bits of it."""
    if not is_whole(value) or not -(2**63) <= operator.index(value) < 2**63:
        raise InputError(f"case_id must be a whole number of at most 64 bits, not {value!r:.60}.")
    return operator.index(value)


def property_number(relation: str) -> tuple[int, str]:
    """Return a key that sorts relation ids by their numbers; others come last."""
    digits = relation[1:]
    is_number = digits.isdecimal() and len(digits) < 10
    return (int(digits) if is_number else 10**9, relation)
