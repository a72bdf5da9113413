"""How a target joins its prompt: after a space, directly, or as the end of the prompt says.

A model scores a prompt and its target as one text. English has a space between them, Japanese has
none, and a prompt that ends in a line break or an opening quote already says how the text goes on.

>>> joined("The capital of France is", "Paris"), joined("フランスの首都は", "パリ")
('The capital of France is Paris', 'フランスの首都はパリ')
>>> joined('They call it "', "Paris"), joined('They call it "', "Paris", "space")
('They call it "Paris', 'They call it " Paris')
"""

from __future__ import annotations

import re
import unicodedata
from typing import Literal, TypeAlias

Joining: TypeAlias = Literal["auto", "space", "none"]
"""`space` and `none` hold for every prompt. `auto` joins directly if the target begins with white
space, or if the prompt ends in white space, in an opening quote or bracket, or in a script without
spaces (Chinese, Japanese, Thai, Lao, Tibetan, Burmese, Khmer); otherwise with a space."""
JOININGS: tuple[Joining, ...] = ("auto", "space", "none")
_UNSPACED = re.compile(
    "[\u0e00-\u109f\u1780-\u17ff\u2e80-\u312f\u3190-\ua4cf\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff9f"
    "\U00020000-\U0003ffff]"
)
"""Letters and punctuation of scripts without spaces; Korean has them."""
_BEFORE_QUOTE = ":=-\u2013\u2014/"
"""A quote opens after these characters, as after white space."""


def joined(prompt: str, target: str, joining: Joining = "auto") -> str:
    """Return the text of a prompt with its target."""
    return prompt + gap(prompt, target, joining) + target


def gap(prompt: str, target: str, joining: Joining) -> str:
    """Return what is written between a prompt and its target: a space or nothing."""
    if joining == "auto":
        joining = "none" if target[:1].isspace() or _is_open(prompt) else "space"
    return " " if joining == "space" else ""


def _is_open(text: str) -> bool:
    """Return whether a text goes on without a space."""
    last, rest = text[-1:], text[:-1]
    if last.isascii() and last.isalnum():
        return False
    if not last or last.isspace() or last in "¿¡" or _UNSPACED.match(last):
        return True
    kind = unicodedata.category(last)
    if kind in ("Pi", "Pf") or last in "\"'`":  # a quote may open or close
        return _is_open(rest) or rest[-1] in _BEFORE_QUOTE
    return kind == "Ps"
