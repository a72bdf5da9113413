"""The study of docs/chat: verdicts and answers of models in a chat and as plain text.

python examples/chat_study.py OUT [--limit 100]

Scores facts of the atlas under two schemes at dose 1, with the sentences in the user's turn, the
system turn or an earlier turn, and as plain text, and generates an answer to each prompt. Writes
OUT/answers.csv, OUT/efficacy.csv (with changes against the bare query) and OUT/agreement.csv.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

import hijacklens as hl

SCHEMES = ("do-not-think", "relation")
FORMS = {
    "plain": None,
    **{
        f"{turn}, query by {asker}": hl.Chat(hijack=turn, query=asker)
        for asker in ("assistant", "user")
        for turn in ("user", "system", "earlier")
    },
}
MODELS = {"smollm2-135m": tuple(FORMS), "gemma3-270m": ("plain",)}


def measured(model: object, name: str, form: str, facts: hl.FactSet) -> dict[str, pd.DataFrame]:
    """Return the tables of one model and form."""
    facts = facts.in_chat(FORMS[form])
    result = hl.hijack(model, facts, schemes=SCHEMES, doses=[0, 1])
    said = hl.answers(model, facts, result, generation=hl.Generation(tokens=16))
    changes = pd.concat(
        [
            result.compare(0, 1, scheme=scheme, rule="first").changes().assign(scheme=scheme)
            for scheme in SCHEMES
        ]
    )
    tables = {
        "efficacy": changes[changes["measure"].isin(["efficacy", "margin"])],
        "answers": said.summary(),
        "agreement": said.agreement(),
    }
    return {key: table.assign(form=form, model=name) for key, table in tables.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=int, default=100)
    given = parser.parse_args()
    facts = hl.atlas().limit(given.limit, seed=0)
    parts = [
        measured(model, name, form, facts)
        for name, forms in MODELS.items()
        for model in [hl.load_model(name)]
        for form in forms
    ]
    given.out.mkdir(parents=True, exist_ok=True)
    for key in parts[0]:
        table = pd.concat([part[key] for part in parts], ignore_index=True)
        table.to_csv(given.out / f"{key}.csv", index=False)
        print(table.round(3).to_string())


if __name__ == "__main__":
    main()
