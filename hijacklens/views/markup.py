r"""HTML from Jinja2 templates in which every text stays text, whatever it contains.

The templates escape tags and quotes. They write out characters that a reader could not see or that
would reverse the text around them: control characters, writing directions, line ends and broken
code points.

>>> templates(Path()).from_string("{{ text }}").render(text="<b>\x00\u202e\n</b>")
'&lt;b&gt;␀⟨U+202E⟩↵&lt;/b&gt;'
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
"""Characters to write out; `report/data.js` has the same list."""


@cache
def templates(folder: Path) -> Environment:
    """Return the templates in a folder; only `Markup` values enter their pages unescaped."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        finalize=lambda value: value if hasattr(value, "__html__") else visible(str(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def visible(text: str, *, keep: str = "") -> str:
    """Write out the hidden characters of a text, except those in `keep`."""

    def written(match: re.Match[str]) -> str:
        code = ord(match[0])
        if match[0] in keep:
            return match[0]
        if code == 0x0A:
            return "↵"
        return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"

    return HIDDEN.sub(written, text)
