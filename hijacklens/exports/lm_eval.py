"""The results and samples of lm-evaluation-harness, as its `EvaluationTracker` writes them.

The harness calls retention `acc`. Targets have their score under the rule. Whether a target is
greedy is "None": a run does not record it.
"""

from __future__ import annotations

import json
from typing import Any

from hijacklens.exports.run import MEASURES, Part, Run, digest, lines, path_part
from hijacklens.facts.joining import gap
from hijacklens.files import json_text
from hijacklens.scoring.result import ScoredModel

METRICS = {"retention": "acc", "efficacy": "efficacy", "shift": "shift"}
"""Measure -> its name in the harness."""
BY_TASK = (
    *("results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better"),
    "n-samples",
)
DOCUMENT = ("case_id", "relation_id", "subject", "query", "sentence", "target_true", "target_false")


def files(run: Run) -> dict[str, str]:
    """Return path -> text, in a folder for each model."""
    found: dict[str, str] = {}
    date = run.created.replace(tzinfo=None).isoformat().replace(":", "-")
    for name, model in run.models.items():
        folder = path_part(name)
        found[f"{folder}/results_{date}.json"] = json_text(_results(run, name, model)) + "\n"
        for part in run.parts(model):
            samples = (_sample(run, part, index) for index in range(len(part.items)))
            found[f"{folder}/samples_{path_part(part.task)}_{date}.jsonl"] = lines(samples)
    return found


def _results(run: Run, name: str, model: ScoredModel) -> dict[str, Any]:
    settings, provenance = run.result.settings, run.result.provenance
    config = {
        "model": "hijacklens",
        "model_args": {"pretrained": name, **run.setup(model)},
        "model_dtype": model.dtype,
        "random_seed": settings.seed,
    }
    found: dict[str, Any] = {key: {} for key in BY_TASK} | {
        "config": config,
        "git_hash": provenance.commit or "",
        "date": run.created.timestamp(),
        "model_source": "hijacklens",
        "model_name": name,
        "model_name_sanitized": path_part(name),
    }
    for part in run.parts(model):
        task, n = part.task, len(part.items)
        means: dict[str, Any] = {"name": task, "alias": task, "sample_len": n}
        for score in part.scores:
            means[f"{METRICS[score.measure]},none"] = score.value
            if n > 1:
                means[f"{METRICS[score.measure]}_stderr,none"] = score.error
        higher = {METRICS[score.measure]: score.measure == "retention" for score in part.scores}
        form = {"task": task, "output_type": "multiple_choice", "rule": run.rule}
        counts = {"original": settings.facts.n, "effective": n}
        values = (means, [], form, run.version, 0, higher, counts)
        for key, value in zip(BY_TASK, values, strict=True):
            found[key][task] = value
    return found


def _sample(run: Run, part: Part, index: int) -> dict[str, Any]:
    row, joining = part.items[index], run.result.settings.facts.joining
    document, prompt = {name: row[name] for name in DOCUMENT}, row["prompt"]
    targets = [row["target_true"], row["target_false"]]
    responses = [[str(row["score_true"]), "None"], [str(row["score_false"]), "None"]]
    metrics = {METRICS[name]: float(row[column]) for name, column in MEASURES.items()}
    return {
        "doc_id": index,
        "doc": document,
        "target": "0",
        "arguments": {
            f"gen_args_{i}": {"arg_0": prompt, "arg_1": gap(prompt, target, joining) + target}
            for i, target in enumerate(targets)
        },
        "resps": [[response] for response in responses],
        "filtered_resps": responses,
        "filter": "none",
        "metrics": list(metrics),
        "doc_hash": digest(json.dumps(document, indent=2, ensure_ascii=False)),
        "prompt_hash": digest(prompt),
        "target_hash": digest("0"),
        **metrics,
    }
