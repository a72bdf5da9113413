"""Compare a quick reproduction with the ledger: only what fails there may fail here.

    python tests/standins/known_failures.py runs/reproduction docs/reproduction fig1 fig2a ...

Exits with status 1 if an analysis was not run, or if a check fails that does not fail in the ledger
at full scale.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hijacklens.results.older_forms import upgraded


def failures(folder: Path) -> set[tuple[str, str]]:
    """Return the analysis and the claim of each failed check below a folder."""
    records = [upgraded(json.loads(path.read_text())) for path in folder.glob("**/result.json")]
    return {
        (record["analysis"], outcome["claim"])
        for record in records
        if "analysis" in record
        for outcome in record["outcomes"]
        if outcome["state"] == "fail"
    }


if __name__ == "__main__":
    run, ledger = map(Path, sys.argv[1:3])
    missing = [name for name in sys.argv[3:] if not (run / name / "result.json").exists()]
    print(*(f"not run: {name}" for name in missing), sep="\n", end="\n" if missing else "")
    known = failures(ledger)
    for name, claim in sorted(failures(run)):
        print(f"{'known' if (name, claim) in known else 'NEW'} failure, {name}: {claim}")
    sys.exit(bool(missing or failures(run) - known))
