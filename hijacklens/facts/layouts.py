"""The layouts of CounterFact, and how a record of each becomes a `Fact`.

| layout | recognised by | used by |
|---|---|---|
| nested | `requested_rewrite` | ROME, MEMIT (`counterfact.json`) |
| tracing | `target_true` with `target_false` or `target_new` | NeelNanda/counterfact-tracing |
| EasyEdit | `ground_truth` | EasyEdit (no relation ids) |
| own | `template` | the embedded atlas, and files written by users |

Other fields are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from hijacklens.errors import InputError
from hijacklens.facts.fact import Fact, FactSet, Skipped
from hijacklens.facts.joining import Joining, joined
from hijacklens.facts.relations import LANGUAGE_RELATIONS, country_of_language, relations

Record = Mapping[str, Any]

ALLOWED = (
    "Allowed layouts: nested (requested_rewrite {prompt, relation_id, target_new, target_true, "
    "subject}), tracing (subject, relation or prompt, target_true, target_false), EasyEdit "
    "(prompt, subject, ground_truth, target_new), or hijacklens' own (subject, template, "
    "target_true, target_false)."
)
TEXTS = ("subject", "template", "target_true", "target_false")
OPTIONAL = ("near_true", "near_false", "relation_id")
RECONSTRUCTED = (
    "the records have relation ids of CounterFact and no target ids. If they are a reconstructed "
    "CounterFact, their relation ids are reconstructed too, and the original counterfact.json "
    "replaces them."
)
PROMPT_DIFFERS = "the template filled in is not the prompt, and the prompt is used"
SPACE_DROPPED = "white space around a text other than the template was dropped"


class _UnknownLayout(InputError):
    """A record that has none of the layouts."""


def facts_from_records(records: Iterable[Any], *, name: str, joining: Joining = "auto") -> FactSet:
    """Read records of any one layout; an `InputError` among them says why a record is missing.

    Records that cannot be read (an empty target, a duplicate case id) are listed in `skipped`
    with their position and the reason.

    Raises:
        InputError: There are no records, none has a known layout, or none can be used.
    """
    facts: dict[int, Fact] = {}
    skipped: list[Skipped] = []
    count, has_ids, is_counterfact = 0, False, False
    remarks: dict[str, list[int]] = {PROMPT_DIFFERS: [], SPACE_DROPPED: []}
    for position, record in enumerate(records):
        count += 1
        fields: Any = record
        try:
            if isinstance(record, InputError):
                raise record
            fields = _fields(record)
            has_ids = has_ids or bool(fields.pop("target_true_id"))
            differs = fields.pop("prompt_differs", False)
            fact = Fact(**_checked(fields, position))
            is_counterfact |= "template" not in record and fact.relation_id in relations()
        except _UnknownLayout as error:
            if position == 0:
                raise InputError(f"{name}: {error} {ALLOWED}") from None
            skipped.append(_unusable(fields, position, error))
            continue
        except InputError as error:
            skipped.append(_unusable(fields, position, error))
            continue
        if fact.case_id in facts:
            same = "identical" if facts[fact.case_id] == fact else "different"
            reason = f"record {position + 1} repeats case {fact.case_id} with {same} content"
            skipped.append(Skipped(fact.case_id, fact.relation_id, fact.subject, reason))
            continue
        facts[fact.case_id] = fact
        remarks[PROMPT_DIFFERS] += [fact.case_id] * differs
        remarks[SPACE_DROPPED] += [fact.case_id] * _lost_space(fields, fact, joining)
    if count == 0:
        raise InputError(f"{name} holds no record. {ALLOWED}")
    if not facts:
        raise InputError(f"{name}: none of the {count} records can be used; {skipped[0].reason}")
    notes = [RECONSTRUCTED] if is_counterfact and not has_ids else []
    notes += [
        f"in {len(cases)} records {remark} (the first: case {cases[0]})."
        for remark, cases in remarks.items()
        if cases
    ]
    return FactSet(
        tuple(facts.values()),
        name=name,
        note=" ".join(notes),
        skipped=tuple(skipped),
        joining=joining,
    )


def _lost_space(fields: Mapping[str, Any], fact: Fact, joining: Joining) -> bool:
    """Return whether a text of a fact lost white space that scoring does not put back."""
    return any(
        fields[name]
        and fields[name] != (kept := getattr(fact, name))
        and not (
            name.startswith("target_")
            and fact.prompt + fields[name] == joined(fact.prompt, kept, joining)
        )
        for name in (*TEXTS, *OPTIONAL)
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


def _fields(record: Any) -> dict[str, Any]:
    """Return the fields of a `Fact`, unchecked, from a record of any layout."""
    if not isinstance(record, Mapping):
        raise _UnknownLayout(f"a record must be an object with named fields, not {record!r:.60}.")
    names = ("case_id", "relation_id", "subject", "near_true", "near_false", "target_true_id")
    fields = {name: record.get(name) for name in names}
    if "requested_rewrite" in record:
        rewrite = record["requested_rewrite"]
        if not isinstance(rewrite, Mapping):
            cure = " Write a record for each of its entries." if isinstance(rewrite, list) else ""
            raise InputError(f"requested_rewrite must be an object, not {rewrite!r:.60}.{cure}")
        true, false = rewrite.get("target_true"), rewrite.get("target_new")
        return fields | {
            "relation_id": rewrite.get("relation_id"),
            "subject": rewrite.get("subject"),
            "template": rewrite.get("prompt"),
            "target_true": true.get("str") if isinstance(true, Mapping) else true,
            "target_false": false.get("str") if isinstance(false, Mapping) else false,
            "target_true_id": true.get("id") if isinstance(true, Mapping) else None,
            "near_true": None,
            "near_false": None,
        }
    true, false = record.get("target_true"), record.get("target_false", record.get("target_new"))
    if "template" in record:
        if missing := [name for name in TEXTS if name not in record]:
            raise _UnknownLayout(f"required fields are missing: {', '.join(map(repr, missing))}.")
        template = record["template"]
    elif {"subject"} < record.keys() & {"subject", "prompt", "relation"} and (
        "ground_truth" in record
        or ("target_true" in record and record.keys() & {"target_false", "target_new"})
    ):
        # In other data sets `relation` is a name, such as "capital".
        relation = record.get("relation")
        template = relation if isinstance(relation, str) and "{}" in relation else None
        if "ground_truth" in record:
            true, false = record["ground_truth"], record.get("target_new")
    else:
        columns = ", ".join(map(str, list(record)[:12])) or "no fields at all"
        lists = [name for name, value in record.items() if _holds_objects(value)]
        cure = f" The list {lists[0]!r} may hold records; save it alone." if lists else ""
        if len(record) == 1 and re.search("[;\t]", columns):
            cure = " Separate the columns by commas."
        raise _UnknownLayout(f"the fields ({columns}) match no known layout.{cure}")
    fields |= {"target_true": true, "target_false": false}
    return fields | _asked(record, template)


def _holds_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _asked(record: Record, template: Any) -> dict[str, Any]:
    """Return the template of a record, and whether its prompt is not the template filled in.

    The prompt then counts, as it is the complete text. A prompt may be a template itself.
    """
    prompt, subject = record.get("prompt"), record.get("subject")
    if not isinstance(prompt, str) or not isinstance(subject, str) or not subject.strip():
        return {"template": template if template is not None else prompt}
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
    differs = template is not None
    return {"template": prompt.replace(subject, "{}"), "prompt_differs": differs}


def _checked(fields: dict[str, Any], position: int) -> dict[str, Any]:
    """Check the types of the fields, strip texts but the template, and fill in near words."""
    case_id = position if fields["case_id"] is None else fields["case_id"]
    if isinstance(case_id, str) and re.fullmatch(r"\s*-?\d{1,19}\s*", case_id):
        case_id = int(case_id)  # every cell of a CSV file is text
    if isinstance(case_id, bool) or not isinstance(case_id, int):
        raise InputError(f"case_id must be a whole number, not {case_id!r:.60}.")
    checked: dict[str, Any] = {"case_id": case_id}
    for name in (*TEXTS, *OPTIONAL):
        value = "" if fields[name] is None and name in OPTIONAL else fields[name]
        if not isinstance(value, str):
            kind = "text or empty" if name in OPTIONAL else "text"
            raise InputError(f"{name} must be {kind}, not {value!r}.")
        checked[name] = value if name == "template" else value.strip()
    for side in ("true", "false"):
        near = checked[f"near_{side}"] or None
        if near is None and checked["relation_id"] in LANGUAGE_RELATIONS:
            near = country_of_language().get(checked[f"target_{side}"])
        checked[f"near_{side}"] = near
    return checked
