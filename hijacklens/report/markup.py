r"""Text as HTML that stays text, whatever it contains.

Tags and quotes are escaped. What a reader could not see, or what would turn the text around it
(control characters, directions of writing, line ends, broken code points), is written out.

>>> shown("<b>\x00\u202e\n</b>")
'&lt;b&gt;␀⟨U+202E⟩↵&lt;/b&gt;'
"""

from __future__ import annotations

import html
import re

HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
"""Characters that are written out; `data.js` has the same."""


def shown(text: object) -> str:
    """A text for the content or an attribute of an element."""
    return html.escape(HIDDEN.sub(_written, str(text)), quote=True)


def written_out(text: str) -> str:
    """The same for several lines of a format that escapes by itself, such as SVG."""
    return HIDDEN.sub(lambda match: match[0] if match[0] in "\n\r\t" else _written(match), text)


def _written(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code == 0x0A:
        return "↵"
    if code < 0x20:
        return chr(0x2400 + code)
    return f"⟨U+{code:04X}⟩"


def attributes(**values: object) -> str:
    """Attributes of an element, with a space before each; None and False are left out.

    >>> attributes(id="a", hidden=False, data_file='"x"')
    ' id="a" data-file="&quot;x&quot;"'
    """
    parts = []
    for name, value in values.items():
        key = name.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(f" {key}")
        elif value is not None and value is not False:
            parts.append(f' {key}="{shown(value)}"')
    return "".join(parts)


def paragraphs(texts: object) -> str:
    """A paragraph for each text that is not empty."""
    listed = [texts] if isinstance(texts, str) else list(texts)  # type: ignore[call-overload]
    return "".join(f"<p>{shown(text)}</p>" for text in listed if text)


def script(text: str, **values: object) -> str:
    """A script or data element whose text cannot end it."""
    return f"<script{attributes(**values)}>{text}</script>"
