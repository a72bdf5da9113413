"""Does a near word hijack by its meaning? Against a word as common, and by spelling.

    python examples/near_word_study.py counterfact.parquet runs/near-words 500

Facts about languages are scored on the bare query, after "Do not think of {country}." with the
country of the false target's language (the near word), and after the same sentence with another
country, which is about as often a target in CounterFact and belongs to neither target. Near words
that begin with the same three letters as their language (Russia, Russian) are compared with those
that do not (Israel, Hebrew). Writes both results per model and `near-words.md`. Intervals are 95%,
for languages (false targets) like these and for relations like these. If it is interrupted, the
same command resumes.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

import hijacklens as hl
from hijacklens.facts.relations import country_of_language
from hijacklens.statistics import clustered, clustered_fraction

MODELS = ("smollm2-135m", "gemma3-270m")
RELATIONS = ["P1412", "P103", "P37", "P364", "P407"]


def matched(facts: hl.FactSet, every: hl.FactSet) -> hl.FactSet:
    """Return the facts with another country as near word, of the three nearest in frequency."""
    counts = Counter(target for fact in every for target in (fact.target_true, fact.target_false))
    countries = sorted(set(country_of_language().values()))
    draw = np.random.default_rng(0)

    def other(fact) -> str:
        free = [word for word in countries if word not in (fact.near_true, fact.near_false)]
        own = 1 + counts[fact.near_false]
        nearest = sorted(free, key=lambda word: abs(math.log((1 + counts[word]) / own)))[:3]
        return nearest[draw.integers(len(nearest))]

    return replace(facts, facts=tuple(replace(fact, near_false=other(fact)) for fact in facts))


def rows(name: str, facts: hl.FactSet, others: hl.FactSet, out: Path):
    """A row per group of facts: efficacy bare, after each word, and the difference between both."""
    model, sides = hl.load_model(name), []
    for kind, chosen in (("near", facts), ("matched", others)):
        result = hl.hijack(model, chosen, schemes=["near-word"], doses=[1])
        result.save(out / f"{name}-{kind}", overwrite=True)
        items = result.items.assign(margin=result.items.first_false - result.items.first_true)
        sides.append(items.set_index(["case_id", "dose"]).margin.unstack().loc[:, [0, 1]])
    near, other = (side.loc[[fact.case_id for fact in facts]] for side in sides)
    language = np.array([fact.target_false for fact in facts])
    relation = np.array([fact.relation_id for fact in facts])
    alike = np.array([str(f.near_false)[:3] == f.target_false[:3] for f in facts])
    groups = {"all": alike | True, "alike": alike, "not alike": ~alike}
    for group, inside in groups.items():
        of, bare = language[inside], near.loc[inside, 0].to_numpy()
        after = [side.loc[inside, 1].to_numpy() for side in (near, other)]
        cells = [str(clustered_fraction(side > 0, of)) for side in (bare, *after)]
        wins = (after[0] > 0) * 1.0 - (after[1] > 0)
        for change, most in ((wins, 1.0), (after[0] - after[1], math.inf)):
            found = [clustered(change, by).within(-most, most) for by in (of, relation[inside])]
            cells += [*map(str, found), ", ".join(f"{each.p:.2g}" for each in found)]
        yield name, group, inside.sum(), len(set(of)), *cells


def main(source: str, out: str, limit: str = "500") -> None:
    every = hl.counterfact(source)
    facts = every.where(relation=RELATIONS)
    usable = [
        fact.case_id
        for fact in facts
        if fact.near_true and fact.near_false and fact.near_true != fact.near_false
    ]
    facts = facts.where(case_ids=usable).limit(int(limit), seed=0)
    others = matched(facts, every)
    print(Counter(f"{a.near_false} ~ {b.near_false}" for a, b in zip(facts, others, strict=True)))
    head = ["model", "near word", "n", "languages", "bare", "near", "matched"]
    for what in ("efficacy", "margin (nats)"):
        head += [f"{what}: near - matched, languages", "the same, relations", "p"]
    table = [head, ["---"] * len(head)]
    for name in MODELS:
        for row in rows(name, facts, others, Path(out)):
            table.append([str(cell) for cell in row])
            print(*table[-1], sep=" | ", flush=True)
    lines = ["| " + " | ".join(row) + " |" for row in table]
    (Path(out) / "near-words.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
