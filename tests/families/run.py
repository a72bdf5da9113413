"""Run the matrix and write the page of the documentation: the script of `make families`.

Names of rows or special cases, `families`, `special` or `after` as arguments run these only. The
page is written whenever every row and case has been run, now or earlier.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import transformers
from rows import ROWS, subject
from special import AFTER, subjects

from analyses.conformance.cells import CELLS, Check, Outcome

Row = Mapping[str, Outcome]
ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "families.md"
EARLIER = ROOT / "build" / "families.json"
"""The outcomes of earlier runs, so that some rows can be run again."""
PROCESSES = int(os.environ.get("FAMILIES_PROCESSES", "2"))
SPECIAL = [cell for cell in CELLS if cell != "folder"]
"""Cells of the special cases, which cannot be saved with what was changed."""
TEXT = """\
# Families

What holds for each family of models, as measured by `make families`, which writes this page. Each
row is a tiny random model of a class of transformers. Everything is compared with plain Hugging
Face forward passes of single prompts, to 1e-4 nats. To check a model of your own:

<!-- not run: takes minutes -->
```sh
hijacklens models --check path/to/folder
```

- **equal**: the same number as the plain model's. For bfloat16 this is up to its rounding.
- **refused**: one sentence says why; the note quotes it.
- **unbalanced**: the logit difference is right, but the parts of the account do not sum to it; the
  residual says by how much (in logits, for this random model).
- **unchecked**: the plain model has no place where the reference could make the change.
- **WRONG** or **OBSCURE**: a fault of hijacklens: another number, or an error that explains
  nothing.

{what}

{counts}

## Families and variants

{families}

## Models that were changed before loading, and other special cases

{special}

## Versions

{versions}

{notes}
"""


def row(name: str) -> tuple[str, Row, float]:
    """Check one row or special case; returns its name, its outcomes and the seconds."""
    transformers.logging.set_verbosity_error()
    start = time.perf_counter()
    if name in ROWS:
        outcomes = Check(subject(name)).run()
    else:
        outcomes = Check(subjects()[name]).run(SPECIAL)
    return name, outcomes, time.perf_counter() - start


def main() -> None:
    cases = list(subjects())
    chosen = {"": [*ROWS, *cases], "special": cases, "families": list(ROWS), "after": list(AFTER)}
    names = chosen.get(" ".join(sys.argv[1:]), sys.argv[1:])
    done: dict[str, Row] = {}
    if EARLIER.exists():
        earlier = json.loads(EARLIER.read_text(encoding="utf-8"))
        done = {name: {c: Outcome(**o) for c, o in row.items()} for name, row in earlier.items()}
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        for name, outcomes, seconds in pool.map(row, names):
            done[name] = outcomes
            cells = (f"{cell}={_measured(outcome)}" for cell, outcome in outcomes.items())
            print(f"{name} ({seconds:.1f} s):", *cells, flush=True)
            for cell, outcome in outcomes.items():
                if outcome.detail:
                    print(f"    {cell}: {outcome.detail}", flush=True)
    EARLIER.parent.mkdir(exist_ok=True)
    record = {name: {c: asdict(o) for c, o in row.items()} for name, row in done.items()}
    EARLIER.write_text(json.dumps(record), encoding="utf-8")
    if {*ROWS, *cases} <= done.keys():
        PAGE.write_text(page(done), encoding="utf-8")
        print(f"written to {PAGE}")


def page(done: Mapping[str, Row]) -> str:
    """The page of the documentation."""
    notes: dict[str, int] = {}
    packages = ("hijacklens", "transformer-lens", "transformers", "torch")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return TEXT.format(
        what="\n".join(f"- `{cell}`: {what}" for cell, what in CELLS.items()),
        counts=_counts({name: done[name] for name in ROWS}),
        families=_table(("family", "class"), ((n, f"`{ROWS[n][0]}`") for n in ROWS), done, notes),
        special=_table(("case",), ((name,) for name in subjects()), done, notes),
        versions=f"{versions}, Python {platform.python_version()}, on a CPU.",
        notes="\n".join(f"[^{number}]: {text}" for text, number in notes.items()),
    )


def _table(
    header: tuple[str, ...], rows: Iterable[tuple[str, ...]], done: Mapping[str, Row], notes: dict
) -> str:
    lines = [(*header, *CELLS), ("---",) * (len(header) + len(CELLS))]
    for first in rows:
        cells = (_cell(done[first[0]].get(cell), notes) for cell in CELLS)
        lines.append((*first, *cells))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(outcome: Outcome | None, notes: dict[str, int]) -> str:
    if outcome is None:
        return ""
    if not outcome.detail:
        return outcome.text
    # One note for all models that are refused for one reason.
    text = re.sub(r" by up to [\d.e-]+ nats| \(log-probabilities differ\)", "", outcome.detail)
    text = re.sub(r"'\w+(ForCausalLM|LMHeadModel|ForConditionalGeneration)'", "'...'", text)
    text = " ".join(text.replace("|", "\\|").split())
    return f"{outcome.text}[^{notes.setdefault(text, len(notes) + 1)}]"


def _counts(done: Mapping[str, Row]) -> str:
    main = ("parity", "knock-out", "W_V", "head", "account")
    fine = sum(
        all(cell in row and row[cell].state in ("equal", "unbalanced") for cell in main)
        for row in done.values()
    )
    faults = sum(
        any(outcome.state in ("wrong", "obscure") for outcome in row.values())
        for row in done.values()
    )
    return (
        f"Of {len(done)} rows, {fine} have parity, knock-out, W_V, head and account all equal or "
        f"balanced\nup to a residual; {faults} have a fault."
    )


def _measured(outcome: Outcome) -> str:
    moved = "" if outcome.moved is None else f"/{outcome.moved:.0e}"
    return f"{outcome.state}:{outcome.nats:.0e}{moved}"


if __name__ == "__main__":
    main()
