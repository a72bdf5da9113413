"""The report: saved results as one HTML file that opens with no network.

    write_report(["runs/first", "runs/trace"], out="report.html")     # or results themselves
    hijacklens report runs/first runs/trace --out report.html         # the same in a shell

Every result says by itself what a report shows of it (`Result.exhibits`, in the terms of
`hijacklens.results.exhibits`); here it is put on a page. Numbers are those of the files: tables are
embedded whole (`packing`), the browser sorts, filters and searches them and hands them out as CSV.

    exhibits   what can be shown: text, drawing, table, circuitsvis views, facts
    packing    tables as bytes that the browser expands
    markup     text as HTML that stays text, whatever it contains
    tables     a table's first rows as HTML, and its data
    records    configuration and provenance in plain words
    facts      the facts whose answer flips
    page       the page around all that, and what its browser is told to refuse

The page is styled by `report.css`; `data.js`, `tables.js`, `facts.js` and `start.js` are its
script.
"""

from __future__ import annotations

from hijacklens.report.document import TITLE, write_report

__all__ = ["TITLE", "write_report"]
