"""A fact with a true and a false target, and an immutable set of them with a content hash.

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
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

from hijacklens.errors import InputError, one_of_type, several, unknown, whole_number

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One record: subject s, relation r, prompt p, true target o* and false target o_.

    Raises:
        InputError: The case id is no whole number of 64 bits, a text is empty or none, the
            template does not hold `{}` exactly once, or both targets are the same.
    """

    case_id: int
    relation_id: str
    """Wikidata property, such as `P190`; empty where the source names none."""
    subject: str
    template: str
    """The prompt with `{}` in place of the subject; it ends where the target begins."""
    target_true: str
    """Without a leading space."""
    target_false: str
    near_true: str | None = None
    """A word close in meaning to the true target (France for French), or None."""
    near_false: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "case_id", _case_id(self.case_id))
        for name in ("relation_id", "subject", "template", "target_true", "target_false"):
            _require_text(self.case_id, name, getattr(self, name))
        for name in ("near_true", "near_false"):
            _require_text(self.case_id, name, getattr(self, name) or "")
        for name in ("subject", "template", "target_true", "target_false"):
            if not getattr(self, name).strip():
                raise InputError(f"case {self.case_id}: {name} is empty.")
        if self.template.count("{}") != 1:
            raise InputError(
                f"case {self.case_id}: the template {self.template!r} must hold {{}} exactly "
                "once, where the subject stands."
            )
        if self.target_true.strip() == self.target_false.strip():
            raise InputError(
                f"case {self.case_id}: the true and the false target are both "
                f"{self.target_true!r}; they must differ."
            )

    @property
    def prompt(self) -> str:
        """The bare query, without trailing space."""
        return self.template.replace("{}", self.subject).rstrip()


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record or fact that could not be used, and why."""

    case_id: int | None
    """None where the record has no readable case id; `reason` then names its place."""
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


@dataclass(frozen=True, slots=True)
class FactSet(Sequence[Fact]):
    """An ordered, immutable set of facts with the name of its source.

    `facts[3]` is a fact, `facts[:10]` a smaller set. Every method returns a new set.
    """

    facts: tuple[Fact, ...]
    name: str
    """Where the facts come from, as it is printed and saved."""
    note: str = ""
    """What a user must know about the source."""
    skipped: tuple[Skipped, ...] = ()
    """Records of the source that could not be read as facts."""

    def __post_init__(self) -> None:
        facts = several("facts", self.facts, "(fact, other_fact)")
        for fact in facts:
            one_of_type("one of the facts", fact, Fact, "hl.atlas()[0]")
        object.__setattr__(self, "facts", facts)
        repeated = [case for case, n in Counter(f.case_id for f in self.facts).items() if n > 1]
        if repeated:
            raise InputError(
                f"{self.name}: case id {repeated[0]} occurs more than once; every fact needs one "
                "of its own."
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
        """The facts of one or several relations, or with the given case ids, in their order.

        Of the records that could not be read, those stay that may belong to the relations, or
        that have one of the case ids.

        Raises:
            InputError: A relation or case id that the set does not have, or that is none.
        """
        kept, skipped = self.facts, self.skipped
        if relation is not None:
            wanted = _relations(relation)
            for missing in sorted(wanted - set(self.relations())):
                raise unknown(f"relation in {self.name}", missing, self.relations())
            kept = tuple(fact for fact in kept if fact.relation_id in wanted)
            skipped = tuple(row for row in skipped if row.relation_id in {"", *wanted})
        if case_ids is not None:
            ids = _case_ids(case_ids)
            missing_ids = sorted(ids - {fact.case_id for fact in kept})
            if missing_ids:
                raise InputError(
                    f"{self.name} has no case {', '.join(map(str, missing_ids[:5]))}"
                    f"{' and others' if len(missing_ids) > 5 else ''} among its {len(kept)} "
                    "facts. `hijacklens facts` lists what there is."
                )
            kept = tuple(fact for fact in kept if fact.case_id in ids)
            skipped = tuple(row for row in skipped if row.case_id in ids)
        return replace(self, facts=kept, skipped=skipped)

    def sample(self, n: int, *, seed: int = 0) -> FactSet:
        """`n` facts drawn without replacement, in the order of the set; the same for a seed.

        Raises:
            InputError: `n` is no whole number from 1 to the size of the set, or the seed is none.
        """
        n = whole_number(f"the size of a sample of {self.name}", n, least=1)
        if n > len(self):
            raise InputError(
                f"cannot sample {n} of the {len(self)} facts of {self.name}; limit({n}) takes all "
                "that there are."
            )
        draw = random.Random(whole_number("seed", seed))
        chosen = sorted(draw.sample(range(len(self)), n))
        return replace(self, facts=tuple(self.facts[i] for i in chosen))

    def limit(self, n: int | None, *, seed: int = 0) -> FactSet:
        """At most `n` facts: a sample when the set has more, all of them otherwise.

        Raises:
            InputError: `n` is no whole number from 1 (None is no limit), or the seed is none.
        """
        if n is None or whole_number("limit", n, least=1) >= len(self):
            return self
        return self.sample(n, seed=seed)

    def without_leaks(self) -> FactSet:
        """Without the facts whose prompt already names one of the two targets."""
        return replace(
            self,
            facts=tuple(
                fact
                for fact in self.facts
                if fact.target_true not in fact.prompt and fact.target_false not in fact.prompt
            ),
        )

    def without_disputed(self) -> FactSet:
        """Without the facts whose false target is the true target of a sibling.

        A sibling has the same subject and relation. CounterFact has 110 such facts (a city with
        two twins, say); denying their false target states something false.
        """
        truths: dict[tuple[str, str], set[str]] = {}
        for fact in self.facts:
            truths.setdefault((fact.subject, fact.relation_id), set()).add(fact.target_true)
        return replace(
            self,
            facts=tuple(
                fact
                for fact in self.facts
                if fact.target_false not in truths[fact.subject, fact.relation_id]
            ),
        )

    def relations(self) -> dict[str, int]:
        """Relation id -> how many facts, in the order of the property numbers."""
        counts = Counter(fact.relation_id for fact in self.facts)
        return dict(sorted(counts.items(), key=lambda item: property_number(item[0])))

    def content_hash(self) -> str:
        """SHA-256 of the facts, in their order, whatever file or layout they came from."""
        digest = hashlib.sha256()
        for fact in self.facts:
            digest.update(json.dumps(asdict(fact), ensure_ascii=False).encode() + b"\n")
        return digest.hexdigest()

    def record(self) -> FactsRecord:
        """Return what a result records of these facts."""
        return FactsRecord(name=self.name, n=len(self), hash=self.content_hash(), note=self.note)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per fact, with the filled-in prompt beside the fields."""
        import pandas as pd  # lists of names and relations do without it

        rows = [{**asdict(fact), "prompt": fact.prompt} for fact in self.facts]
        return pd.DataFrame(rows, columns=[*Fact.__dataclass_fields__, "prompt"])


def _case_id(given: Any) -> int:
    """A case id as a plain number; tables hold 64 bits of it."""
    try:
        number = 2**63 if isinstance(given, bool) else operator.index(given)
    except TypeError:
        number = 2**63
    if not -(2**63) <= number < 2**63:
        raise InputError(f"case_id must be a whole number of at most 64 bits, not {given!r:.60}.")
    return number


def _require_text(case_id: int, name: str, given: object) -> None:
    if not is_text(given):
        raise InputError(f"case {case_id}: {name} must be text, not {given!r:.60}.")


def is_text(given: object) -> bool:
    """Whether something is text that can be written as UTF-8: no half of a surrogate pair is."""
    if not isinstance(given, str):
        return False
    try:
        given.encode()
    except UnicodeEncodeError:
        return False
    return True


def _relations(given: object) -> set[str]:
    """Relation ids as a set; several are not one text, and a number is no id."""
    listed = [given] if isinstance(given, str) else several("relation", given, "'P190' or a list")
    for relation in listed:
        one_of_type("a relation", relation, str, "'P190'")
    return set(listed)


def _case_ids(given: object) -> set[int]:
    """Case ids as a set."""
    return {_case_id(case) for case in several("case_ids", given, "[3, 17]")}


def property_number(relation: str) -> tuple[int, str]:
    """Return a key that sorts relation ids by their numbers; others come last."""
    digits = relation[1:]
    is_number = digits.isdecimal() and len(digits) < 10
    return (int(digits) if is_number else 10**9, relation)
