"""Read what a user writes in short: a fact source with its filters, and doses."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from hijacklens.errors import InputError

if TYPE_CHECKING:
    from hijacklens.facts.fact import FactSet
    from hijacklens.facts.joining import Joining


def choose_facts(
    source: str,
    relations: tuple[str, ...],
    cases: tuple[int, ...],
    limit: int | None,
    seed: int,
    joining: Joining = "auto",
) -> FactSet:
    """Load facts and choose among them.

    Args:
        source: `atlas`, `counterfact`, a file, or a hub id.
        relations: Only facts of these relations, by id or name; of all by default.
        cases: Only facts with these case ids; all by default.
        limit: Maximum number of facts to draw.
        seed: Seeds the draw, and the false targets of facts that come without.
        joining: How targets join their prompts (`hijacklens.facts.joining`).

    Raises:
        InputError: The facts cannot be read, or a relation, case or limit does not fit them.
    """
    from hijacklens.facts.loading import load_facts

    facts = load_facts(source, joining=joining, seed=seed)
    facts = facts.where(relation=relations or None, case_ids=cases or None)
    return facts.limit(limit, seed=seed)


def read_doses(text: str) -> tuple[int, ...]:
    """Return the doses of a range or a list, such as `0-5` or `0,1,5`.

    >>> read_doses("0-2,5")
    (0, 1, 2, 5)
    """
    doses: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise InputError(
                f"--doses {text!r}: {part!r} is neither a number nor a rising range. Write 0-5, "
                "or 0,1,5."
            )
        doses.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(doses))
