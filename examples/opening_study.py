"""Is a scheme's effect an artefact of the attention sink? Every scheme with and without "Well.".

    python examples/opening_study.py counterfact.parquet runs/opening 300

Scores a sample of facts at dose 1 under all ten schemes, as they are and after a neutral opening,
and writes both results per model and `opening.md`. Intervals are for relations like these: Student's
t over relations. If it is interrupted, the same command resumes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from scipy import stats

import hijacklens as hl
from hijacklens.prompts.schemes import schemes

MODELS, OPENING = ("smollm2-135m", "gemma3-270m"), "Well."


def interval(values: np.ndarray, relations: np.ndarray) -> str:
    """The mean of paired differences with its 95% interval, clustered by relation."""
    sums = np.bincount(np.unique(relations, return_inverse=True)[1], values - values.mean())
    n = len(sums)
    half = stats.t.ppf(0.975, n - 1) * (n / (n - 1) * (sums**2).sum()) ** 0.5 / len(values)
    return f"{values.mean():+.3f} [{values.mean() - half:+.3f}, {values.mean() + half:+.3f}]"


def rows(name: str, facts: hl.FactSet, out: Path):
    """A row per scheme: efficacy and shift, bare and hijacked, as it is and after the opening."""
    sides, bare = [], []
    for chosen in (facts, facts.with_opening(OPENING)):
        result = hl.hijack(hl.load_model(name), chosen, schemes=list(schemes()), doses=[1])
        result.save(out / f"{name}{'-opened' if chosen.opening else ''}", overwrite=True)
        items = result.items.assign(margin=result.items.first_false - result.items.first_true)
        index = ["scheme", "case_id"]
        sides.append(items[items.dose == 1].set_index(index))
        bare.append(items[items.dose == 0].set_index(index).margin)
    for scheme, before in sides[0].groupby("scheme", sort=False):
        after = sides[1].loc[before.index]
        groups = before.relation_id.to_numpy()
        shifts = [(x.margin - y[before.index]).to_numpy() for x, y in zip((before, after), bare)]
        wins = [(x.margin > 0).to_numpy(float) for x in (before, after)]
        bares = [(y[before.index] > 0).mean() for y in bare]
        yield (name, scheme, len(before), *(f"{x:.3f}" for x in bares),
               *(f"{x.mean():.3f}" for x in wins), interval(wins[1] - wins[0], groups),
               *(f"{x.mean():+.2f}" for x in shifts), interval(shifts[1] - shifts[0], groups))  # fmt: skip


def main(source: str, out: str, limit: str = "300") -> None:
    facts = hl.counterfact(source).limit(int(limit), seed=0)
    table = [
        ("model", "scheme", "facts", "bare", "bare, opened", "efficacy", "opened", "change [95%]",
         "shift", "opened", "change [95%]")
    ]  # fmt: skip
    table += [row for name in MODELS for row in rows(name, facts, Path(out))]
    table.insert(1, ("---",) * len(table[0]))
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in table]
    (Path(out) / "opening.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
