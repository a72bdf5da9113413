"""The numbers of docs/hijacking: ten schemes at dose 1, with and without a neutral opening.

    python examples/opening_study.py counterfact.parquet runs/opening 300

Scores a sample of facts under all ten schemes, as they are and after "Well.", and writes both
results per model and five tables. Each row is a paired change on the same facts, with its 95%
interval and p-value about relations like these:

- opening.csv: what the opening changes (is an effect an artefact of the attention sink?); `p_holm`
  corrects over the schemes of a model
- effects.csv: hijacked minus bare, in efficacy, shift and log P(true); how many facts `rise`
- flips.csv: the fraction of known facts whose verdict flips
- schemes.csv: one scheme minus another; `equivalent_p` tests that they differ by less than .1
- subject.csv: the change of `relation` where its sentence does or does not begin with the subject

If it is interrupted, the same command resumes.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import pandas as pd

import hijacklens as hl
from hijacklens.prompts.schemes import schemes
from hijacklens.statistics import adjust, clustered, clustered_fraction

MODELS, OPENING = ("smollm2-135m", "gemma3-270m"), "Well."
COMPARED = (("mention", "do-not-think"), ("do-not-think", "think"))
MARGIN = 0.1
"""The largest difference of efficacy between schemes that counts as none."""


class Sample:
    """The scores of one model under all schemes, hijacked and bare: a row per scheme and fact."""

    def __init__(self, result: hl.HijackResult) -> None:
        items = result.items.assign(margin=result.items.first_false - result.items.first_true)
        self.scores = items.set_index(["scheme", "relation_id", "case_id", "dose"])
        self.prompts = result.prompts

    def table(self, scheme: str, measure: str) -> pd.DataFrame:
        """A row per fact, a column per dose: verdicts, margins (nats) or log P(true)."""
        column = {"efficacy": "margin", "shift": "margin", "log P(true)": "first_true"}[measure]
        table = self.scores.loc[scheme][column].unstack().dropna()
        return (table > 0) * 1.0 if measure == "efficacy" else table


def row(change: pd.Series) -> dict:
    """The mean change over facts, clustered by relation."""
    found = clustered(change.to_numpy(), change.index.get_level_values("relation_id").to_numpy())
    return {"n": len(change), **found.columns("change"), "p": found.p}


def begins_with_subject(sample: Sample, facts: hl.FactSet) -> set[int]:
    subjects = {fact.case_id: fact.subject for fact in facts}
    rows = sample.prompts[sample.prompts.scheme == "relation"]
    texts = zip(rows.case_id, rows.sentence, strict=True)
    return {case for case, text in texts if text.startswith(subjects[case])}


def tables(name: str, facts: hl.FactSet, out: Path) -> dict[str, list[dict]]:
    model, sides = hl.load_model(name), {}
    for opening in ("", OPENING):
        chosen = facts.with_opening(opening) if opening else facts
        result = hl.hijack(model, chosen, schemes=list(schemes()), doses=[0, 1])
        result.save(out / f"{name}{'-opened' if opening else ''}", overwrite=True)
        sides[opening] = Sample(result)
    plain, opened = sides.values()
    found = defaultdict(list)
    for scheme in schemes():
        for measure in ("efficacy", "shift"):
            both = [side.table(scheme, measure) for side in (plain, opened)]
            after = [side[1] - (side[0] if measure == "shift" else 0) for side in both]
            means = {"without": after[0].mean(), "with": after[1].mean()}
            one = {"measure": measure, "scheme": scheme, **means}
            found["opening"].append(one | row(after[1] - after[0]))
    bare = [side.table("mention", "efficacy")[0] for side in (plain, opened)]
    means = {"without": bare[0].mean(), "with": bare[1].mean()}
    found["opening"].append({"measure": "bare", **means} | row(bare[1] - bare[0]))
    for opening, side in sides.items():
        for scheme in schemes():
            for measure in ("efficacy", "shift", "log P(true)"):
                table = side.table(scheme, measure)
                change = table[1] - table[0]
                one = {"opening": opening, "scheme": scheme, "measure": measure}
                found["effects"].append(one | row(change) | {"rise": (change > 0).sum()})
            wins = side.table(scheme, "efficacy")
            known = wins[side.table(scheme, "shift")[0] < 0]
            of = known.index.get_level_values("relation_id").to_numpy()
            flips = clustered_fraction(known[1].to_numpy(), of).columns("flips")
            found["flips"].append({"opening": opening, "scheme": scheme, "n": len(known), **flips})
        for first, second in COMPARED:
            wins = [side.table(scheme, "efficacy")[1] for scheme in (first, second)]
            of = wins[0].index.get_level_values("relation_id").to_numpy()
            same = clustered((wins[0] - wins[1]).to_numpy(), of).equivalence(MARGIN)
            one = {"opening": opening, "schemes": f"{first} - {second}"}
            found["schemes"].append(one | row(wins[0] - wins[1]) | {"equivalent_p": same})
    wins = [side.table("relation", "efficacy")[1] for side in (plain, opened)]
    begins = wins[0].index.get_level_values("case_id").isin([*begins_with_subject(plain, facts)])
    for first, inside in (("subject", begins), ("another word", ~begins)):
        found["subject"].append({"begins with": first} | row((wins[1] - wins[0])[inside]))
    for measure in ("efficacy", "shift"):
        rows = [one for one in found["opening"] if one["measure"] == measure]
        p = pd.Series([one["p"] for one in rows]).fillna(1)
        for one, corrected in zip(rows, adjust(p.to_numpy(), correction="holm"), strict=True):
            one["p_holm"] = corrected
    return found


def main(source: str, out: str, limit: str = "300") -> None:
    facts = hl.counterfact(source).limit(int(limit), seed=0)
    every = {name: tables(name, facts, Path(out)) for name in MODELS}
    for kind in every[MODELS[0]]:
        frames = [pd.DataFrame(every[name][kind]).assign(model=name) for name in MODELS]
        table = pd.concat(frames).set_index("model").reset_index()
        table.to_csv(Path(out) / f"{kind}.csv", index=False)
        print(f"\n{kind}.csv\n{table.round(3).to_string()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
