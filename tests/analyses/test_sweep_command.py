"""`hijacklens sweep`: the file, the cells, the table, and going on after a cut."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sample_facts import sample_facts
from tiny_models import tiny_model, tiny_tokenizer

from analyses.commands.group import main
from analyses.sweeps import run as sweep_module
from analyses.sweeps.file import load_sweep, read_sweep
from analyses.sweeps.run import SweepResult, SweepSettings
from hijacklens.errors import InputError
from hijacklens.models.loading import load_model
from hijacklens.results.result import Provenance, load_result
from hijacklens.scoring.hijack import hijack

EXAMPLE = Path(__file__).parents[2] / "examples" / "sweep.toml"
TRAINING = """
[training]
seeds = 2
[[training.tasks]]
bits = 3
length = 16
[[training.recipes]]
d_model = 8
steps = 20
evaluation = 256
batch = 16
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep")
    tiny_model("gpt2").save_pretrained(path / "tiny-gpt2")
    tiny_tokenizer("gpt2").save_pretrained(path / "tiny-gpt2")
    table = sample_facts().to_dataframe().drop(columns="prompt")
    table.to_json(path / "facts.jsonl", orient="records", lines=True)
    return path


def scoring(root, *families, more=""):
    models = ", ".join(f'"{root}/tiny-{family}"' for family in families)
    return f"""
[scoring]
models = [{models}]
schemes = ["do-not-think", "never-say"]
facts = [{{ source = "{root}/facts.jsonl", limit = 6 }}]
seeds = [0, 1]
doses = "0-1"
{more}
[scoring.templates]
never-say = "Never say {{target_false}}."
"""


def run(config, out, text, *options):
    config.write_text(text)
    try:
        main(["sweep", str(config), "--out", str(out), "--quiet", *options])
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture(scope="module")
def done(root):
    """A finished sweep; what it wrote is not changed by tests."""
    text = scoring(root, "gpt2") + TRAINING
    assert run(root / "sweep.toml", root / "done", text) == 0
    return root / "done"


def test_one_table_of_all_cells(root, done):
    table = pd.read_csv(done / "sweep.csv")
    scored = table[table["kind"] == "scoring"]
    assert len(scored) == 2 * 2 * 2  # schemes, seeds, doses
    assert len(set(scored["cell"])) == 4
    assert list(table[table["kind"] == "training"]["lr"]) == [0.01, 0.001]
    facts = sample_facts().limit(6, seed=1)
    model = load_model(root / "tiny-gpt2", device="cpu")
    alone = hijack(model, facts, schemes=["do-not-think"], doses=[1], quiet=True).summary()
    rows = scored.query("scheme == 'do-not-think' and seed == 1")
    for column in ("dose", "n", "efficacy", "efficacy_low", "retention", "mean_shift"):
        np.testing.assert_allclose(rows[column], alone[column], atol=1e-4)
    cell = load_result(done / rows["cell"].iloc[0])
    pd.testing.assert_frame_equal(cell.summary(), alone, atol=1e-4)
    trained = load_result(done / table[table["kind"] == "training"]["cell"].iloc[0])
    means = trained.summary().groupby("lr", sort=False)["accuracy"].mean()
    np.testing.assert_allclose(table["accuracy"].dropna(), means)
    whole = load_result(done)
    pd.testing.assert_frame_equal(whole.to_dataframe(), table, check_dtype=False)
    assert whole.table["dose"].dtype == "Int64"
    assert len(whole.failed) == 0
    assert {path.name for path in done.iterdir()} >= {"sweep.svg", "sweep.png", "failed.csv"}


def test_finished_cells_are_skipped_and_missing_ones_made_again(root, done, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    table = pd.read_csv(out / "sweep.csv")
    lost = sorted(set(table["cell"]))[2]
    (out / lost / "result.json").unlink()
    calls = []
    monkeypatch.setattr(
        sweep_module,
        "hijack",
        lambda *given, **options: calls.append(1) or hijack(*given, **options),
    )
    monkeypatch.setattr(sweep_module, "train", None)  # nothing is trained again
    text = scoring(root, "gpt2") + TRAINING
    assert run(tmp_path / "s.toml", out, text) == 0
    assert len(calls) == 1
    again = pd.read_csv(out / "sweep.csv")
    pd.testing.assert_frame_equal(again, table, atol=1e-5, rtol=0)
    more = scoring(root, "gpt2", more='rule = "sum"')
    assert run(tmp_path / "s.toml", out, more) == 0  # another rule needs no other run
    assert len(calls) == 1
    assert set(pd.read_csv(out / "sweep.csv")["rule"]) == {"sum"}


def test_a_changed_model_folder_has_new_cells(root, tmp_path):
    """The numbers of other weights, another config or another tokenizer are never repeated."""
    folder, out = tmp_path / "tiny-gpt2", tmp_path / "out"
    shutil.copytree(root / "tiny-gpt2", folder)
    text = scoring(root, "gpt2").replace(', "never-say"', "").replace(str(root / "tiny"), "{}")
    text = text.replace("{}", str(tmp_path / "tiny")).replace("seeds = [0, 1]", "")

    def cells():
        assert run(tmp_path / "s.toml", out, text) == 0
        return pd.read_csv(out / "sweep.csv")

    first = cells()
    assert set(cells()["cell"]) == set(first["cell"])
    weights = folder / "model.safetensors"
    kept = weights.read_bytes()
    tiny_model("gpt2", seed=1).save_pretrained(folder)
    assert weights.read_bytes() != kept
    second = cells()
    assert set(second["cell"]).isdisjoint(first["cell"])
    assert list(second["mean_shift"]) != list(first["mean_shift"])
    for name in ("config.json", "tokenizer_config.json"):
        record = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**record, "added_here": 1}))
        other = cells()
        assert set(other["cell"]).isdisjoint(second["cell"])
        second = other


def test_another_result_is_no_place_for_a_sweep(done, tmp_path, capsys):
    (cell,) = (done / "training").iterdir()
    before = load_result(cell).save(tmp_path / "out") / "result.json"
    kept = before.read_bytes()
    assert run(tmp_path / "s.toml", tmp_path / "out", TRAINING) == 2
    assert "contains a result that is no sweep" in capsys.readouterr().err
    assert before.read_bytes() == kept


def test_a_cell_that_fails_is_listed_and_the_others_go_on(root, tmp_path, capsys):
    text = scoring(root, "gpt2", "none").replace(', "never-say"', "")
    assert run(tmp_path / "s.toml", tmp_path / "out", text) == 1
    printed = capsys.readouterr()
    assert "2 of 4 cells failed" in printed.err
    assert "does not exist" in printed.err
    assert "Traceback" not in printed.err
    assert set(pd.read_csv(tmp_path / "out" / "sweep.csv")["model"]) == {"tiny-gpt2"}
    failed = pd.read_csv(tmp_path / "out" / "failed.csv")
    assert list(failed["cell"].str.contains("tiny-none")) == [True, True]


def test_two_models_of_one_name_keep_their_own_lines(root, tmp_path):
    for i, run_name in enumerate(("runA", "runB")):
        folder = tmp_path / run_name / "checkpoint-500"
        tiny_model("gpt2", seed=i).save_pretrained(folder)
        tiny_tokenizer("gpt2").save_pretrained(folder)
    text = scoring(root, "gpt2").replace("seeds = [0, 1]", "").replace(', "never-say"', "")
    names = [f"{tmp_path}/{name}/checkpoint-500" for name in ("runA", "runB")]
    text = text.replace(f"{root}/tiny-gpt2", '", "'.join(names))
    assert run(tmp_path / "s.toml", tmp_path / "out", "\ufeff" + text) == 0  # as Notepad saves it
    result = load_result(tmp_path / "out")
    assert list(result.table["model"].unique()) == ["runA/checkpoint-500", "runB/checkpoint-500"]
    (legend,) = result.plot().legends
    assert len(legend.get_texts()) == 2


def test_the_figure_keeps_lengths_apart_and_names_the_probes():
    scored = [
        {"kind": "scoring", "cell": "a", "model": "m", "scheme": "s", "dose": dose, "efficacy": 0.1}
        for dose in (0, 1)
    ]
    trained = [
        {"kind": "training", "cell": f"L{length}", "bits": 5, "length": length, "dim": 16}
        | {"freeze": "", "lr": 0.01, "accuracy": length / 100}
        for length in (16, 64)
    ]
    result = SweepResult(
        table=pd.DataFrame([*scored, *trained]),
        failed=pd.DataFrame(columns=["cell", "reason"]),
        settings=SweepSettings(sweep={"scoring": {"probes": ["ablate:heads=0"]}}, cells=("a",)),
        provenance=Provenance.now(),
    )
    figure = result.plot()
    lines = [list(line.get_ydata()) for line in figure.axes[1].get_lines()]
    assert lines == [[0.16], [0.64]]
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named == ["m · s", "m = 5, L = 16, d = 16", "m = 5, L = 64, d = 16"]
    assert "with ablate:heads=0" in figure._suptitle.get_text()
    assert "scored with ablate:heads=0" in str(result)


def test_interrupted_it_goes_on(root, done, tmp_path, monkeypatch):
    calls = []

    def interrupted(*given, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return hijack(*given, **options)

    monkeypatch.setattr(sweep_module, "hijack", interrupted)
    text = scoring(root, "gpt2").replace(', "never-say"', "")
    assert run(tmp_path / "s.toml", tmp_path / "out", text) == 130
    assert run(tmp_path / "s.toml", tmp_path / "out", text) == 0
    assert len(calls) == 2 + 1
    table, whole = (pd.read_csv(path / "sweep.csv") for path in (tmp_path / "out", done))
    expected = whole[whole["scheme"] == "do-not-think"].reset_index(drop=True)
    same = {"check_dtype": False, "atol": 1e-5, "rtol": 0}
    pd.testing.assert_frame_equal(table, expected[table.columns], **same)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the sweep is empty"),
        ("[scoring", "this is not TOML"),
        ("[scorign]", "did you mean 'scoring'"),
        ("[scoring]\nmodles = ['gpt2']", "did you mean 'models'"),
        ("[scoring]\nseeds = 2", "lacks models"),
        ("[scoring]\nmodels = 'gpt2'", "scoring.models is 'gpt2'; give a list"),
        ("[scoring]\nmodels = ['a', 'a']", "is listed twice"),
        ("[scoring]\nmodels = [{ dtype = 'float32' }]", "lacks source"),
        ("[scoring]\nmodels = [{ source = 'a', dtyp = 'x' }]", "did you mean 'dtype'"),
        ("[scoring]\nmodels = [{ source = 'a', dtype = 'float8' }]", "unknown dtype 'float8'"),
        ("[scoring]\nmodels = ['a']\nschemes = ['do-not-thinc']", "did you mean 'do-not-think'"),
        ("[scoring]\nmodels = ['a']\ndoses = '3-1'", "scoring.doses: doses '3-1'"),
        ("[scoring]\nmodels = ['a']\nseeds = [-1]", "whole number of at least 0"),
        ("[scoring]\nmodels = ['a']\nseeds = 0", "whole number of at least 1"),
        ("[scoring]\nmodels = ['a']\nrule = 'frist'", "did you mean 'first'"),
        ("[scoring]\nmodels = ['a']\nprobes = ['knok-out:layers=1']", "did you mean 'knock-out'"),
        ("[scoring]\nmodels = ['a']\nfacts = [{ source = 'atlas', limt = 3 }]", "'limit'"),
        (
            "[scoring]\nmodels = ['a']\nfacts = [{ limit = 0 }]",
            "scoring.facts[0].limit is 0; give a whole number of at least 1",
        ),
        (
            "[scoring]\nmodels = ['a']\n[scoring.templates]\nthink = 'No.'",
            "the scheme 'think' exists",
        ),
        ("[training]\n[[training.tasks]]\nbits = 3", "lacks recipes"),
        ("scoring = 3", "scoring is 3; give a table"),
        ("[scoring]\nmodels = []", "scoring.models is []; give a list with at least one item"),
        ("[scoring]\nmodels = [3]", "scoring.models[0] is 3; give a table"),
        ("[scoring]\nmodels = ['a']\nschemes = [1]", "scoring.schemes[0] is 1; give a text"),
        ("[scoring]\nmodels = ['a']\nbatch_tokens = true", "give a whole number"),
        (TRAINING.replace("[training]", "[training]\nlr = 1"), "unknown key 'lr'"),
        (
            TRAINING.replace("bits = 3", "bits = 99"),
            "bits is 99; give a whole number",
        ),
        (TRAINING.replace("bits = 3", "omega = 0.5"), "training.tasks[0]: it lacks bits"),
        (TRAINING.replace("d_model = 8", "d_mdel = 8"), "did you mean 'd_model'"),
        (TRAINING.replace("steps = 20", "steps = 0"), "steps is 0"),
        (TRAINING + "freeze = ['W_X']", "W_X"),
    ],
)
def test_a_file_that_cannot_be_run_is_one_clear_error(text, message, tmp_path, capsys):
    assert run(tmp_path / "s.toml", tmp_path / "out", text) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert not (tmp_path / "out").exists()


def test_other_bad_input(tmp_path, capsys):
    with pytest.raises(InputError, match="cannot read the sweep"):
        load_sweep(tmp_path / "none.toml")
    for options, message in (
        (["--engine", "rai"], "did you mean 'ray'"),
        (["--workers", "2"], "--workers 2 needs --engine ray"),
        (["--ray-address", "auto"], "--ray-address auto needs --engine ray"),
    ):
        assert run(tmp_path / "s.toml", tmp_path / "out", TRAINING, *options) == 2
        assert message in capsys.readouterr().err


def test_the_example_can_be_read():
    plan = load_sweep(EXAMPLE)
    assert [model.source for model in plan.scoring.models] == ["smollm2-135m", "gemma3-270m"]
    assert len(plan.training.tasks) == len(plan.training.recipes) == 2
    assert read_sweep(TRAINING).scoring is None


@pytest.mark.ray
def test_ray_gives_the_same_table(root, done, tmp_path):
    ray = pytest.importorskip("ray", reason="needs the extra ray: pip install 'hijacklens[ray]'")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        text = scoring(root, "gpt2") + TRAINING
        options = ("--engine", "ray", "--workers", "2")
        assert run(tmp_path / "s.toml", tmp_path / "out", text, *options) == 0
    finally:
        ray.shutdown()
    table, whole = (pd.read_csv(path / "sweep.csv") for path in (tmp_path / "out", done))
    pd.testing.assert_frame_equal(table, whole, atol=1e-4, rtol=0)
