"""Accounting: what a run computed, and what it would have cost without sharing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Accounting:
    """What the engine did."""

    sharing: str
    """`plain`, `packed` or `cached` (`hijacklens.engine.plan`); `none` if nothing was requested."""
    why: str
    """The reason for that sharing."""
    forward_tokens: int
    """Tokens that were computed, without padding."""
    padded_tokens: int
    """The same with padding."""
    naive_tokens: int
    """Tokens of all prompts, each computed by itself, with the target tokens they are given."""
    trie_tokens: int
    """Distinct nodes of the trie of all prompts: the fewest tokens that any run can compute."""
    passes: int
    """Forward passes."""
    batch_tokens: int
    """Size of a batch in tokens, at the end of the run."""
    shrunk: int
    """How often memory ran out and batches were made smaller."""
    seconds: float
    """Wall time from the plan to the last reading."""
    peak_memory: int
    """Peak bytes, of torch on a GPU or of this process on a CPU, since it started."""

    @classmethod
    def total(cls, parts: Sequence[Accounting], how: str, seconds: float) -> Accounting:
        """Combine the parts of a run that was spread over workers.

        Args:
            parts: Their accountings.
            how: How the run was spread, for `why`.
            seconds: Wall time of the run.
        """
        main = max(parts, key=lambda part: part.forward_tokens, default=None)
        summed = ("forward_tokens", "padded_tokens", "naive_tokens", "trie_tokens", "passes")
        return cls(
            sharing=main.sharing if main else "none",
            why=f"{main.why}; {how}" if main else "nothing was requested",
            **{name: sum(getattr(part, name) for part in parts) for name in (*summed, "shrunk")},
            batch_tokens=min((part.batch_tokens for part in parts), default=0),
            seconds=round(seconds, 3),
            peak_memory=max((part.peak_memory for part in parts), default=0),
        )

    @property
    def tokens_per_second(self) -> float:
        """Tokens computed per second, without padding."""
        return self.forward_tokens / self.seconds if self.seconds else 0.0

    def record(self) -> dict[str, Any]:
        """Return all fields, ready for JSON."""
        return {**asdict(self), "tokens_per_second": round(self.tokens_per_second, 1)}


def summary(record: Mapping[str, Any]) -> str:
    """Describe a record of `Accounting` in one line for people."""
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
