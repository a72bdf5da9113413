"""Export a run: check where it goes, make the files of a kind, and write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pandas as pd

from hijacklens.errors import InputError, choice, strict, utf8
from hijacklens.exports import every_eval_ever, hub, lm_eval
from hijacklens.exports.run import Run
from hijacklens.files import named_path, write_text, write_whole
from hijacklens.results.result import load_result, staged
from hijacklens.results.stored import write_table
from hijacklens.scoring.efficacy import RULES, Rule
from hijacklens.scoring.result import HijackResult

Kind: TypeAlias = Literal["lm-eval", "every-eval-ever", "hub", "dataset"]
FILES: dict[str, Callable[[Run], Mapping[str, str | pd.DataFrame]]] = {
    "lm-eval": lm_eval.files,
    "every-eval-ever": every_eval_ever.files,
    "hub": hub.evaluations,
    "dataset": hub.data_set,
}


@strict
def export(
    result: HijackResult | str | Path,
    folder: str | Path,
    *,
    to: Kind,
    rule: Rule = "first",
    ids: Mapping[str, str] | None = None,
    dataset: str = "",
    organization: str = "unknown",
    overwrite: bool = False,
) -> list[Path]:
    """Write a run of `hijack` in a form that another tool reads.

    Numbers are those of `result.summary(rule=rule)`, with 95% intervals about these facts.

    Args:
        result: The run, or the folder in which it was saved.
        folder: Where the files go; other files in it stay.
        to: `lm-eval`: results and samples of lm-evaluation-harness. `every-eval-ever`: its records,
            aggregate and per instance. `hub`: the `.eval_results` of each model's repository.
            `dataset`: a folder for `datasets.load_dataset`, with a card.
        rule: How targets are scored: `first`, `sum` or `mean`.
        ids: Ids on the hub of models that the run calls otherwise: `{"mine": "me/mine"}`.
        dataset: For `hub`: the id of the benchmark's data set.
        organization: For `every-eval-ever`: who ran the evaluation.
        overwrite: Replace files that exist.

    Returns:
        The paths of the files.

    Raises:
        InputError: The result is not a run of `hijack`, the kind cannot express it, a file exists,
            or an id is missing or unknown.
        OSError: There is no room for the files. Nothing has changed in the folder.
    """
    choice("kind of export", to, FILES)
    choice("rule", rule, RULES)
    found: Any = load_result(result) if isinstance(result, (str, Path)) else result
    if not isinstance(found, HijackResult):
        raise InputError(
            f"export takes a run of hijacklens hijack, not a {type(found).__name__}, whose tables "
            "save() writes for other programs."
        )
    ids, models = ids or {}, {model.name: model for model in found.settings.models}
    for name in ids:
        choice("model of this run", name, models)
    named = {ids.get(name, name): model for name, model in models.items()}
    if len(named) < len(models):
        raise InputError(f"two models of this run have the same id: {dict(ids)}.")
    if reason := _inexpressible(found, to):
        raise InputError(f"{to} cannot express this run: {reason}")
    dataset = utf8("dataset", dataset, "'me/facts'")
    organization = utf8("organization", organization, "'My laboratory'")
    files = FILES[to](Run(found, rule, named, dataset, organization))
    place = named_path(folder, "folder")
    existing = [str(place / path) for path in files if (place / path).exists()]
    if existing and not overwrite:
        raise InputError(
            f"{existing[0]!r} already exists. Choose another folder, or pass overwrite=True "
            "(--overwrite on the command line) to replace it."
        )
    with staged(folder, overwrite=True) as scratch:
        for path, content in files.items():
            (scratch / path).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                write_text(scratch / path, content)
            else:
                write_whole(scratch / path, partial(write_table, content))
    return [place / path for path in files]


def _inexpressible(run: HijackResult, to: str) -> str:
    """Return why a kind cannot express a run; empty if it can."""
    if to == "hub" and run.settings.probes:
        return (
            f"the probe {run.settings.probes[0]!r} changed the model, and the hub lists results of "
            "the model in its repository. Choose another kind."
        )
    if to == "lm-eval" and run.settings.facts.chat:
        return (
            "samples have the exact text that the model read, and a run in a chat keeps the text "
            "before the template. Choose every-eval-ever or dataset."
        )
    if to in ("lm-eval", "every-eval-ever") and run.prompts.empty:
        return (
            "it was saved without its prompts, by an earlier version of hijacklens. Run it again, "
            "or choose hub or dataset, which need none."
        )
    return ""
