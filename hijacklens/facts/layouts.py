"""The layouts of facts: how a record of each gives the fields of a `Fact`.

`LAYOUTS` is the registry: published data sets, pairs of answers to a prompt, and our own layout (of
the embedded atlas, and of files written by users). A record has the first layout whose fields it
has; its other fields are ignored. To add a data set, add a reader, which returns the fields of
`Fact` unchecked. Several templates are paraphrases; a false target of None is drawn later.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from hijacklens.errors import InputError
from hijacklens.facts.fact import Fact

Record = Mapping[str, Any]
QUESTION = "Q: {} A:"
"""The prompt of a question, as the authors of PopQA write it for models not tuned for chat."""


class UnknownLayout(InputError):
    """A record that has none of the layouts."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the records of a data set are recognised and read."""

    name: str
    fields: str
    """The fields that a record has, separated by spaces; `a|b` is one of them."""
    read: Callable[[Record], dict[str, Any]]
    origin: str = ""
    """The data set, its licence and its address."""

    def __str__(self) -> str:
        fields = self.fields.replace(" ", ", ").replace("|", " or ")
        return f"{self.name} ({fields})"

    def fits(self, record: Record) -> bool:
        """Return whether a record has the fields."""
        return all(record.keys() & field.split("|") for field in self.fields.split())


def layout_of(record: Any) -> Layout:
    """Return the layout of a record.

    Raises:
        UnknownLayout: It is not an object with named fields, or has no known layout.
    """
    if not isinstance(record, Mapping):
        raise UnknownLayout(f"a record must be an object with named fields, not {record!r:.60}.")
    for layout in LAYOUTS:
        if layout.fits(record):
            return layout
    columns = ", ".join(map(str, list(record)[:12])) or "no fields at all"
    lists = [name for name, value in record.items() if _holds_objects(value)]
    cure = f" The list {lists[0]!r} may hold records; save it alone." if lists else ""
    if len(record) == 1 and re.search("[;\t]", columns):
        cure = " Separate the columns by commas."
    raise UnknownLayout(f"the fields ({columns}) match no known layout.{cure}")


def _holds_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _nested(record: Record) -> dict[str, Any]:
    rewrite = record["requested_rewrite"]
    if not isinstance(rewrite, Mapping):
        cure = " Write a record for each of its entries." if isinstance(rewrite, list) else ""
        raise InputError(f"requested_rewrite must be an object, not {rewrite!r:.60}.{cure}")
    true, false = rewrite.get("target_true"), rewrite.get("target_new")
    return {
        "case_id": record.get("case_id"),
        "relation_id": rewrite.get("relation_id"),
        "subject": rewrite.get("subject"),
        "template": rewrite.get("prompt"),
        "target_true": true.get("str") if isinstance(true, Mapping) else true,
        "target_false": false.get("str") if isinstance(false, Mapping) else false,
        "target_true_id": true.get("id") if isinstance(true, Mapping) else None,
    }


def _flat(record: Record) -> dict[str, Any]:
    """Read a record that has the fields of a fact, perhaps with a prompt or under other names."""
    relation, template = record.get("relation"), record.get("template")
    if "template" in record:
        names = ("subject", "target_true")
        if missing := [name for name in names if name not in record]:
            raise UnknownLayout(f"required fields are missing: {', '.join(map(repr, missing))}.")
    elif isinstance(relation, str) and "{}" in relation:
        template, relation = relation, None  # in other data sets a name, such as "capital"
    return {
        "relation_id": relation,
        "target_false": record.get("target_new"),
        **{name: record[name] for name in Fact.__dataclass_fields__ if name in record},
        "target_true_id": record.get("target_true_id"),
        **_slotted(record, template),
    }


def _slotted(record: Record, template: Any = None) -> dict[str, Any]:
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


def _pair(record: Record) -> dict[str, Any]:
    """Read two answers to a prompt, of which the first is the true target."""
    answers = {"target_true": record.get("answer_a"), "target_false": record.get("answer_b")}
    return _flat({**answers, **record, "subject": record.get("subject") or ""})


def _easyedit(record: Record) -> dict[str, Any]:
    return _flat({**record, "target_true": record["ground_truth"]})


def _known(record: Record) -> dict[str, Any]:
    return _flat({**record, "case_id": record["known_id"], "target_true": record["attribute"]})


def _popqa(record: Record) -> dict[str, Any]:
    question = _slotted({"prompt": record["question"], "subject": record["subj"]})["template"]
    return {
        "case_id": record.get("id"),
        "relation_id": record["prop"],
        "subject": record["subj"],
        "template": QUESTION.format(question),
        "target_true": record["obj"],
        "aliases_true": record.get("possible_answers"),
    }


def _lre(record: Record) -> dict[str, Any]:
    return {
        "relation_id": record["name"],
        "subject": record["subject"],
        "template": record["prompt_templates"],
        "target_true": record["object"],
    }


def _pararel(record: Record) -> dict[str, Any]:
    """Read a triple; its patterns are templates if they end in the object."""
    parts = [str(pattern).partition("[Y]") for pattern in record.get("patterns") or ()]
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
    return {
        "relation_id": record.get("predicate_id"),
        "subject": record["sub_label"],
        "template": templates,
        "target_true": record["obj_label"],
    }


def _mquake(record: Record) -> dict[str, Any]:
    """Read questions about a chain of facts; the edited facts of the chain are the distractor."""
    try:
        edits = [
            f"{edit['prompt'].replace('{}', edit['subject'])} {edit['target_new']['str']}."
            for edit in record["requested_rewrite"]
        ]
        subject, questions = record["orig"]["triples_labeled"][0][0], list(record["questions"])
        if any(question.count(subject) != 1 for question in questions):
            subject = ""
        slotted = [text.replace(subject, "{}") if subject else text for text in questions]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(f"a chain of MQuAKE lacks a part: {error!r}.") from None
    return {
        "case_id": record.get("case_id"),
        "subject": subject,
        "template": [QUESTION.format(text) for text in slotted],
        "target_true": record["answer"],
        "target_false": record["new_answer"],
        "aliases_true": record.get("answer_alias"),
        "aliases_false": record.get("new_answer_alias"),
        "distractor": " ".join(edits),
    }


def _nq_swap(record: Record) -> dict[str, Any]:
    """Read a question with a context that names a substituted answer: the distractor."""
    true, false = (texts_of(record[name]) or ("",) for name in ("org_answer", "sub_answer"))
    return {
        "subject": "",
        "template": QUESTION.format(record["question"]),
        "target_true": true[0],
        "target_false": false[0],
        "aliases_true": true,
        "aliases_false": false,
        "distractor": record["sub_context"],
    }


def texts_of(value: Any) -> tuple[Any, ...]:
    """Return the texts of a list, of the text of a JSON list, or of `one|another`."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, str):
        value = value.split("|")
    return tuple(value) if isinstance(value, Iterable) else () if value is None else (value,)


COUNTERFACT = "CounterFact (MIT, https://rome.baulab.info/data/dsets/counterfact.json)"
LAYOUTS = (
    Layout(
        "MQuAKE",
        "requested_rewrite questions answer new_answer orig",
        _mquake,
        "MQuAKE (licence not stated, https://github.com/princeton-nlp/MQuAKE)",
    ),
    Layout("nested", "requested_rewrite", _nested, COUNTERFACT),
    Layout(
        "known facts",
        "known_id subject template attribute",
        _known,
        "ROME's known facts (MIT, https://rome.baulab.info/data/dsets/known_1000.json)",
    ),
    Layout(
        "PopQA",
        "subj prop obj question",
        _popqa,
        "PopQA (MIT, https://huggingface.co/datasets/akariasai/PopQA)",
    ),
    Layout(
        "LRE",
        "name prompt_templates subject object",
        _lre,
        "LRE relations (licence not stated, https://github.com/evandez/relations)",
    ),
    Layout(
        "ParaRel",
        "sub_label obj_label",
        _pararel,
        "ParaRel (MIT, https://github.com/yanaiela/pararel)",
    ),
    Layout(
        "NQ-Swap",
        "question org_answer sub_context sub_answer",
        _nq_swap,
        "NQ-Swap (MIT, https://huggingface.co/datasets/pminervini/NQ-Swap)",
    ),
    Layout("own", "template", _flat),
    Layout("EasyEdit", "prompt subject ground_truth", _easyedit, COUNTERFACT),
    Layout("tracing", "prompt|relation subject target_true", _flat, COUNTERFACT),
    Layout("pair", "prompt answer_a|target_true answer_b|target_false", _pair),
)
"""The registry, in the order in which layouts are tried."""
