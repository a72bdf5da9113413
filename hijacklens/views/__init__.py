"""Views: attention and coloured tokens of any run, in a notebook cell, on a page or as a picture.

    views.attention(model, "The Eiffel Tower is in the city of", layers=23)
    views.attended(model, text, source="last", heads=[(23, 4)], probes=[blind])

    run = views.run(model, prompt)                # one forward pass, any number of views of it
    run.heads([(23, 4), (29, 2)])                 # circuitsvis in the cell
    run.heads(layers=23).plot()                   # the same numbers as a matplotlib figure
    views.Sheet((run.heads(layers=23), run.attended()), title="Guam").save("guam.html")

A run reads a hooked model: prompts of language models or contexts of the one-layer model, with or
without probes. A view shows itself in a notebook, on a page that opens with no network, or as a
matplotlib figure. circuitsvis alone would load a script from the network or repeat its 1.3 MB in
every view.
"""

from __future__ import annotations

from hijacklens.views.components import attention_heads, attention_pattern, coloured_tokens, visible
from hijacklens.views.page import page, save_page
from hijacklens.views.runs import Run, attended, attention, run
from hijacklens.views.sheet import Sheet, View

__all__ = [
    "Run",
    "Sheet",
    "View",
    "attended",
    "attention",
    "attention_heads",
    "attention_pattern",
    "coloured_tokens",
    "page",
    "run",
    "save_page",
    "visible",
]
