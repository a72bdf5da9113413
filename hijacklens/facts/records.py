"""From records of any layout to a set of facts: checked, completed, and listed where unusable."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from operator import itemgetter
from typing import Any

from hijacklens.errors import InputError
from hijacklens.facts.fact import ALIASES, Fact, FactSet, Skipped, same_name
from hijacklens.facts.joining import Joining, joined
from hijacklens.facts.layouts import LAYOUTS, UnknownLayout, as_registered, layout_of
from hijacklens.facts.relations import (
    LANGUAGE_RELATIONS,
    country_of_language,
    known_aliases,
    relation_id,
    relations,
)

ALLOWED = f"Allowed layouts, by their fields: {'; '.join(map(str, LAYOUTS))}."
TEXTS = ("subject", "template", "target_true", "target_false")
OPTIONAL = ("near_true", "near_false", "relation_id", "distractor")
PARAPHRASES = 1_000_000
"""The case id of a paraphrase is that of its fact plus a multiple of this number."""
RECONSTRUCTED = (
    "the records have relation ids of CounterFact and no target ids. If they are a reconstructed "
    "CounterFact, their relation ids are reconstructed too, and the original counterfact.json "
    "replaces them."
)
PROMPT_DIFFERS = "the template filled in is not the prompt, and the prompt is used"
SPACE_DROPPED = "white space around a text other than the template was dropped"
REPEATED = "no case_id is given and the fact is that of an earlier record, and is scored again"
ONE_THING = "the false target is another common name of the true one"
MOST_NAMED = 12
"""At most this many unused fields are named."""
DRAWN = "the false target was drawn from the true targets of the relation with seed {seed}"


def facts_from_records(
    records: Iterable[Any],
    *,
    name: str,
    joining: Joining = "auto",
    seed: int = 0,
    paraphrases: bool = False,
) -> FactSet:
    """Read records of any layout; an `InputError` among them says why a record is missing.

    Records that cannot be read (an empty target, a duplicate case id) are listed in `skipped`
    with their position and the reason. The options are those of `load_facts`.

    Raises:
        InputError: There are no records, none has a known layout, or none can be used.
    """
    drafts: list[tuple[int, dict[str, Any]]] = []
    unread: list[tuple[int, Skipped]] = []
    origins: dict[str, None] = {}
    unused: dict[str, str] = {}
    position, has_ids, is_counterfact = -1, False, False
    for position, record in enumerate(_flattened(records)):
        fields: Any = record
        try:
            if isinstance(record, InputError):
                raise record
            layout = layout_of(record)
            unused |= layout.unused(record)
            fields = {**layout.read(record), "unused": layout.unused(record)}
            origins[layout.origin_of(record)] = None
            has_ids |= bool(fields.get("target_true_id"))
            is_property = str(fields.get("relation_id")) in relations()
            is_counterfact |= is_property and layout.origin.startswith("CounterFact")
            drafts += [(position, each) for each in _drafts(fields, paraphrases)]
        except InputError as error:
            if position == 0 and isinstance(error, UnknownLayout):
                raise InputError(f"{name}: {error} {ALLOWED}") from None
            unread.append((position, _unusable(fields, position, error)))
    if position < 0:
        raise InputError(f"{name} holds no record. {ALLOWED}")
    count = position + 1
    _number(drafts, {row.case_id for _, row in unread}, count)
    _draw_false([fields for _, fields in drafts], seed)
    facts: dict[int, Fact] = {}
    remarks: dict[str, list[int]] = {
        PROMPT_DIFFERS: [],
        SPACE_DROPPED: [],
        DRAWN: [],
        ONE_THING: [],
    }
    seen: set[tuple[str, ...]] = set()
    for position, fields in drafts:
        try:
            fact = Fact(**_checked(fields))
            if known := facts.get(fact.case_id):
                same = "identical" if known == fact else "different"
                raise InputError(f"it repeats case {fact.case_id} with {same} content")
        except InputError as error:
            unread.append((position, _unusable(fields, position, error)))
            continue
        facts[fact.case_id] = fact
        remarks[PROMPT_DIFFERS] += [fact.case_id] * fields.get("prompt_differs", False)
        remarks[SPACE_DROPPED] += [fact.case_id] * _lost_space(fields, fact, joining)
        remarks[DRAWN] += [fact.case_id] * fields.get("drawn", False)
        remarks[ONE_THING] += [fact.case_id] * fact.names_one_thing(known=True)
        same = (fact.prompt, fact.target_true, fact.target_false)
        if same in seen and not fields["numbered"]:
            remarks.setdefault(REPEATED, []).append(fact.case_id)
        seen.add(same)
    skipped = tuple(row for _, row in sorted(unread, key=lambda pair: pair[0]))
    if not facts:
        raise InputError(f"{name}: none of the {count} records can be used; {skipped[0].reason}")
    notes = [RECONSTRUCTED] if is_counterfact and not has_ids else []
    notes += [
        f"in {len(cases)} records {remark.replace('{seed}', str(seed))} (the first: case "
        f"{cases[0]})."
        for remark, cases in remarks.items()
        if cases
    ]
    notes += [*_alike(fact.relation_id for fact in facts.values()), *_not_used(unused)]
    return FactSet(
        tuple(facts.values()),
        name=name,
        note=" ".join(notes),
        skipped=skipped,
        joining=joining,
        origin="; ".join(filter(None, origins)),
    )


def _alike(names: Iterable[str]) -> Iterator[str]:
    """Yield a note for relations whose names differ in capitals only: each is a cluster."""
    groups: dict[str, dict[str, None]] = {}
    for name in names:
        groups.setdefault(name.casefold(), {})[name] = None
    for group in groups.values():
        if len(group) > 1:
            texts = ", ".join(map(repr, group))
            yield f"the relations {texts} differ in capitals only and count as {len(group)}."


def _not_used(fields: Mapping[str, str]) -> Iterator[str]:
    """Yield one note that names the fields that were not used, if there are any."""
    names = [
        f"{name!r:.60}" + f" (did you mean {near!r}?)" * bool(near) for name, near in fields.items()
    ]
    if names:
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        yield f"not used: the field{'s'[: len(names) > 1]} {', '.join(names[:MOST_NAMED])}{more}."


def _flattened(records: Iterable[Any]) -> Iterator[Any]:
    """Yield records; an object that holds the samples of a relation (LRE) yields one for each."""
    for record in map(as_registered, records):
        if isinstance(record, Mapping) and {"prompt_templates", "samples"} <= record.keys():
            shared = {name: value for name, value in record.items() if name != "samples"}
            samples = record["samples"]
            for sample in samples if isinstance(samples, list) else [samples]:
                if isinstance(sample, Mapping):
                    yield as_registered({**shared, **sample})
                else:
                    yield InputError(f"a sample of LRE must be an object, not {sample!r:.60}.")
        else:
            yield record


def _drafts(fields: dict[str, Any], paraphrases: bool) -> Iterator[dict[str, Any]]:
    """Yield the fields with the case id, if given, and all aliases, once for each template.

    Of a list of targets, the first is the target and the others are its aliases.
    """
    fields["numbered"] = fields.get("case_id") is not None
    case_id = fields["case_id"] if fields["numbered"] else 0
    if isinstance(case_id, str) and re.fullmatch(r"\s*-?\d{1,19}\s*", case_id):
        case_id = int(case_id)  # every cell of a CSV file is text
    if isinstance(case_id, bool) or not isinstance(case_id, int):
        raise InputError(f"case_id must be a whole number, not {case_id!r:.60}.")
    relation = fields.get("relation_id")
    fields["relation_id"] = relation_id(relation) if isinstance(relation, str) else relation
    for name in ALIASES:
        side = name.replace("aliases", "target")
        target, *more = _listed(fields.get(side))
        usual = known_aliases().get(target.strip(), ()) if isinstance(target, str) else ()
        every = dict.fromkeys((*_texts(more), *_texts(fields.get(name)), *usual))
        fields[side], fields[name] = target, tuple(x for x in every if x not in ("", target))
    for i, template in enumerate(_listed(fields["template"])[: None if paraphrases else 1]):
        yield {**fields, "template": template, "case_id": case_id + i * PARAPHRASES}


def _number(drafts: list[tuple[int, dict[str, Any]]], taken: set[int | None], count: int) -> None:
    """Number records without a case id by their positions, or from `count` where an id is taken."""
    taken |= {fields["case_id"] for _, fields in drafts if fields["numbered"]}
    higher = itertools.count(count)
    for position, group in itertools.groupby(drafts, key=itemgetter(0)):
        templates = [fields for _, fields in group if not fields["numbered"]]
        number = position
        while not taken.isdisjoint(number + fields["case_id"] for fields in templates):
            number = next(higher)
        for fields in templates:
            fields["case_id"] += number


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) and value else [value]


def _texts(value: Any) -> list[str]:
    """Return the texts of a list, of the text of a JSON list, or of `one|another`."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError):
            value = json.loads(value)
    texts = value.split("|") if isinstance(value, str) else [] if value is None else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"aliases must be texts, not {value!r:.60}.")
    return [text.strip() for text in texts]


def _draw_false(drafts: list[dict[str, Any]], seed: int) -> None:
    """Give drafts without a false target the true one of another, if one does not answer theirs.

    Facts without a relation draw from those with the same template. Nothing is drawn if any
    record has a false target: the others then lack theirs.
    """
    missing = [draft for draft in drafts if draft["target_false"] is None]
    if len(missing) < len(drafts):
        for draft in missing:
            draft["others_have_one"] = True
        return
    pools: dict[str, dict[str, tuple[tuple[str, ...], set[str]]]] = {}
    answers: dict[Any, set[str]] = {}
    for draft in drafts if missing else ():
        if isinstance(draft["target_true"], str):
            pool, question = _question(draft)
            target, aliases = draft["target_true"].strip(), draft["aliases_true"]
            names = {same_name(name) for name in (target, *aliases)}
            pools.setdefault(pool, {}).setdefault(target, (aliases, names))
            answers.setdefault((pool, question), set()).update(names)
    for draft in missing:
        pool, question = _question(draft)
        taken = answers.get((pool, question), set())
        targets = sorted(pools.get(pool, {}).items())
        others = [target for target, (_, names) in targets if taken.isdisjoint(names)]
        if others:
            # Seeded by the fact, so that its draw does not depend on its position in the set.
            key = hashlib.sha256(f"{seed} {question} {draft['target_true']}".encode()).digest()
            false = random.Random(key).choice(others)
            draft |= {"target_false": false, "aliases_false": pools[pool][false][0], "drawn": True}


def _question(draft: dict[str, Any]) -> tuple[str, str]:
    """Return what shares false targets with a draft, and what its question is about."""
    relation, subject, template = (draft[x] for x in ("relation_id", "subject", "template"))
    return str(relation or template), str(subject or template)


def _checked(fields: dict[str, Any]) -> dict[str, Any]:
    """Check the types of the fields, strip texts but the template, and fill in near words."""
    if fields["target_false"] is None:
        why = "the relation has no other true target to draw."
        if fields.get("others_have_one"):
            why = "other records have one, so none is drawn."
        pairs = fields["unused"].items()
        hints = [f" The field {name!r} may mean {near!r}." for name, near in pairs if near]
        raise InputError(f"there is no false target, and {why}{''.join(hints)}")
    checked = {name: fields[name] for name in ("case_id", *ALIASES)}
    for name in (*TEXTS, *OPTIONAL):
        value = "" if fields.get(name) is None and name in OPTIONAL else fields.get(name)
        if not isinstance(value, str):
            kind = "text or empty" if name in OPTIONAL else "text"
            raise InputError(f"{name} must be {kind}, not {value!r}.")
        checked[name] = value if name == "template" else value.strip()
    for side in ("true", "false"):
        near = checked[f"near_{side}"] or None
        if near is None and checked["relation_id"] in LANGUAGE_RELATIONS:
            near = country_of_language().get(checked[f"target_{side}"])
        checked[f"near_{side}"] = near
    return {**checked, "distractor": checked["distractor"] or None}


def _lost_space(fields: Mapping[str, Any], fact: Fact, joining: Joining) -> bool:
    """Return whether a text of a fact lost white space that scoring does not put back."""
    texts = {name: fields.get(name) or "" for name in (*TEXTS, *OPTIONAL) if name != "template"}
    return any(
        text != text.strip()
        and not (
            name.startswith("target_")
            and fact.prompt + text == joined(fact.prompt, text.strip(), joining)
        )
        for name, text in texts.items()
    )


def _unusable(fields: Any, position: int, error: InputError) -> Skipped:
    """Return the entry for a record that is not a fact, with the fields that can be read."""
    known = fields if isinstance(fields, Mapping) else {}
    case_id = known.get("case_id")
    return Skipped(
        case_id=case_id if type(case_id) is int else None,
        relation_id=_encodable(known.get("relation_id")),
        subject=_encodable(known.get("subject")),
        reason=f"record {position + 1}: {error}",
    )


def _encodable(value: Any) -> str:
    """Return the text of a value that tables can hold: halves of surrogate pairs are escaped."""
    return str(value or "").encode(errors="backslashreplace").decode()
