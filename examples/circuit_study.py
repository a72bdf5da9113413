"""The study of docs/circuits: which heads carry the hijack in one model.

python examples/circuit_study.py MODEL FACTS OUT [--limit 300] [--opening Well.] [--heads 12.1+...]
    [--sets 6]

Writes into OUT: account/ and account.csv (where the shift comes from), paths.csv (the same parts
with a path of attention removed), recall.csv (log-probabilities of both targets), probes.csv
(efficacy under knock-outs), search/ and test/ (heads, and what ablating them does to relations that
they were not chosen on). Intervals are 95%, for relations like these. If it is started again with
the same arguments, it reuses every stored score.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

import hijacklens as hl
from hijacklens.prompts.correspondence import SPANS
from hijacklens.scoring import efficacy
from hijacklens.statistics import clustered, clustered_fraction, clustered_ratio
from probes import attention, heads, logit_shift, specification

SCHEME = "do-not-think"
KNOCK_OUTS = (
    "knock-out:source=last,target=hijack",
    "knock-out:source=last,target=hijack,layers={late}",
    "knock-out:source=last,target=mention",
    "knock-out:source=last,target=mention,layers={late}",
    "knock-out:source=query,target=hijack",
    "knock-out:source=subject,target=hijack",
    # The first token is the attention sink: the BOS, the opening or, without both, the hijack's.
    "knock-out:source=last,target=at:0",
    "knock-out:source=last,target=subject",
)
PATHS = ("mention", "hijack")
"""Spans that the last token attends to but reads no values of, in all layers."""
SEARCHED, TESTED = 60, 100
"""Facts that heads are chosen and tested on, of different relations."""


def parts(account) -> dict[str, np.ndarray]:
    """The parts of each fact's shift: attention by span, MLPs, everything else."""
    by_span = dict(zip(SPANS, account.attention.sum((2, 3)).T, strict=False))
    found = {f"attention to {span}": part for span, part in by_span.items() if part.any()}
    found["MLPs"] = account.mlp.sum(1)
    shift = account.facts["shift"].to_numpy()
    return {"shift": shift, **found, "other": shift - sum(found.values())}


def where(model, pairs, out: Path) -> None:
    account = logit_shift.average(model, pairs)
    account.save(out / "account", overwrite=True)
    relations, before = account.facts["relation_id"].to_numpy(), parts(account)
    before["mention - MLPs"] = before["attention to mention"] - before["MLPs"]
    rows = [
        {
            "part": name,
            **clustered(values, relations).columns("mean"),
            "above_0": (values > 0).sum(),
        }
        for name, values in before.items()
    ]
    save(rows, out / "account.csv", n=len(relations), relations=len(set(relations)))
    rows = []
    for target in PATHS:
        # Without renormalisation only what the heads read from the target tokens goes away.
        cut = attention.knock_out("last", target, when="after", renormalise=False)
        after = logit_shift.average(model, pairs, probes=[cut])
        for name, values in parts(after).items():
            left = clustered(values, relations).columns("mean")
            gone = clustered_ratio(before[name] - values, before[name], relations).columns("falls")
            rows.append({"path": f"last -> {target}", "part": name, **left, **gone})
    save(rows, out / "paths.csv")


def wide(result: hl.HijackResult, values) -> pd.DataFrame:
    """A row per fact, a column per dose."""
    items = result.items.assign(value=values(result.items))
    return items.pivot(index=["relation_id", "case_id"], columns="dose", values="value")


def false_wins(items: pd.DataFrame) -> pd.Series:
    return (efficacy.margin(items, "first") > 0).astype(float)


def under_probes(model, facts: hl.FactSet, out: Path) -> None:
    half = model.cfg.n_layers // 2
    layers = {"late": f"{half}-{model.cfg.n_layers - 1}"}
    plain = hl.hijack(model, facts, schemes=[SCHEME], doses=[0, 1])
    before = wide(plain, false_wins)
    relations = before.index.get_level_values("relation_id").to_numpy()
    rows = []
    for side in ("true", "false"):
        scores = wide(plain, lambda items, side=side: items[f"first_{side}"])
        change = (scores[1] - scores[0]).to_numpy()
        found = clustered(change, relations).columns("change")
        rows.append({"log p": side, **found, "rises": (change > 0).sum(), "n": len(change)})
    save(rows, out / "recall.csv")
    rows = []
    for text in ("none", *(text.format(**layers) for text in KNOCK_OUTS)):
        probes = [] if text == "none" else [specification.parse(text).probe(model=model)]
        after = wide(
            hl.hijack(model, facts, schemes=[SCHEME], doses=[0, 1], probes=probes), false_wins
        )
        gone, rise = (before[1] - after[1]).to_numpy(), (before[1] - before[0]).to_numpy()
        bare, hijacked = after[0].to_numpy(), after[1].to_numpy()
        rows.append(
            {
                "probe": text,
                "n": len(after),
                **clustered_fraction(hijacked, relations).columns("hijacked"),
                **clustered_ratio(gone, rise, relations).columns("undone"),
                **clustered(bare - before[0].to_numpy(), relations).columns("bare_change"),
            }
        )
        save(rows, out / "probes.csv")


def save(rows: list[dict], path: Path, **columns: int) -> None:
    table = pd.DataFrame(rows).assign(**columns)
    table.to_csv(path, index=False)
    print(f"\n{path}\n{table.round(3).to_string()}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("facts")
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--opening", default="")
    parser.add_argument("--heads", help="such as 12.1+15.3: test these, without a search")
    parser.add_argument("--sets", type=int, default=6, help="random head sets of each kind")
    given = parser.parse_args()
    source = hl.atlas() if given.facts == "atlas" else hl.counterfact(given.facts)
    facts = source.limit(given.limit, seed=0)
    facts = facts.with_opening(given.opening) if given.opening else facts
    model = hl.load_model(given.model)
    given.out.mkdir(parents=True, exist_ok=True)
    where(model, hl.pairs(model, facts, scheme=SCHEME, dose=1), given.out)
    under_probes(model, facts, given.out)
    # Heads that were chosen on other facts of the half are tested on the other half, by fact.
    split = "fact" if given.heads else "relation"
    chosen_on, held_out = heads.halves(facts, by=split, seed=0)
    chosen_on, held_out = chosen_on.limit(SEARCHED, seed=0), held_out.limit(TESTED, seed=0)
    found = heads.search(
        model,
        hl.pairs(model, chosen_on, scheme=SCHEME, dose=1),
        size=1 if given.heads else 5,
        candidates=1 if given.heads else 8,
        method=heads.Method(attribution="direct"),
    )
    if given.heads:
        pairs = [head.split(".") for head in given.heads.split("+")]
        found = replace(found, heads=tuple((int(layer), int(head)) for layer, head in pairs))
    else:
        found.save(given.out / "search", overwrite=True)
        print(found)
    tested = found.test(held_out, schemes=[SCHEME], random_sets=given.sets)
    tested.save(given.out / "test", overwrite=True)
    print(tested)


if __name__ == "__main__":
    main()
