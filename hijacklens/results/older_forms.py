"""Records that earlier versions wrote, in the form of this one.

Form 2 keeps the settings of a run under their own key, with the same shape in every result. Before
it, `result.json` had the settings at its top, next to the numbers found, and no `form`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hijacklens.errors import InputError

FORM = 2

MOVED = {
    "hijacklens.concepts.trained:TrainingResult": "hijacklens.one_layer.trained:TrainingResult",
    "analyses.sweep_result:SweepResult": "analyses.sweeps.run:SweepResult",
    "hijacklens.scoring.parity:Parity": "hijacklens.scoring.comparison:Comparison",
    "analyses.reproduction:Reproduction": "analyses.reproduction.reproduction:Reproduction",
}
"""Type in the record of a result folder -> where that type is now, if it has moved."""

KEYS = {"id": "analysis", "checks": "outcomes"}
"""Old key -> present key of the fields of a `Reproduction`."""

RENAMED = {"dim": "d_model", "way": "sharing"}
"""Old name -> present name of settings."""


def upgraded(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record in the present form; one that already has it is returned unchanged.

    Raises:
        InputError: The form is of a later version.
    """
    if "form" in record:
        if record["form"] != FORM:
            raise InputError(
                f"the result is of form {record['form']!r}, and this version of hijacklens reads "
                f"forms up to {FORM}. Install the version that wrote it, or a later one."
            )
        return dict(record)
    new = {KEYS.get(key, key): value for key, value in record.items()}
    if "settings" not in new:
        new["settings"] = _renamed(_settings(record))
    if "recipe" in new:
        new["recipe"] = _renamed(new["recipe"])
    if "outcomes" in new:  # of checks, with null for NaN and infinity
        new["outcomes"] = [
            {name: "NaN" if value is None else value for name, value in outcome.items()}
            for outcome in new["outcomes"]
        ]
    for gap in {"gap", "other_gap"} & set(new):
        new[gap] = "Infinity" if new[gap] == "infinite" else new[gap]
    return new


def _settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in an older record; other keys remain, since readers ignore them."""
    settings = dict(record)
    if "models" in settings:
        settings.setdefault("model", settings["models"][0])
    if "schemes" in settings:
        settings.setdefault("scheme", settings["schemes"][0])
    if "scheme" in settings:
        settings["scheme"] = _scheme(settings["scheme"])
    if "search" in settings:
        search = settings["search"]
        settings["search"] = {**search, "scheme": _scheme(search["scheme"])}
    return settings


def _scheme(scheme: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the fields of a `SchemeRecord` from a name alone, or from the fields of a `Scheme`."""
    if isinstance(scheme, str):
        return {"name": scheme}
    return {"text": scheme.get("template") or scheme.get("templates"), **scheme}


def _renamed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {RENAMED.get(name, name): _renamed(part) for name, part in value.items()}
    return [_renamed(part) for part in value] if isinstance(value, list) else value
