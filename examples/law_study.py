"""The study of docs/law: which facts give way, on CounterFact and on the atlas.

    python examples/law_study.py counterfact.parquet runs/law [--simulations 100]

Every run is one call of `hijacklens law`. If the script is started again, it skips the runs that
are complete and resumes the one that was interrupted. Then it draws shifts of real facts from each
law and counts how often that law is selected (simulations.csv), and shuffles the shifts
(shuffled.csv). The tables of the page are written to tables.md.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

import hijacklens as hl
from analyses import law
from analyses.law.evaluation import influences, predictions, selected
from analyses.law.laws import BY_NAME

MODELS = ["--model", "smollm2-135m", "--model", "gemma3-270m"]
OPENING = ["--opening", "Well."]
SCHEMES = [f"--scheme={name}" for name in ("do-not-think", "think", "mention", "relation")]
RUNS = {
    "counterfact": [*MODELS, *OPENING, "--facts=FACTS", "--limit=2000", "--doses=0-1"],
    "doses": [*MODELS, *OPENING, "--facts=FACTS", "--limit=1000", "--doses=0-5"],
    "atlas": [*MODELS, *OPENING, "--doses=0-1"],
    "schemes": [*MODELS, *OPENING, *SCHEMES, "--facts=FACTS", "--limit=1000", "--doses=0-1"],
    "no-opening": [*MODELS, "--facts=FACTS", "--limit=1000", "--doses=0-1"],
    "exact": ["--bits=5"],
}
"""Facts of a smaller sample are in the larger one, so that their predictors are not read again."""
PARAMETERS = {
    "constant": {"c": 4.5},
    "prior": {"a": 2.75, "t": 0.29, "f": -0.41},
    "additive": {"gamma": 4.0, "alpha": 0.6},
    "logistic": {"a": 0.4, "b": 6.4},
    "saturation": {"lambda": 3.0, "beta": 0.4},
    "posterior": {"e0": 3.4, "e": 0.71, "c": 1.03},
    "geometry": {"a": 2.8, "b": 0.83, "c": 0.48, "d": 0.46},
}
"""Of the simulations, near those of real facts; the ceiling has those that it is fitted to."""
SIMULATED, NOISE, SHUFFLES = 500, 1.0, 20
"""Facts of a simulation, the standard deviation of its errors in nats; shuffles of the shifts."""


def run(name: str, facts: str, out: Path) -> float:
    """Make a run if it is not complete; return its seconds."""
    if (out / name / "result.json").exists():
        return 0.0
    start = time.perf_counter()
    words = [facts.join(word.split("FACTS")) for word in RUNS[name]]
    code = "from analyses.commands import main; main()"
    subprocess.run([sys.executable, "-c", code, "law", *words, "--out", out / name], check=True)
    return time.perf_counter() - start


def simulations(facts: pd.DataFrame, seed: int) -> list[dict]:
    """The law that is selected, for shifts that each law makes of predictors of real facts."""
    sample = facts.sample(SIMULATED, random_state=seed)
    table = pd.concat([sample.assign(dose=dose) for dose in (1, 3)], ignore_index=True)
    x = {name: table[name].to_numpy(float) for name in (*law.PREDICTORS, "dose")}
    made = {name: BY_NAME[name].shift(p, x) for name, p in PARAMETERS.items()}
    made["ceiling"] = BY_NAME["ceiling"].fit(facts).predict(table.assign(dose=1))
    errors, rows = NOISE * np.random.default_rng(seed).normal(size=len(table)), []
    for name, shift in made.items():
        found = predictions(
            table.assign(shift=shift + errors), count=4, splits=["all doses"], quiet=True
        )
        rows.append({"made_by": name, "selected": selected(found)})
    return rows


def shuffled(facts: pd.DataFrame, seed: int) -> list[dict]:
    """R squared of each law for shuffled shifts."""
    order = np.random.default_rng(seed).permutation(len(facts))
    table = facts.assign(shift=facts["shift"].to_numpy()[order])
    found = predictions(table, splits=["relations"], quiet=True).groupby("law")
    return [{"law": name, "r2": influences(part)["r2"].mean()} for name, part in found]


def repeated(make, facts: pd.DataFrame, count: int, file: Path) -> None:
    """Write the rows of seeds 0, 1, ...; those in the file are not made again."""
    done = set(pd.read_csv(file)["seed"]) if file.exists() else set()
    for seed in set(range(count)) - done:
        table = pd.DataFrame(make(facts, seed)).assign(seed=seed)
        table.to_csv(file, mode="a", header=not file.exists(), index=False)


def interval(row: pd.Series, name: str) -> str:
    text = f"{row[name]:.3f} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]"
    return re.sub(r"(?<!\d)0\.", ".", text)


def markdown(table: pd.DataFrame) -> str:
    rows = [table.columns, ["---"] * table.shape[1], *table.round(3).astype(str).to_numpy()]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def tables(out: Path) -> str:
    """The tables of laws of all runs, and what the ceiling gains."""
    parts = []
    for name in RUNS:
        result: law.LawResult = hl.load_result(out / name)
        shifts = result.facts.groupby(["model", "scheme", "dose"])["shift"]
        parts += [f"## {name}", markdown(shifts.agg(["mean", "std", "size"]).reset_index())]
        laws = result.laws
        texts = laws[["split", "model", "scheme", "fitted_on", "law", "n", "known"]].assign(
            r2=[interval(row, "r2") for _, row in laws.iterrows()],
            auc=[interval(row, "auc") for _, row in laws.iterrows()],
            **{of: laws[of].map("{:.3f}".format) for of in ("ece", "brier", "bias")},
        )
        parts.append(markdown(texts))
        gains = result.differences.query("other == 'ceiling' and measure != 'brier'")
        gains = gains.assign(gain=[interval(row, "difference") for _, row in gains.iterrows()])
        columns = ["split", "model", "scheme", "fitted_on", "measure", "reference", "gain", "p"]
        parts.append(markdown(gains[columns]))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("facts")
    parser.add_argument("out", type=Path)
    parser.add_argument("--simulations", type=int, default=100, help="of each law")
    given = parser.parse_args()
    for name in RUNS:
        print(f"{name}: {run(name, given.facts, given.out):.0f} s", flush=True)
    main_run: law.LawResult = hl.load_result(given.out / "counterfact")
    facts = main_run.facts.query("model == 'smollm2-135m'").reset_index(drop=True)
    repeated(simulations, facts, given.simulations, given.out / "simulations.csv")
    repeated(shuffled, facts, SHUFFLES, given.out / "shuffled.csv")
    (given.out / "tables.md").write_text(tables(given.out), encoding="utf-8")


if __name__ == "__main__":
    main()
