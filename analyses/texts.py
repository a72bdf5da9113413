"""TODO."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from hijacklens.errors import InputError

if TYPE_CHECKING:
    from hijacklens.facts.fact import FactSet


def choose_facts(
    source: str,
    relations: tuple[str, ...],
    cases: tuple[int, ...],
    limit: int | None,
    seed: int,
) -> FactSet:
    """The facts that the options of `facts_options` name."""
    from hijacklens.facts.atlas import atlas
    from hijacklens.facts.counterfact import counterfact

    if source == "atlas":
        found = atlas()
    else:
        found = counterfact(None if source == "counterfact" else source)
    found = found.where(relation=relations or None, case_ids=cases or None)
    if limit is not None and limit < 1:
        raise InputError(f"--limit must be at least 1, not {limit}.")
    return found.limit(limit, seed=seed)


def read_doses(text: str) -> tuple[int, ...]:
    """Doses written as a range and a list, such as `0-5` or `0,1,5`.

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
