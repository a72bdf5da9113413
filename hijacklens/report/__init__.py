"""The report: saved results as one HTML file that opens with no network.

    write_report(["runs/first", "runs/trace"], out="report.html")     # or results themselves
    hijacklens report runs/first runs/trace --out report.html         # the same in a shell

`Result.exhibits` lists what a report shows of a result. The templates (`page.html`,
`exhibits.html`) put it on a page, with autoescape on. Tables are embedded complete, as compressed
data; the scripts (`data.js`, `tables.js`, `facts.js`, `start.js`) sort, filter, search and export
them in the browser.
"""

from __future__ import annotations

from hijacklens.report.writing import TITLE, write_report

__all__ = ["TITLE", "write_report"]
