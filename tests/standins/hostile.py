"""Texts that have broken programs before."""

from __future__ import annotations

HOSTILE = (
    "",
    " ",
    "{}",
    "{} {}",
    "{subject}",
    "../../evil",
    "/etc/passwd",
    "a\x00b",
    "\x1b[2J\x1b]0;owned\x07",
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "<s>",
    "<|endoftext|>",
    "NA",
    "nan",
    "null",
    "=1+1",
    "'; DROP TABLE readings; --",
    "\u202eevil\u202c",
    "\ufeff",
    "\ud800",
    "e\u0301",
    "\U0001d518\U0001d52b\U0001d526",
    "x" * 20_000,
    "line\nline\r\n\u2028line",
    "${HOME}",
    "%s%n",
)


def words(text: str, between: str | None = None) -> list[str]:
    """The words of a text, or its parts between marks, without the spaces around them."""
    return [word.strip() for word in text.split(between)]
