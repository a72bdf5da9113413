"""Is a scheme's effect an artefact of the attention sink? Every scheme with and without "Well.".

    python examples/opening_study.py counterfact.parquet runs/opening 300

Scores a sample of facts at dose 1 under all ten schemes, as they are and after a neutral opening,
and writes both results per model and `opening.md`. Changes are those of the opening, on the same
facts, with intervals about relations like these. If it is interrupted, the same command resumes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hijacklens as hl
from hijacklens.prompts.schemes import schemes
from hijacklens.statistics import clustered

MODELS, OPENING = ("smollm2-135m", "gemma3-270m"), "Well."


def rows(name: str, facts: hl.FactSet, out: Path):
    """A row per scheme: efficacy and shift as they are, after the opening, and the changes."""
    model, sides = hl.load_model(name), []
    for chosen in (facts, facts.with_opening(OPENING)):
        result = hl.hijack(model, chosen, schemes=list(schemes()), doses=[1])
        result.save(out / f"{name}{'-opened' if chosen.opening else ''}", overwrite=True)
        items = result.items.assign(margin=result.items.first_false - result.items.first_true)
        sides.append(items.set_index(["scheme", "case_id", "dose"]).margin.unstack())
    relation = {fact.case_id: fact.relation_id for fact in facts}
    for scheme in schemes():
        plain, opened = (side.loc[scheme].dropna() for side in sides)
        groups = plain.index.map(relation).to_numpy()
        cells = [f"{(side[0] > 0).mean():.3f}" for side in (plain, opened)]
        for signs, values in (("", lambda x: (x[1] > 0) * 1.0), ("+", lambda x: x[1] - x[0])):
            both = values(plain), values(opened)
            cells += [f"{side.mean():{signs}.3f}" for side in both]
            cells.append(str(clustered((both[1] - both[0]).to_numpy(), groups)))
        yield name, scheme, len(plain), *cells


def main(source: str, out: str, limit: str = "300") -> None:
    facts = hl.counterfact(source).limit(int(limit), seed=0)
    header = "model scheme n bare bare-opened efficacy opened change shift opened change"
    table = [tuple(header.split())]
    table += [row for name in MODELS for row in rows(name, facts, Path(out))]
    table.insert(1, ("---",) * len(table[0]))
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in table]
    (Path(out) / "opening.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
