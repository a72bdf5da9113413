"""Two halves of a set of facts that share no fact: one to find heads on, one to test them on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal, TypeAlias

import numpy as np

from hijacklens.errors import InputError, choice, whole_number
from hijacklens.facts.fact import Fact, FactSet

Split: TypeAlias = Literal["fact", "relation"]
SPLITS: tuple[Split, ...] = ("fact", "relation")


def identity(fact: Fact) -> tuple[str, str, str]:
    """Return what identifies a fact whatever its case id: relation, subject and true target.

    Facts without a relation id are distinguished by their templates.
    """
    return (fact.relation_id or fact.template, fact.subject, fact.target_true)


def shared(facts: FactSet, others: Iterable[Fact]) -> tuple[int, ...]:
    """Return the case ids of the facts that are also among `others`."""
    known = {identity(fact) for fact in others}
    return tuple(fact.case_id for fact in facts if identity(fact) in known)


def halves(facts: FactSet, *, by: Split = "fact", seed: int = 0) -> tuple[FactSet, FactSet]:
    """Split a set of facts into two halves, each in the order of the set.

    The same fact under two case ids stays in one half. `fact` splits at random, so that both halves
    share relations. With `relation` every relation is in one half only, so that heads are tested on
    new relations; the halves may then differ in size. The same seed gives the same halves.

    Raises:
        InputError: There are fewer than two facts, or relations, to split.
    """
    choice("split", by, SPLITS)
    seed = whole_number("seed", seed)
    keys = [fact.relation_id if by == "relation" else identity(fact) for fact in facts]
    groups = list(dict.fromkeys(keys))
    if len(groups) < 2:
        raise InputError(
            f"{facts.name} has {len(groups)} {by}s among its {len(facts)} facts, and a split by "
            f"{by} needs at least 2. Give more facts, or two separate sets."
        )
    sizes, totals = Counter(keys), [0, 0]
    half: dict[object, int] = {}
    for i in np.random.default_rng(seed).permutation(len(groups)):
        half[groups[i]] = int(totals[1] < totals[0])
        totals[half[groups[i]]] += sizes[groups[i]]
    first, second = (
        tuple(fact for fact, key in zip(facts, keys, strict=True) if half[key] == i) for i in (0, 1)
    )
    return replace(facts, facts=first), replace(facts, facts=second)
