"""All of CounterFact under the generic scheme: a table and a curve per relation.

    python examples/counterfact_study.py counterfact.json runs/counterfact

Scores 21,919 facts at doses 0 to 5 (131,514 prompts) and writes the result, `relations.md`,
`generic.png` and `relations.png`. If it is interrupted, the same command resumes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hijacklens as hl
from hijacklens import plots
from hijacklens.facts.relations import relations
from hijacklens.results.glance import fraction

SCHEME, DOSES, SHOWN = "do-not-think", range(6), (0, 1, 5)


def row(name: str, table) -> str:
    at = table.set_index("dose")
    cells = [name, f"{at['n'].iloc[0]:,}"]
    for dose in SHOWN:
        low, high = fraction(at.efficacy_low[dose]), fraction(at.efficacy_high[dose])
        cells.append(f"{fraction(at.efficacy[dose])} [{low}, {high}]")
    cells += [f"{at.mean_shift[dose]:+.2f}" for dose in SHOWN[1:]]
    return "| " + " | ".join(cells) + " |"


def main(source: str, out: str, name: str = "smollm2-135m") -> None:
    result = hl.hijack(hl.load_model(name), hl.counterfact(source), schemes=[SCHEME], doses=DOSES)
    folder = Path(out)
    result.save(folder, overwrite=True)
    heads = [f"efficacy, dose {d} [Wilson]" for d in SHOWN] + [
        f"shift, dose {d}" for d in SHOWN[1:]
    ]
    lines = ["| relation | n | " + " | ".join(heads) + " |", "|---|" + "---|" * (len(heads) + 1)]
    shown = sorted(result.items.relation_id.unique(), key=lambda r: int(r[1:]))
    lines += [row("**all**", result.summary())]
    lines += [row(f"{r} {relations()[r].label}", result.summary(relation=r)) for r in shown]
    (folder / "relations.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plots.write(result.plot(), folder / "generic.png")
    plots.write(result.plot_relations(), folder / "relations.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
