"""The layouts of facts: how a record of each gives the fields of a `Fact`.

`layouts.csv` is the registry, in the order in which layouts are tried: the fields that a record has
(`a|b` is one of them), their names in `Fact`, the other fields of the data set, and the data set
with its licence and address. A note lists all fields that are neither read nor those of the data
set. Layouts that need more than names have a function in `PREPARED`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

from hijacklens.errors import LONGEST_COMPARED, InputError
from hijacklens.facts.fact import Fact
from hijacklens.facts.relations import embedded

Record = Mapping[str, Any]
QUESTION = "Q: {} A:"
"""The prompt of a question, as the authors of PopQA write it for models not tuned for chat."""
KEPT = (*Fact.__dataclass_fields__, "prompt", "relation", "target_true_id")
MARKS = {
    "EasyEdit": {"rephrase_prompt", "locality_prompt"},
    "tracing": {"target_true_id", "relation_prefix"},
}
"""Layout whose fields own data often have -> fields of the data set; without one there is no
origin."""


class UnknownLayout(InputError):
    """A record that has none of the layouts."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the records of a data set are recognised and read: a row of `layouts.csv`."""

    name: str
    fields: str
    renamed: str
    others: str
    origin: str

    def __str__(self) -> str:
        return f"{self.name} ({self.fields.replace(' ', ', ').replace('|', ' or ')})"

    def fits(self, names: frozenset[Any]) -> bool:
        """Return whether a record with fields of these names has the layout."""
        return all(names.intersection(field.split("|")) for field in self.fields.split())

    def origin_of(self, record: Record) -> str:
        """Return the data set that a record seems to be from, with its licence and address."""
        marked = self.name not in MARKS or record.keys() & MARKS[self.name]
        return self.origin if marked else ""

    def unused(self, record: Record) -> dict[str, str]:
        """Return field that is not read -> the missing field that it may mean, or an empty text."""
        return _unused(self, tuple(record))

    def sources(self, names: Collection[Any]) -> dict[str, str]:
        """Return field of a `Fact` -> which of the fields of a record it is read from."""
        pairs = (pair.split("=") for pair in self.renamed.split())
        return {name: name for name in KEPT if name in names} | {
            name: old for name, old in pairs if old in names
        }

    def expected(self, names: Collection[Any]) -> set[str]:
        """Return the fields of a record that are read, and all others of the data set."""
        return {*self.sources(names).values(), *self.others.split()}

    def read(self, record: Record) -> dict[str, Any]:
        """Return the fields of a `Fact`, unchecked, and `target_true_id` and `prompt_differs`.

        Raises:
            InputError: A part is missing, or the subject does not occur once in the prompt.
        """
        fields = {name: record[source] for name, source in self.sources(record).items()}
        fields |= PREPARED[self.name](record) if self.name in PREPARED else {}
        if self.name in ("own", "known facts") and "template" in record:
            if missing := [name for name in ("subject", "target_true") if name not in fields]:
                names = ", ".join(map(repr, missing))
                raise UnknownLayout(f"required fields are missing: {names}.")
        elif fields.get("subject") is None:
            fields["subject"] = ""
        relation = fields.pop("relation", None)  # a template, or a name, such as "capital"
        if isinstance(relation, str) and "{}" in relation:
            fields.setdefault("template", relation)
        elif fields.get("relation_id") in (None, ""):
            fields["relation_id"] = relation
        return fields | _slotted(fields)


@cache
def _layout_with(names: frozenset[Any]) -> Layout | None:
    return next((layout for layout in LAYOUTS if layout.fits(names)), None)


@cache
def _unused(layout: Layout, names: tuple[Any, ...]) -> dict[str, str]:
    used = layout.expected(names)
    known = {*KEPT, *layout.fields.replace("|", " ").split()}
    known |= {pair.partition("=")[0] for pair in layout.renamed.split()}
    unused = {}
    for name in map(str, names):
        if name not in used:
            near = get_close_matches(name[:LONGEST_COMPARED], known, n=1, cutoff=0.8)
            unused[name] = near[0] if near and near[0] not in names else ""
    return unused


def as_registered(record: Any) -> Any:
    """Return a record with the names of the registry: `Relation ID` is `relation_id`.

    A field keeps its name if another one of the record is or may be the known field.
    """
    if not isinstance(record, Mapping) or not (names := _registered(tuple(record))):
        return record
    return {names.get(name, name): value for name, value in record.items()}


@cache
def _registered(names: tuple[Any, ...]) -> dict[str, str]:
    plain = {name: _plain(name) for name in names if isinstance(name, str)}
    alike = Counter(plain.values())
    found = {
        name: known
        for name, text in plain.items()
        if alike[text] == 1 and (known := _known_names().get(text, name)) != name
    }
    after = frozenset(found.get(name, name) for name in names)
    layout = _layout_with(after)
    return {x: y for x, y in found.items() if layout is None or y in layout.expected(after)}


@cache
def _known_names() -> dict[str, str]:
    """Return plain name -> name of a field, for all fields of all layouts."""
    texts = (f"{layout.fields} {layout.renamed} {layout.others} samples" for layout in LAYOUTS)
    return {_plain(name): name for name in (*re.split(r"[\s=|]+", " ".join(texts)), *KEPT)}


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).casefold()


def layout_of(record: Any) -> Layout:
    """Return the layout of a record.

    Raises:
        UnknownLayout: It is not an object with named fields, or has no known layout.
    """
    if not isinstance(record, Mapping):
        raise UnknownLayout(f"a record must be an object with named fields, not {record!r:.60}.")
    if layout := _layout_with(frozenset(record)):
        return layout
    columns = ", ".join(map(str, list(record)[:12])) or "no fields at all"
    lists = [name for name, value in record.items() if _holds_objects(value)]
    cure = f" The list {lists[0]!r} may hold records; save it alone." if lists else ""
    if len(record) == 1 and re.search("[;\t]", columns):
        cure = " Separate the columns by commas."
    raise UnknownLayout(f"the fields ({columns}) match no known layout.{cure}")


def _holds_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _slotted(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the template, and whether the prompt is not the template filled in.

    The prompt then counts, as it is the complete text. A prompt may be a template itself.
    """
    if "question" in fields:
        questions = _texts("the question", fields.pop("question"))
        slotted = [_slotted({**fields, "prompt": text})["template"] for text in questions]
        return {"template": [QUESTION.format(text) for text in slotted]}
    prompt, subject, template = (
        fields.pop("prompt", None),
        fields["subject"],
        fields.get("template"),
    )
    if prompt is None or not isinstance(subject, str) or not subject.strip():
        return {"template": template if template is not None else prompt}
    if not isinstance(prompt, str):
        if template is not None:
            raise InputError(f"the prompt must be text, not {prompt!r:.60}.")
        return {"template": prompt}
    subject = subject.strip()
    if template is None and "{}" in prompt:
        return {"template": prompt}
    if isinstance(template, str) and prompt in (template, template.replace("{}", subject)):
        return {"template": template}
    if prompt.count(subject) != 1:
        raise InputError(
            f"the subject {subject!r} occurs {prompt.count(subject)} times in the prompt "
            f"{prompt!r}; it must occur once."
        )
    return {"template": prompt.replace(subject, "{}"), "prompt_differs": template is not None}


def _texts(name: str, value: Any) -> list[str]:
    """Return a text, or a list of texts, as a list."""
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f"{name} must be text, not {value!r:.60}.")
    return texts


def _nested(record: Record) -> dict[str, Any]:
    """Return the parts of CounterFact's nested record."""
    rewrite = record["requested_rewrite"]
    if not isinstance(rewrite, Mapping):
        cure = " Write a record for each of its entries." if isinstance(rewrite, list) else ""
        raise InputError(f"requested_rewrite must be an object, not {rewrite!r:.60}.{cure}")
    true, false = rewrite.get("target_true"), rewrite.get("target_new")
    return {
        **{name: rewrite.get(name) for name in ("relation_id", "subject")},
        "template": rewrite.get("prompt"),
        "target_true": true.get("str") if isinstance(true, Mapping) else true,
        "target_false": false.get("str") if isinstance(false, Mapping) else false,
        "target_true_id": true.get("id") if isinstance(true, Mapping) else None,
    }


def _patterns(record: Record) -> dict[str, Any]:
    """Return the patterns of ParaRel that end in the object, as templates."""
    patterns = record.get("patterns")
    if patterns not in (None, []):
        patterns = _texts("a pattern", patterns)
    parts = [pattern.partition("[Y]") for pattern in patterns or ()]
    templates = [
        before.rstrip().replace("[X]", "{}")
        for before, slot, after in parts
        if slot and re.fullmatch(r"\W*", after)
    ]
    if not templates:
        raise UnknownLayout(
            "these triples of ParaRel have no pattern that ends in [Y]. Keep the folders of its "
            "repository: the patterns of data/trex_lms_vocab/P36.jsonl are read from "
            "data/pattern_data/graphs_json/P36.jsonl."
        )
    return {"template": templates}


def _chain(record: Record) -> dict[str, Any]:
    """Return where a chain of MQuAKE begins, and its edited facts as the distractor."""
    questions = _texts("the question", record["questions"])
    try:
        edits = [
            edit["prompt"].replace("{}", edit["subject"]) + " " + edit["target_new"]["str"] + "."
            for edit in record["requested_rewrite"]
        ]
        subject = record["orig"]["triples_labeled"][0][0]
        once = all(question.count(subject) == 1 for question in questions)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(f"a chain of MQuAKE lacks a part: {error!r}.") from None
    return {"subject": subject if once else "", "distractor": " ".join(edits)}


PREPARED: dict[str, Callable[[Record], dict[str, Any]]] = {
    "nested": _nested,
    "ParaRel": _patterns,
    "MQuAKE": _chain,
}
LAYOUTS = tuple(Layout(**row) for row in embedded("layouts.csv"))
