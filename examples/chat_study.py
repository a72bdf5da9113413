"""The study of docs/chat: verdicts and answers of models in a chat and as plain text.

python examples/chat_study.py OUT [--limit 300] [--asked 150]

Scores facts of the atlas under two schemes at dose 1, with the sentences in the user's turn, the
system turn or an earlier turn, and as plain text, and generates an answer to each prompt. Every
form is saved in OUT/runs, so that the command resumes. Writes OUT/answers.csv, OUT/agreement.csv,
OUT/efficacy.csv (changes against the bare query) and OUT/forms.csv (paired tests of the turns).
Of the facts, `--asked` are also asked in the user's turn.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path

import pandas as pd

import hijacklens as hl
from hijacklens.statistics import adjust, clustered

SCHEMES = ("do-not-think", "relation")
TURNS = ("user", "system", "earlier")
ASKERS = ("assistant", "user")
CHATS = {
    f"{turn}, query by {asker}": hl.Chat(hijack=turn, query=asker)
    for asker in ASKERS
    for turn in TURNS
}
FORMS = {"plain": None, **CHATS}
MODELS = {"smollm2-135m": tuple(FORMS), "gemma3-270m": ("plain",)}


def measured(model: object, folder: Path, facts: hl.FactSet, *, made: hl.Generation) -> tuple:
    """Return the scores and the answers of one form, from its folder if they are there."""
    if not (folder / "said").exists():
        result = hl.hijack(model, facts, schemes=SCHEMES, doses=[0, 1])
        result.save(folder / "scored", overwrite=True)
        hl.answers(model, facts, result, generation=made).save(folder / "said")
    return hl.load_result(folder / "scored"), hl.load_result(folder / "said")


def tables(result: hl.HijackResult, said: object) -> dict[str, pd.DataFrame]:
    """Return what hijacking changes in one form, what is said, and how both agree."""
    changes = [
        result.compare(0, 1, scheme=scheme, rule="first").changes().assign(scheme=scheme)
        for scheme in SCHEMES
    ]
    return {
        "efficacy": pd.concat(changes),
        "answers": said.summary(),
        "agreement": said.agreement(),
    }


def between(forms: dict[str, tuple]) -> pd.DataFrame:
    """Compare the turns of the hijack in pairs: efficacy, shift, and what is said.

    Each fact is compared with itself, at dose 1, by the rule `first`. Intervals and p-values are
    about relations like these; p-values are corrected over all rows by Holm's method.
    """
    rows = []
    for asker in ASKERS:
        for first, second in combinations(TURNS, 2):
            names = [f"{turn}, query by {asker}" for turn in (first, second)]
            (scored, said), (other, other_said) = (forms[name] for name in names)
            table = hl.compare(scored, other, first={"rule": "first"}, second={"rule": "first"})
            keys = ["case_id", "relation_id", "scheme", "dose", "sample"]
            both = said.answers.merge(other_said.answers, on=keys)
            both["change"] = (both["said_y"] == "false").astype(float) - (both["said_x"] == "false")
            for scheme in SCHEMES:
                verdicts = table.verdicts[
                    (table.verdicts["scheme"] == scheme) & (table.verdicts["dose"] == 1)
                ]
                answers = both[(both["scheme"] == scheme) & (both["dose"] == 1)]
                changes = {
                    measure: table.estimate(verdicts, measure, ("relation",))
                    for measure in ("efficacy", "shift")
                }
                relations = answers["relation_id"].to_numpy(str)
                changes["says false"] = clustered(answers["change"].to_numpy(float), relations)
                rows += [
                    {"query": asker, "from": first, "to": second, "scheme": scheme}
                    | {"measure": measure, "change": change.value, "low": change.low}
                    | {"high": change.high, "p": change.p}
                    for measure, change in changes.items()
                ]
    table = pd.DataFrame(rows)
    return table.assign(p_holm=adjust(table["p"].to_numpy(float), correction="holm"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--asked", type=int, default=150)
    parser.add_argument("--tokens", type=int, default=16)
    given = parser.parse_args()
    facts = hl.atlas().limit(given.limit, seed=0)
    asked = facts.limit(given.asked, seed=0)
    made = hl.Generation(tokens=given.tokens)
    parts = []
    for name, forms in MODELS.items():
        model = hl.load_model(name)
        found = {}
        for form in forms:
            few = asked if form.endswith("query by user") else facts
            folder = given.out / "runs" / f"{name}, {form}"
            found[form] = measured(model, folder, few.in_chat(FORMS[form]), made=made)
        parts += [
            {key: table.assign(form=form, model=name) for key, table in tables(*both).items()}
            for form, both in found.items()
        ]
        if len(found) > 1:
            parts.append({"forms": between(found).assign(model=name)})
    for key in ("efficacy", "answers", "agreement", "forms"):
        table = pd.concat([part[key] for part in parts if key in part], ignore_index=True)
        table.to_csv(given.out / f"{key}.csv", index=False)
        print(table.round(3).to_string())


if __name__ == "__main__":
    main()
