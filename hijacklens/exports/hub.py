"""Two forms of the Hugging Face hub: evaluation results of a model, and a data set with its card.

Evaluation results are `.eval_results/hijacklens.yaml` in a model's repository, with retention as
their number; the hub calls `model-index` in a model card the legacy form.
"""

from __future__ import annotations

import pandas as pd
import yaml
from huggingface_hub import DatasetCardData, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hijacklens.errors import InputError
from hijacklens.exports.run import Run
from hijacklens.results.glance import drawn, printable
from hijacklens.scoring.result import MEANING


def evaluations(run: Run) -> dict[str, str]:
    """Return path -> text, in the folder `<owner>/<model>` of each model.

    Raises:
        InputError: The id of a model or of the benchmark's data set is missing or not allowed.
    """
    _require_id("the benchmark's data set", run.dataset, "--dataset (dataset=)")
    found = {}
    for name, model in run.models.items():
        _require_id(f"the model {model.name}", name, f"--id {model.name}=OWNER/NAME (ids=)")
        setup = run.setup(model)
        about = ", ".join(
            f"{key}: {setup[key]}" for key in ("rule", "facts", "facts_hash", "dtype")
        )
        entries = [
            EvalResultEntry(
                dataset_id=run.dataset,
                task_id=part.task,
                value=score.value,
                date=run.created.isoformat(),
                notes=f"retention of {len(part.items)} facts, 95% interval [{score.low:.4f}, "
                f"{score.high:.4f}]; {about}",
            )
            for part in run.parts(model)
            for score in part.scores[:1]
        ]
        text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
        found[f"{name}/.eval_results/hijacklens.yaml"] = text
    return found


def _require_id(what: str, name: str, option: str) -> None:
    if not name:
        raise InputError(f"hub needs the id of {what}, such as 'me/name'. Give {option}.")
    try:
        validate_repo_id(name)
        reason = "" if "/" in name else "it has no owner"
    except HFValidationError as error:
        reason = str(error)
    if reason:
        raise InputError(
            f"hub needs the id of {what}, such as 'me/name', not {name!r}: {reason}. Give {option}."
        )


def data_set(run: Run) -> dict[str, str | pd.DataFrame]:
    """Return path -> table or text for `datasets.load_dataset`: items, summary, prompts, card."""
    result, models = run.result, run.result.settings.models
    tables = {"items": result.items, "summary": result.full_summary, "prompts": result.prompts}
    tables = {name: table for name, table in tables.items() if len(table)}
    title = printable(f"Context hijacking of {', '.join(model.name for model in models)}")
    configs = [
        {"config_name": name, "data_files": f"data/{name}.parquet", "default": name == "items"}
        for name in tables
    ]
    tags = ["hijacklens", "robustness", "factual-recall"]
    card = DatasetCardData(
        pretty_name=title, task_categories=["text-generation"], tags=tags, configs=configs
    )
    words = [
        f"---\n{card.to_yaml()}\n---",
        f"# {title}",
        f"Computed by hijacklens {run.version}. The licence of the texts is that of the facts, "
        f"{result.settings.facts.title}.",
        f"```text\n{drawn(result.glance(rule=run.rule))}\n```",
        _listed(MEANING),
        *(f"## {model.name}\n\n{_listed(run.setup(model))}" for model in models),
    ]
    data = {f"data/{name}.parquet": table for name, table in tables.items()}
    return data | {"README.md": "\n\n".join(words) + "\n"}


def _listed(texts: dict[str, str]) -> str:
    return "\n".join(f"- **{name}**: {printable(text)}" for name, text in texts.items())
