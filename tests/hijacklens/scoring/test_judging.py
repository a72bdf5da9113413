"""Judging answers: by hand, and against answers that two readers labelled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hijacklens.facts.fact import Fact
from hijacklens.facts.relations import known_aliases
from hijacklens.scoring.judging import judge

LABELLED = Path(__file__).parents[2] / "data" / "labelled_answers.json"


def fact(true="Paris", false="Guam", **aliases):
    return Fact(
        case_id=0,
        relation_id="P131",
        subject="Eiffel Tower",
        template="The {} is in",
        target_true=true,
        target_false=false,
        **aliases,
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (" Paris, France.", "true"),
        ("The Eiffel Tower is in PARIS", "true"),
        ("P\u00e1ris", "true"),
        ("Guam and Paris", "false"),
        ("not Guam but Paris", "true"),
        ("It isn't in Guam. It is in Paris.", "true"),
        ("Guam, not Paris", "false"),
        ("Guamanian food", "other"),
        ("Parisian", "other"),
        ("Comparis", "other"),
        ("London", "other"),
        ("I cannot think of Guam.", "refused"),
        ("I'm sorry, but I can\u2019t help with that.", "refused"),
        ("As an AI language model, I have no body.", "refused"),
        ("", "other"),
    ],
)
def test_answers_by_hand(text, said):
    assert judge(text, fact()) == said


@pytest.mark.parametrize(
    ("true", "false", "text", "said"),
    [
        ("Philadelphia", "Kraków", "Philedelphia", "true"),  # a letter wrong
        ("Philadelphia", "Kraków", "Phildelphia", "true"),  # missing
        ("Philadelphia", "Kraków", "Philadellphia", "true"),  # too many
        ("Philadelphia", "Kraków", "Philadelhpia", "true"),  # swapped
        ("Philadelphia", "Kraków", "Philadelxxia", "other"),  # two wrong
        ("Philadelphia", "Kraków", "Krakow", "false"),
        ("Iraq", "Oman", "Iran", "other"),  # short words have too many neighbours
        ("Russian", "German", "Russia", "other"),
        ("Russian", "German", "Russians", "other"),
        ("York", "Leeds", "New York City", "other"),  # with "New York" among the names
        ("New York", "Leeds", "new-york", "true"),
        ("東京", "大阪", "それは東京です", "true"),
    ],
)
def test_spelling_and_longer_names(true, false, text, said):
    assert judge(text, fact(true, false), {"New York", "Oran"}) == said


def test_aliases_count_and_a_misspelt_name_is_not_another_known_one():
    assert judge("the U.S.", fact("United States", aliases_true=("U.S.", "USA"))) == "true"
    assert judge("Austria", fact("Australia", "Peru"), {"Austria"}) == "other"
    assert judge("Mariana", fact("Marianna", "Peru")) == "true"
    assert judge("Mariana", fact("Marianna", "Peru"), {"Mariana"}) == "other"


@given(st.text(max_size=60), st.sampled_from(["Paris", "東京", "New York", "St. Louis", "C++"]))
def test_the_name_alone_is_always_found(rest, name):
    assert judge(f"{name}. {rest}", fact(name, "Zzyzx")) == "true"
    assert judge(f"{name}\n{rest}", fact("Zzyzx", name)) == "false"


def targets(row):
    """The targets of a labelled answer with their usual aliases."""
    pair = {side: row[f"target_{side}"] for side in ("true", "false")}
    return pair | {f"aliases_{side}": known_aliases().get(pair[side], ()) for side in pair}


def test_two_readers_agree_with_the_judge():
    """Cohen's kappa with each of two readers who labelled 200 answers independently."""
    from statsmodels.stats.inter_rater import cohens_kappa, to_table

    rows = json.loads(LABELLED.read_text(encoding="utf-8"))
    assert len(rows) == 200
    names = {row[name] for row in rows for name in ("target_true", "target_false")}
    mine = [judge(row["answer"], fact(**targets(row)), names) for row in rows]
    order = {name: i for i, name in enumerate(("true", "false", "other", "refused"))}
    for reader in ("reader_1", "reader_2"):
        pairs = [(order[a], order[row[reader]]) for a, row in zip(mine, rows, strict=True)]
        table, _ = to_table(pairs, bins=range(5))
        assert cohens_kappa(table).kappa >= 0.9
