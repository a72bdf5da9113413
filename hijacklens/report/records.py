"""Configuration and provenance of a result in plain words, and its record as a download."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

from hijacklens.files import json_text
from hijacklens.report.markup import attributes, script, shown
from hijacklens.results.provenance import Provenance
from hijacklens.results.result import Result

MOST_VALUES = 40
"""Values of a list that are written out; the record has all."""


def record_html(result: Result, *, key: str) -> str:
    """Two folded parts, provenance and configuration, and a button that hands out both."""
    whole = {**result.configuration(), "provenance": asdict(result.provenance)}
    text = json_text(whole)
    record = json.loads(text)
    configuration = {name: value for name, value in record.items() if name != "provenance"}
    # A JSON text inside JSON, in ASCII and without a tag that could end the element.
    held = json.dumps(text).replace("<", "\\u003c")
    terms = "".join(
        f"<dt>{shown(name)}</dt><dd>{shown(value)}</dd>"
        for name, value in _plain(result.provenance).items()
    )
    button = attributes(type="button", data_record=f"{key}-record", data_file="record.json")
    return (
        f"<details><summary>Where this comes from</summary><dl>{terms}</dl></details>"
        f"<details><summary>Configuration</summary>{_value(configuration)}</details>"
        f"<p class=controls><button{button} hidden>Download record.json</button></p>"
        + script(held, type="application/json", id=f"{key}-record")
    )


def day(created: str) -> str:
    """A time as a reader writes it.

    >>> day("2026-11-21T09:58:03+00:00")
    '21 November 2026, 09:58 UTC'
    """
    try:
        when = datetime.fromisoformat(created)
    except ValueError:
        return created
    zone = when.strftime(" %Z")
    return f"{when.day} {when:%B %Y, %H:%M}{zone}"


def _plain(provenance: Provenance) -> dict[str, str]:
    commit, seed = provenance.commit, provenance.seed
    code = "an installed package, of no commit that is known"
    if commit:
        changed = " and changes that were not committed" if commit.endswith("+") else ""
        code = f"commit {commit.removesuffix('+')}{changed}"
    command = provenance.command
    if command == "python":
        command = "a Python session (a script or notebook)"
    return {
        "made": day(provenance.created),
        "by": command,
        "random draws": "none" if seed is None else f"start from seed {seed}",
        "code": code,
        "computer": f"{provenance.platform}, Python {provenance.python}",
        "packages": ", ".join(f"{name} {at}" for name, at in provenance.versions.items()),
    }


def _value(value: Any) -> str:
    """A value of the record: names and values, a list, or words."""
    if isinstance(value, Mapping):
        parts = "".join(
            f"<dt>{shown(str(name).replace('_', ' '))}</dt><dd>{_value(part)}</dd>"
            for name, part in value.items()
        )
        return f"<dl>{parts}</dl>" if parts else "none"
    if isinstance(value, list):
        return _list(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None or value == "" else shown(value)


def _list(values: list[Any]) -> str:
    kept, more = values[:MOST_VALUES], len(values) - MOST_VALUES
    rest = f"and {more:,} more (all are in record.json)" if more > 0 else ""
    if any(isinstance(value, (dict, list)) for value in kept):
        items = "".join(f"<li>{_value(value)}</li>" for value in kept)
        return f"<ol>{items}</ol>{rest}"
    return ", ".join([*map(_value, kept), *([rest] if rest else [])]) or "none"
