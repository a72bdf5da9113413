"""Print saved hijack results as Markdown tables: `python examples/study_tables.py DIR [DIR ...]`.

It made the tables of docs/hijacking.
"""

from __future__ import annotations

import sys

import hijacklens as hl
from hijacklens.results.glance import fraction


def main(folders: list[str]) -> None:
    for folder in folders:
        result = hl.load_result(folder)
        assert isinstance(result, hl.HijackResult)
        table = result.summary()
        known = result.summary(known_only=True).set_index(["model", "scheme", "dose"])
        differ = result.disagreement().set_index(["model", "scheme", "dose"])["any"]
        print(f"\n{result!r}\n")
        print(
            "| model | scheme | dose | n | efficacy [95%] | retention | ties | mean shift |", end=""
        )
        print(" known: n | known: retention | rules differ |")
        print("|---|---|---|---|---|---|---|---|---|---|---|")
        for row in table.to_dict("records"):
            key = (row["model"], row["scheme"], row["dose"])
            interval = f"[{fraction(row['efficacy_low'])}, {fraction(row['efficacy_high'])}]"
            cells = [
                *key,
                row["n"],
                f"{fraction(row['efficacy'])} {interval}",
                fraction(row["retention"]),
                row["ties"],
                f"{row['mean_shift']:+.2f}",
                known.loc[key, "n"],
                fraction(known.loc[key, "retention"]),
                fraction(differ.loc[key]),
            ]
            print("| " + " | ".join(str(cell) for cell in cells) + " |")
        for model, group in result.skipped.groupby("model"):
            print(f"\n{model}: {len(group)} pairs of fact and scheme skipped")


if __name__ == "__main__":
    main(sys.argv[1:])
