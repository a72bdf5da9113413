"""Records of Every Eval Ever, schema 0.3.0: an aggregate for each model, and its instances.

Paths are those of its datastore, `data/hijacklens/<developer>/<model>/<uuid>.json`. The uncertainty
of a mean is the one about these facts; the interval about relations like these is in the details.
An item has an instance for each mean to which it contributes; its output is the target with the
higher score, and empty for a tie.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any
from uuid import UUID

from hijacklens.exports.run import MEASURES, Part, Run, Score, digest, lines, path_part
from hijacklens.files import json_text
from hijacklens.scoring.result import ScoredModel

SCHEMA = "0.3.0"
DETAILS = ("ties", "clusters", "clustered_low", "clustered_high", "design_effect")
METADATA = ("relation_id", "subject", "scheme", "dose", "score_true", "score_false", "top_token")


def files(run: Run) -> dict[str, str]:
    """Return path -> text: an aggregate and its instances for each model."""
    return {
        path: text for name, model in run.models.items() for path, text in _model(run, name, model)
    }


def _model(run: Run, name: str, model: ScoredModel) -> Iterator[tuple[str, str]]:
    created = str(int(run.created.timestamp()))
    developer, _, short = name.rpartition("/")
    shared = {"schema_version": SCHEMA, "evaluation_id": f"hijacklens/{name}/{created}"}
    parts = [*run.parts(model)]
    text = lines(
        {**shared, "model_id": name, **instance}
        for part in parts
        for score in part.scores
        for instance in _instances(part, score)
    )
    uuid = UUID(bytes=bytes.fromhex(digest(shared["evaluation_id"] + text)[:32]), version=4)
    place = f"data/hijacklens/{path_part(developer or 'unknown')}/{path_part(short)}/{uuid}"
    library = {"name": "hijacklens", "version": run.version}
    aggregate = {
        **shared,
        "evaluation_timestamp": created,
        "retrieved_timestamp": str(int(time.time())),
        "source_metadata": {
            "source_name": "hijacklens",
            "source_type": "evaluation_run",
            "source_organization_name": run.organization,
            "evaluator_relationship": "other",
        },
        "eval_library": library,
        "model_info": {
            "name": model.name,
            "id": name,
            "developer": developer or "unknown",
            "inference_engine": library,
            "additional_details": {
                "deployment_type": "self_deployed",
                "model_availability": "unknown",
                **run.setup(model),
            },
        },
        "evaluation_results": [_mean(run, part, score) for part in parts for score in part.scores],
        "detailed_evaluation_results": {
            "format": "jsonl",
            "file_path": f"{place}_samples.jsonl",
            "hash_algorithm": "sha256",
            "checksum": digest(text),
            "total_rows": text.count("\n"),
        },
    }
    yield f"{place}.json", json_text(aggregate) + "\n"
    yield f"{place}_samples.jsonl", text


def _mean(run: Run, part: Part, score: Score) -> dict[str, Any]:
    fraction, facts, n = score.measure != "shift", run.result.settings.facts, len(part.items)
    low, high = (0, 1) if fraction else ("-Infinity", "Infinity")
    uncertainty: dict[str, Any] = {"num_samples": n}
    if fraction or n > 1:
        uncertainty["confidence_interval"] = {
            "lower": score.low,
            "upper": score.high,
            "confidence_level": 0.95,
            "method": "Wilson" if fraction else "Student's t",
        }
    if n > 1:
        uncertainty["standard_error"] = {"value": score.error, "method": "analytic"}
    details = DETAILS if score.measure == "efficacy" and part.summary["clusters"] > 1 else ("ties",)
    return {
        "evaluation_result_id": f"{part.task}/{score.measure}",
        "evaluation_name": part.task,
        "source_data": {
            "dataset_name": facts.title,
            "source_type": "other",
            "additional_details": {"facts": str(facts.n), "hash": facts.hash},
        },
        "metric_config": {
            "metric_id": f"hijacklens.{score.measure}",
            "metric_name": score.measure,
            "metric_unit": "proportion" if fraction else "nats",
            "metric_parameters": {"rule": run.rule}
            | {name: part.summary[name] for name in ("scheme", "dose")},
            "lower_is_better": score.measure != "retention",
            "score_type": "continuous",
            "min_score": low,
            "max_score": high,
        },
        "score_details": {
            "score": score.value,
            "details": {name: str(part.summary[name]) for name in details},
            "uncertainty": uncertainty,
        },
    }


def _instances(part: Part, score: Score) -> Iterator[dict[str, Any]]:
    for row in part.items:
        true, false = row["target_true"], row["target_false"]
        chosen = true if row["true_wins"] else false if row["false_wins"] else ""
        yield {
            "evaluation_name": part.task,
            "evaluation_result_id": f"{part.task}/{score.measure}",
            "sample_id": str(row["case_id"]),
            "sample_hash": digest(row["prompt"] + true),
            "interaction_type": "single_turn",
            "input": {"raw": row["prompt"], "reference": [true], "choices": [true, false]},
            "output": {"raw": [chosen]},
            "answer_attribution": [],
            "evaluation": {
                "score": float(row[MEASURES[score.measure]]),
                "is_correct": bool(row["true_wins"]),
            },
            "metadata": {name: str(row[name]) for name in METADATA},
        }
