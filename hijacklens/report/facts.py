"""The facts whose answer flips: the items of a run, their texts, and which belong together.

The script (`facts.js`) takes verdicts and shifts from the scores, under the rule that the reader
chooses, so that the items stand in the page once: they are what is shown and what is downloaded.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from hijacklens.report.markup import attributes, shown
from hijacklens.report.tables import data_html
from hijacklens.results.exhibits import Facts

HEADS = (
    ("fact", "fact", False),
    ("", "asked of", False),
    ("dose", "dose", False),
    ("", "prompt", False),
    ("true", "true (nats)", True),
    ("false", "false (nats)", True),
    ("answer", "top answer", False),
    ("shift", "shift (nats)", True),
)
"""What a column is sorted by, its heading, and whether it holds numbers."""
NOTE = (
    "Each fact stands in two lines: the bare query (dose 0) and the hijacked prompt, whose "
    "sentences are marked. True and false are the scores of the two targets, the winner in bold; "
    "beside the top answer stands its log-probability. The shift is score(false) - score(true), "
    "hijacked minus bare. Columns are sorted by the hijacked line."
)


def links(items: pd.DataFrame, prompts: pd.DataFrame) -> pd.DataFrame:
    """For every item the row of its bare query (`bare`) and of its texts (`prompt`); -1 for none.

    >>> items = pd.DataFrame({"model": "m", "scheme": "s", "case_id": 7, "dose": [0, 1]})
    >>> links(items, pd.DataFrame({"case_id": [7], "scheme": ["s"]})).to_dict("list")
    {'bare': [0, 0], 'prompt': [0, 0]}
    """
    keys = ["model", "scheme", "case_id"]
    first = items.assign(bare=np.arange(len(items))).loc[items["dose"] == 0, [*keys, "bare"]]
    texts = prompts[["case_id", "scheme"]].assign(prompt=np.arange(len(prompts)))
    texts = texts.astype({"case_id": items["case_id"].dtype, "scheme": items["scheme"].dtype})
    found = items[keys].merge(first.drop_duplicates(keys), on=keys, how="left")
    found = found.merge(texts.drop_duplicates(keys[1:]), on=keys[1:], how="left")
    return found[["bare", "prompt"]].fillna(-1).astype(int)


def facts_html(facts: Facts, *, key: str) -> str:
    """The element of the facts and its data; its rows are drawn by the script."""
    head = "".join(
        f'<th scope="col"{attributes(data_key=name, class_="number" if number else None)}>'
        f"{label}</th>"
        for name, label, number in HEADS
    )
    packs = {
        "items": facts.items,
        "prompts": facts.prompts,
        "links": links(facts.items, facts.prompts),
    }
    data = "".join(data_html(table, key=f"{key}-{name}") for name, table in packs.items())
    return (
        f'<div class="facts" id="{key}"><p>{NOTE}</p><div class="controls"></div>'
        f'<div class="scroll" role="region" tabindex="0"{attributes(aria_label=facts.heading)}>'
        f"<table><caption>{shown(facts.heading)}</caption><thead><tr>{head}</tr></thead>"
        "<tbody></tbody></table></div>"
        "<noscript><p>These rows are drawn by a script, which this viewer does not run; open the "
        f"file in a browser.</p></noscript>{data}</div>"
    )
