"""Accounting: what a run computed, what it could have come to, and how it went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Accounting:
    """What the engine did."""

    sharing: str
    """`plain`, `packed` or `cached` (`hijacklens.engine.plan`); `none` if nothing was asked."""
    why: str
    """Why that way was taken."""
    forward_tokens: int
    """Tokens that were computed, padding left out."""
    padded_tokens: int
    """The same with padding."""
    naive_tokens: int
    """Tokens of all prompts, each computed by itself, with the targets that run along."""
    trie_tokens: int
    """Distinct nodes of the trie of all prompts: the fewest tokens there could be."""
    passes: int
    """Forward passes."""
    batch_tokens: int
    """Size of a batch in tokens, as it was in the end."""
    shrunk: int
    """How often memory ran out and batches were made smaller."""
    seconds: float
    """Wall time from the plan to the last reading."""
    peak_memory: int
    """Bytes: the most that torch held on the GPU, or this process on a CPU, since it started."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens computed, padding left out, in a second."""
        return self.forward_tokens / self.seconds if self.seconds else 0.0

    def record(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return {**asdict(self), "tokens_per_second": round(self.tokens_per_second, 1)}


def summary(record: Mapping[str, Any]) -> str:
    """One line for people, from a record of `Accounting`."""
    computed, naive = record["forward_tokens"], record["naive_tokens"]
    if not computed:
        return f"nothing had to be computed ({naive:,} tokens with every prompt by itself)"
    sharing = record.get("sharing", record.get("way"))  # its name in older results
    small = f", batches shrunk {record['shrunk']} times" if record["shrunk"] else ""
    return (
        f"{computed:,} tokens computed; every prompt by itself has {naive:,}, with shared "
        f"beginnings {record['trie_tokens']:,} at best; engine: {sharing} ({record['why']}); "
        f"{record['tokens_per_second']:,.0f} tokens/s, peak memory "
        f"{record['peak_memory'] / 2**20:,.0f} MiB{small}"
    )
