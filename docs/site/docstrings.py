"""Doctests in docstrings, as code: Markdown would read `>>>` as a quotation in a quotation."""

from __future__ import annotations

import re
from typing import Any

import griffe

# A prompt, and what follows it up to an empty line.
DOCTEST = re.compile(
    r"^(?P<indent>[ ]*)>>> .*(?:\n(?!\s*$).*)*(?:\n\s*\n(?P=indent)>>> .*(?:\n(?!\s*$).*)*)*", re.M
)


def fenced(text: str) -> str:
    """Return the text with every run of doctests in a fence."""

    def fence(match: re.Match[str]) -> str:
        indent = match["indent"]
        return f"{indent}```pycon\n{match[0]}\n{indent}```"

    return DOCTEST.sub(fence, text)


class Doctests(griffe.Extension):
    """Fences the doctests of every docstring outside of sections, which are code already."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every object that is read."""
        if obj.docstring and ">>> " in obj.docstring.value and "Example" not in obj.docstring.value:
            obj.docstring.value = fenced(obj.docstring.value)
