"""The study of docs/circuits: which heads carry the hijack in one model.

python examples/circuit_study.py MODEL FACTS OUT [--limit 300]

Writes into OUT: account/ (where the shift comes from), probes.csv (efficacy under knock-outs),
search/ and test/ (heads, and what ablating them does to facts and schemes they were not chosen on).
If it is started again with the same arguments, it reuses every stored score.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

import hijacklens as hl
from hijacklens.statistics import paired_mean, paired_ratio
from probes import heads, logit_shift, specification

SCHEME = "do-not-think"
KNOCK_OUTS = (
    "knock-out:source=last,target=hijack",
    "knock-out:source=query,target=hijack",
    "knock-out:source=subject,target=hijack",
    "knock-out:source=last,target=hijack,layers={early}",
    "knock-out:source=last,target=hijack,layers={late}",
    "knock-out:source=last,target=subject",
    # If a tokenizer adds no BOS, the hijack's first token is the attention sink: hide it alone,
    # and the tokens after it.
    "knock-out:source=subject,target=at:0",
    "knock-out:source=last,target=at:0",
    "knock-out:source=last,target=at:1..4",
    "knock-out:source=query,target=at:1..4",
)


def verdicts(result: hl.HijackResult) -> pd.DataFrame:
    """A row per fact, a column per dose: whether the false target wins, by the first token."""
    items = result.to_dataframe()
    items["win"] = (items["first_false"] > items["first_true"]).astype(float)
    return items.pivot(index="case_id", columns="dose", values="win")


def under_probes(model, facts: hl.FactSet) -> pd.DataFrame:
    half = model.cfg.n_layers // 2
    layers = {"early": f"0-{half - 1}", "late": f"{half}-{model.cfg.n_layers - 1}"}
    plain = hl.hijack(model, facts, schemes=[SCHEME], doses=[0, 1])
    before = verdicts(plain)
    rows = []
    for text in ("none", *(text.format(**layers) for text in KNOCK_OUTS)):
        probes = [] if text == "none" else [specification.parse(text).probe(model=model)]
        result = hl.hijack(model, facts, schemes=[SCHEME], doses=[0, 1], probes=probes)
        after = verdicts(result)
        undone = paired_ratio(
            (before[1] - after[1]).to_numpy(), (before[1] - before[0]).to_numpy(), seed=0
        )
        bare = paired_mean((after[0] - before[0]).to_numpy(), seed=0)
        table = result.summary().set_index("dose")
        rows.append(
            {
                "probe": text,
                "n": len(after),
                "bare_efficacy": table.loc[0, "efficacy"],
                "hijacked_efficacy": table.loc[1, "efficacy"],
                "hijacked_low": table.loc[1, "efficacy_low"],
                "hijacked_high": table.loc[1, "efficacy_high"],
                "mean_shift": table.loc[1, "mean_shift"],
                "undone": undone.value,
                "undone_low": undone.low,
                "undone_high": undone.high,
                "bare_change": bare.value,
                "bare_change_low": bare.low,
                "bare_change_high": bare.high,
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("facts")
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=int, default=300)
    given = parser.parse_args()
    source = hl.atlas() if given.facts == "atlas" else hl.counterfact(given.facts)
    facts = source.limit(given.limit, seed=0)
    model = hl.load_model(given.model)
    account = logit_shift.average(model, hl.pairs(model, facts, scheme=SCHEME, dose=1))
    account.save(given.out / "account", overwrite=True)
    table = under_probes(model, facts)
    table.to_csv(given.out / "probes.csv", index=False)
    print(table.round(3).to_string())
    chosen_on, held_out = heads.halves(facts, by="fact", seed=0)
    found = heads.search(
        model,
        hl.pairs(model, chosen_on, scheme=SCHEME, dose=1),
        size=5,
        candidates=12,
        method=heads.Method(attribution="direct"),
    )
    found.save(given.out / "search", overwrite=True)
    print(found.to_dataframe().head(12).round(4).to_string())
    tested = found.test(held_out, schemes=[SCHEME, "relation"], doses=[0, 1], random_sets=8)
    tested.save(given.out / "test", overwrite=True)
    print(tested.summary().round(3).to_string())
    print(tested.side_effects().round(3).to_string())


if __name__ == "__main__":
    main()
