"""The documents of our tasks in lm-evaluation-harness."""

from __future__ import annotations

from typing import Any

import datasets

import hijacklens as hl
from hijacklens.facts.joining import gap
from hijacklens.prompts.schemes import get_scheme
from hijacklens.prompts.wordings import make_prompts


def documents(
    scheme: str, dose: int, facts: str = "", seed: int = 0, **_others: Any
) -> dict[str, datasets.Dataset]:
    """Return the prompts of a scheme with the true and the false target of each fact.

    Args:
        scheme: Name of a scheme.
        dose: Number of hijacking sentences.
        facts: As `hijacklens.load_facts` takes them; by default the atlas.
        seed: As for `hijacklens.hijack`.

    The harness passes the entries of `--metadata`, such as `{"dose": 3, "facts": "mine.csv"}`.
    """
    chosen = hl.load_facts(facts) if facts else hl.atlas()
    prompts, _unscored = make_prompts(chosen, get_scheme(scheme), [dose], None, seed=seed)
    rows = []
    for fact, prompt in prompts:
        targets = (fact.target_true, fact.target_false)
        choices = [gap(prompt.text, target, prompt.joining) + target for target in targets]
        about = {"case_id": fact.case_id, "relation_id": fact.relation_id}
        rows.append({**about, "prompt": prompt.text, "choices": choices})
    return {"test": datasets.Dataset.from_list(rows)}
