"""The simulation of intervals and tests: `python docs/site/coverage.py` (`make coverage-table`).

It draws facts in relations of a known intra-cluster correlation (ICC), and writes how often each
interval contains the truth, how often the test finds a change that is not there, and its power
into docs/reference/numbers.md. It takes about ten minutes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

PAGE = Path(__file__).resolve().parents[1] / "reference" / "numbers.md"
START = "<!-- coverage: python docs/site/coverage.py writes this table -->"
END = "<!-- end of coverage -->"
RELATIONS = ((10, 50, 50), (20, 48, 48), (34, 44, 44), (34, 6, 160))
"""Number of relations, and facts of the smallest and the largest: half of the atlas, the atlas,
1,500 facts of CounterFact with equal and with unequal relations."""
ICCS = (0.0, 0.025, 0.089, 0.119)
"""As measured: none; CounterFact; doses 1 to 5 in Gemma, dose 0 to 1 in the atlas."""
GAINED, LOST, FRACTION = 0.42, 0.02, 0.7
"""The changes of dose 0 to 1 in SmolLM2, and its efficacy at dose 1."""
DISCORDANCE, CHANGE = 0.3, 0.05
"""Of the tests: a change of .05, with three facts in ten that change."""
MORE = 5
"""Draws of a test, for one of an interval: its rates are compared with .05."""
Draw = tuple[np.ndarray, np.ndarray]
"""A value per fact, and the relation of each."""


def verdict_changes(
    random: np.random.Generator, sizes: np.ndarray, icc: float, gained: float, lost: float
) -> Draw:
    """Draw changes of verdicts (1, -1 or 0), with Dirichlet probabilities for each relation."""
    means = np.array([gained, lost, 1 - gained - lost])
    chances = (
        random.dirichlet(means * (1 - icc) / icc, len(sizes))
        if icc
        else np.broadcast_to(means, (len(sizes), 3))
    )
    relations = np.repeat(np.arange(len(sizes)), sizes)
    u = random.random(len(relations))
    below = chances[relations].cumsum(1)
    return (u < below[:, 0]).astype(float) - ((u >= below[:, 0]) & (u < below[:, 1])), relations


def margins(random: np.random.Generator, sizes: np.ndarray, icc: float) -> Draw:
    """Draw normal changes of margins around 1 nat, of variance 4."""
    relations = np.repeat(np.arange(len(sizes)), sizes)
    between = random.normal(0, np.sqrt(icc), len(sizes))[relations]
    return 1 + 2 * (between + random.normal(0, np.sqrt(1 - icc), len(relations))), relations


def intervals() -> dict[str, Callable[..., bool]]:
    """Return interval -> function of generator, sizes and ICC: whether it contains the truth."""
    from hijacklens.statistics import clustered, clustered_fraction, clustered_ratio, fraction

    def holds(found: Any, truth: float) -> bool:
        return found.low <= truth <= found.high

    def change(random: Any, sizes: Any, icc: float) -> bool:
        return holds(
            clustered(*verdict_changes(random, sizes, icc, GAINED, LOST)), GAINED - LOST
        )

    def change_of_facts(random: Any, sizes: Any, icc: float) -> bool:
        values, _ = verdict_changes(random, sizes, icc, GAINED, LOST)
        return holds(clustered(values), GAINED - LOST)

    def efficacy(random: Any, sizes: Any, icc: float) -> bool:
        hits, relations = verdict_changes(random, sizes, icc, FRACTION, 0.0)
        return holds(clustered_fraction(hits, relations), FRACTION)

    def efficacy_of_facts(random: Any, sizes: Any, icc: float) -> bool:
        hits, _ = verdict_changes(random, sizes, icc, FRACTION, 0.0)
        return holds(fraction(int(hits.sum()), len(hits)), FRACTION)

    def margin(random: Any, sizes: Any, icc: float) -> bool:
        return holds(clustered(*margins(random, sizes, icc)), 1.0)

    def ratio(random: Any, sizes: Any, icc: float) -> bool:
        wholes, relations = margins(random, sizes, icc)
        parts = 0.5 * wholes + margins(random, sizes, icc)[0] - 1
        return holds(clustered_ratio(parts, wholes, relations), 0.5)

    return {
        "change": change,
        "fraction": efficacy,
        "nats": margin,
        "ratio": ratio,
        "change, facts": change_of_facts,
        "fraction, facts": efficacy_of_facts,
    }


def rows(runs: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield a row per number of relations and ICC, with the rates over `runs` draws."""
    from hijacklens.statistics import clustered, detection

    for (count, least, most), icc in ((x, y) for x in RELATIONS for y in ICCS):
        random = np.random.default_rng([seed, count, least, int(1000 * icc)])
        sizes = np.geomspace(least, most, count).round().astype(int)
        facts = f"{least}" if least == most else f"{least} to {most}"
        row: dict[str, Any] = {"relations × facts": f"{count} × {facts}", "ICC": icc}
        for name, covers in intervals().items():
            row[name] = np.mean([covers(random, sizes, icc) for _ in range(runs)])
        for name, by in (("false positives", 0.0), ("power", CHANGE)):
            ways = (DISCORDANCE + by) / 2, (DISCORDANCE - by) / 2
            draws = (verdict_changes(random, sizes, icc, *ways) for _ in range(MORE * runs))
            row[name] = np.mean([clustered(*draw).p < 0.05 for draw in draws])
        if least == most:
            row["power, formula"] = detection(
                CHANGE, icc=icc, discordance=DISCORDANCE, relations=count, facts=most
            )
        else:
            row["power, formula"] = "-"
        yield row


def table(runs: int) -> str:
    """Return the table in Markdown."""
    found = list(rows(runs))
    lines = [list(found[0]), ["---"] * len(found[0])]
    lines += [[_text(value) for value in row.values()] for row in found]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.3f}".replace("0.", ".")


if __name__ == "__main__":
    sys.path.insert(0, str(PAGE.parents[2]))
    written = table(2000)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{START}\n\n{written}\n\n{END}{after}", encoding="utf-8")
