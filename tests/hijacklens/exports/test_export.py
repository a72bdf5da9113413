"""Exports validate against the published schemas and have the numbers of the summary."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hijack_runs import made_up_run
from jsonschema import Draft7Validator
from pydantic import TypeAdapter
from sample_facts import sample_facts

import hijacklens as hl
from analyses.commands.group import main
from hijacklens.errors import InputError
from hijacklens.facts.chat import Chat

SCHEMAS = Path(__file__).with_name("schemas")
KEYS = ["scheme", "dose"]
IDS = {"alpha": "me/alpha", "beta": "me/beta"}
RUNS = {
    "two models": made_up_run(),
    "one fact": made_up_run(models=("alpha",), facts=tuple(sample_facts())[:1], doses=(0, 2)),
}


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def summary(run, model, rule):
    """(scheme, dose) -> the row of the summary."""
    table = run.summary(rule=rule)
    return {tuple(row[KEYS]): row for _, row in table[table["model"] == model].iterrows()}


def with_settings(run, **changes):
    return replace(run, settings=replace(run.settings, **changes))


@pytest.mark.parametrize(("name", "rule"), [*zip(RUNS, ["mean", "first"], strict=True)])
def test_every_eval_ever(name, rule, tmp_path):
    run = RUNS[name]
    files = hl.export(run, tmp_path, to="every-eval-ever", rule=rule, organization="We")
    aggregate, instance = (
        Draft7Validator(json.loads((SCHEMAS / f"{kind}.schema.json").read_text()))
        for kind in ("eval", "instance_level_eval")
    )
    for path in files[::2]:
        record = json.loads(path.read_text())
        aggregate.validate(record)
        rows = summary(run, record["model_info"]["name"], rule)
        found = {}
        for mean in record["evaluation_results"]:
            about, score = mean["metric_config"], mean["score_details"]
            assert about["metric_parameters"].pop("rule") == rule
            row = rows[tuple(about["metric_parameters"][key] for key in KEYS)]
            measure = about["metric_name"]
            assert score["score"] == row["mean_shift" if measure == "shift" else measure]
            uncertainty = score["uncertainty"]
            assert uncertainty["num_samples"] == row["n"]
            if measure == "efficacy":
                ends = uncertainty["confidence_interval"]
                np.testing.assert_allclose(
                    [ends["lower"], ends["upper"]], list(row[["efficacy_low", "efficacy_high"]])
                )
            assert ("standard_error" in uncertainty) == (row["n"] > 1)
            found[mean["evaluation_result_id"]] = score["score"]
        assert len(found) == sum(3 if dose else 2 for _, dose in rows)
        detailed = record["detailed_evaluation_results"]
        samples = tmp_path / detailed["file_path"]
        instances = read_lines(samples)
        assert len(instances) == detailed["total_rows"]
        scores = {}
        for one in instances:
            instance.validate(one)
            assert one["evaluation_id"] == record["evaluation_id"]
            scores.setdefault(one["evaluation_result_id"], []).append(one["evaluation"]["score"])
        for key, values in scores.items():
            np.testing.assert_allclose(np.mean(values), found.pop(key), atol=1e-12)
        assert not found
    prompt = next(one for one in instances if one["metadata"]["dose"] == "2")["input"]["raw"]
    assert prompt.count("Do not think of Guam. ") == 2
    assert prompt.endswith("The Eiffel Tower is in the city of")


@pytest.mark.parametrize("name", RUNS)
def test_lm_eval(name, tmp_path):
    schema = pytest.importorskip("lm_eval.result_schema", reason="the extra lm-eval")
    run = RUNS[name]
    files = hl.export(run, tmp_path, to="lm-eval", ids={"alpha": "me/alpha"})
    assert {path.parent.name for path in files} <= {"me__alpha", "beta"}
    sample = TypeAdapter(schema.SampleResult)
    for path in (path for path in files if path.suffix == ".json"):
        record = json.loads(path.read_text())
        TypeAdapter(schema.EvalResults).validate_python(record)
        model = record["model_name"].removeprefix("me/")
        rows = summary(run, model, "first")
        assert len(record["results"]) == len(rows)
        for (scheme, dose), row in rows.items():
            task = f"hijack_{scheme}_dose{dose}"
            means = record["results"][task]
            (place,) = path.parent.glob(f"samples_{task}_*.jsonl")
            samples = [sample.validate_python(one) for one in read_lines(place)]
            shift = {"shift": "mean_shift"} if dose else {}
            for metric, column in {"acc": "retention", "efficacy": "efficacy", **shift}.items():
                assert means[f"{metric},none"] == row[column]
                values = [one[metric] for one in samples]
                np.testing.assert_allclose(np.mean(values), row[column], atol=1e-12)
            assert means["sample_len"] == len(samples) == row["n"]


def test_hub(tmp_path):
    from huggingface_hub import parse_eval_result_entries

    run = RUNS["two models"]
    files = hl.export(run, tmp_path, to="hub", ids=IDS, dataset="me/facts", rule="sum")
    for model, path in zip(IDS, files, strict=True):
        assert path == tmp_path / "me" / model / ".eval_results" / "hijacklens.yaml"
        entries = parse_eval_result_entries(yaml.safe_load(path.read_text(encoding="utf-8")))
        rows = summary(run, model, "sum")
        tasks = [f"hijack_{scheme}_dose{dose}" for scheme, dose in rows]
        assert [entry.task_id for entry in entries] == tasks
        assert [entry.value for entry in entries] == [row["retention"] for row in rows.values()]
        assert {entry.dataset_id for entry in entries} == {"me/facts"}


def test_a_data_set_loads_with_its_card(tmp_path):
    from datasets import load_dataset
    from huggingface_hub import DatasetCard

    run, folder = RUNS["two models"], tmp_path / "set"
    hl.export(run, folder, to="dataset")
    card = DatasetCard.load(folder / "README.md")
    names = [config["config_name"] for config in card.data.configs]
    expected = {"items": run.items, "summary": run.full_summary, "prompts": run.prompts}
    assert names == [*expected]
    for name, table in expected.items():
        found = load_dataset(str(folder), name, split="train", cache_dir=str(tmp_path / "cache"))
        assert found.to_pandas()[[*table]].equals(table), name
    without = replace(run, prompts=run.prompts.iloc[:0])
    assert len(hl.export(without, tmp_path / "without", to="dataset")) == 3


@pytest.mark.parametrize(
    ("to", "changes", "options", "reason"),
    [
        ("hub", {"probes": ("knock-out",)}, {"dataset": "me/x", "ids": IDS}, "the probe 'knock-o"),
        (
            "hub",
            {},
            {"ids": IDS},
            "hub needs the id of the benchmark's data set, such as 'me/name'",
        ),
        ("hub", {}, {"dataset": "me/facts"}, "the model alpha.*no owner.*--id alpha=OWNER/NAME"),
        ("hub", {}, {"dataset": "../x", "ids": IDS}, "not '../x'"),
        ("lm-eval", {}, {"ids": {"alfa": "me/alpha"}}, "model of this run 'alfa'.*alpha"),
        ("lm-eval", {}, {"rule": "firts"}, "rule 'firts'"),
        ("lmeval", {}, {}, "kind of export 'lmeval'.*lm-eval"),
        ("lm-eval", "chat", {}, "lm-eval cannot express this run.*chat"),
        ("lm-eval", {}, {"ids": {"alpha": "me/x", "beta": "me/x"}}, "have the same id"),
        ("every-eval-ever", "no prompts", {}, "without its prompts"),
        ("lm-eval", "comparison", {}, "takes a run of hijacklens hijack, not a Comparison"),
    ],
)
def test_what_a_kind_cannot_express_is_refused(to, changes, options, reason, tmp_path):
    run = RUNS["two models"]
    if changes == "chat":
        run = with_settings(run, facts=replace(run.settings.facts, chat=Chat()))
    elif changes == "no prompts":
        run = replace(run, prompts=run.prompts.iloc[:0])
    elif changes == "comparison":
        run = run.compare(1, 2)
    else:
        run = with_settings(run, **changes)
    with pytest.raises(InputError, match=f"(?s){reason}"):
        hl.export(run, tmp_path / "out", to=to, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["lm-eval", "every-eval-ever"])
def test_names_of_models_and_schemes_do_not_leave_the_folder(to, tmp_path):
    run = made_up_run(models=("../../evil",), schemes=("a/../../b",), doses=(0, 1))
    files = hl.export(run, tmp_path / "out", to=to)
    assert all((tmp_path / "out") in path.resolve().parents for path in files)


def test_the_command_writes_several_kinds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made_up_run(schemes=("think",), doses=(0, 1)).save("runs/first")
    line = ["export", "runs/first", "--to", "dataset", "--to", "hub", "--out", "out"]
    line += ["--id", "alpha=me/alpha", "--id", "beta=me/beta", "--dataset", "me/facts"]

    def status():
        try:
            main(line)
        except SystemExit as stop:
            return stop.code
        return 0

    assert status() == 0
    assert capsys.readouterr().out == "written to out/dataset/\nwritten to out/hub/\n"
    assert status() == 2
    assert "out/dataset/data/items.parquet' already exists" in capsys.readouterr().err
    line += ["--overwrite", "--json"]
    assert status() == 0
    document = json.loads(capsys.readouterr().out)
    assert document["files"][-1] == "hub/me/beta/.eval_results/hijacklens.yaml"
    line += ["--id", "alpha"]
    assert status() == 2
    assert "--id takes NAME=OWNER/NAME" in capsys.readouterr().err
