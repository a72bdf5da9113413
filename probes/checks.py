"""Checks of the arguments of probes that import nothing large, for the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

from hijacklens.errors import InputError, choice, number, whole_number

When: TypeAlias = Literal["before", "after"]
"""Whether a probe acts on the scores, before the softmax, or on the pattern, after it."""
Site: TypeAlias = Literal[
    "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v"
]
HEAD_AXES: Mapping[str, Literal["head", "kv_head"]] = {
    "z": "head",
    "q": "head",
    "k": "kv_head",
    "v": "kv_head",
}
"""The sites that are split into heads, and which heads these are."""
MIN_FACTS = 3
"""Intervals over one or two facts are infinite or meaningless."""


def check_when(when: object, renormalise: bool) -> None:
    """Refuse an unknown side of the softmax, and `before` without renormalisation."""
    choice("when", when, get_args(When), "It says on which side of the softmax.")
    if when == "before" and not renormalise:
        raise InputError(
            "the softmax makes weights sum to one whatever the scores, so renormalise=False "
            'needs when="after".'
        )


def check_factor(factor: object, when: object) -> float:
    """Return a factor of scores, or of weights, which cannot be negative."""
    return number("factor", factor, least=0) if when == "after" else number("factor", factor)


def check_heads(site: str, heads: Any) -> None:
    """Refuse heads of a site that is not split into heads."""
    if heads is not None and site in get_args(Site) and site not in HEAD_AXES:
        raise InputError(
            f"{site} is not split into heads; leave heads out, or use {', '.join(HEAD_AXES)}."
        )


def check_searched(count: int, name: str) -> None:
    """Refuse a search for heads on too few facts.

    Raises:
        InputError: An interval over facts needs more.
    """
    if count < MIN_FACTS:
        raise InputError(
            f"{count} of the facts of {name} can be searched; intervals over facts need at least "
            f"{MIN_FACTS} with a shift that can be measured. Give more facts, preferably 50; of "
            "one fact, probes.logit_shift.trace(model, pairs[0]).biggest(5) names the heads."
        )


def check_size(size: int, candidates: int) -> tuple[int, int]:
    """Return the size of a set of heads and the number of candidates that it is chosen from.

    Raises:
        InputError: The size is not between 1 and the number of candidates.
    """
    size, candidates = whole_number("size", size), whole_number("candidates", candidates)
    if not 1 <= size <= candidates:
        raise InputError(
            f"cannot choose {size} heads from {candidates} candidates; give a size from 1 to the "
            "number of candidates."
        )
    return size, candidates
