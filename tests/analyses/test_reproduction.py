"""Reproductions: the registry, results on disk, the ledger, the command, checks that can fail."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner
from sabotages import Sabotage, sabotages
from tiny_models import tiny_model, tiny_tokenizer

import hijacklens as hl
from analyses.commands.group import group
from analyses.reproduction.analysis import analyses
from analyses.reproduction.ledger import EXPLANATION, write_ledger
from analyses.reproduction.reproduction import reproduce
from analyses.reproduction.settings import TrainingSettings
from hijacklens.errors import InputError

ALL = analyses()
FIGURES_OF_SPECTRA = ("figc9", "figc10", "figc11", "figc12")
LEDGER = Path(__file__).parents[2] / "docs" / "reproduction"


def run(*arguments):
    return CliRunner().invoke(group, ["reproduce", *map(str, arguments)])


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny random model with rotary positions, as a folder that `load_model` reads."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer("llama").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", ALL)
def test_an_analysis_says_what_it_is(name):
    analysis = ALL[name]
    assert set(analysis.settings) == set(analysis.entry.cost) == {"quick", "full"}
    names = {item.name for item in fields(analysis.settings["quick"])}
    assert set(analysis.ours) <= names
    claims = [check.claim for check in analysis.checks]
    assert claims
    assert len(set(claims)) == len(claims)
    for check in analysis.checks:
        assert check.remark or check.scales == ("quick", "full")


@pytest.mark.parametrize("name", ALL)
def test_every_check_has_a_sabotage(name):
    broken = [claim for s in sabotages() if s.analysis == name for claim in s.claims]
    for check in ALL[name].checks:
        assert any(check.claim.startswith(claim) for claim in broken), check.claim


@pytest.mark.slow
@pytest.mark.parametrize("sabotage", sabotages(), ids=lambda s: f"{s.analysis}: {s.how}")
def test_a_sabotage_makes_its_checks_fail(sabotage: Sabotage, tiny_folder, monkeypatch):
    sabotage.patch(monkeypatch)
    result = reproduce(
        sabotage.analysis, scale=sabotage.scale, changes=sabotage.changes, models=[tiny_folder]
    )
    for claim in sabotage.claims:
        (outcome,) = [o for o in result.outcomes if o.claim.startswith(claim)]
        assert outcome.state == "fail", outcome
    assert not result.passed


def test_a_reproduction_is_read_back(tmp_path):
    result = reproduce("lemma5")
    result.save(tmp_path / "lemma5")
    assert {p.name for p in (tmp_path / "lemma5").iterdir()} == {
        "table.csv",
        "figure.svg",
        "figure.png",
        "result.json",
    }
    again = hl.load_result(tmp_path / "lemma5")
    assert again.settings == result.settings
    assert again.outcomes == result.outcomes
    pd.testing.assert_frame_equal(again.to_dataframe(), result.to_dataframe())
    again.plot().canvas.draw()


def test_the_ledger_has_a_row_for_every_check_and_names_what_is_missing(tmp_path):
    result = reproduce("lemma5")
    result.save(tmp_path / "lemma5")
    text = write_ledger(tmp_path)
    for outcome in result.outcomes:
        assert text.count(f"| {outcome.claim} |") == 1
    assert "- identities, which test our code" in text
    assert f"{len(result.outcomes)}, of which {len(result.outcomes)} pass, 0 fail" in text
    assert "the hash that was taken before the run: 1 of 1" in text
    assert ALL["lemma5"].entry.objection in text
    for name in set(ALL) - {"lemma5"}:
        assert name in text.split("Not run here: ")[1]


def test_the_ledger_includes_written_explanations(tmp_path):
    reproduce("lemma5").save(tmp_path / "lemma5")
    before = write_ledger(tmp_path)
    for name, why in (("lemma5", "Seen by\nhand."), ("fig1", "Asks for two models.")):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "explanation.md").write_text(why + "\n")
    added = set(write_ledger(tmp_path).splitlines()) - set(before.splitlines())
    assert added == {"- `lemma5`: Seen by hand.", "- `fig1`: Asks for two models."}


def test_the_committed_ledger_is_generated_from_the_committed_results():
    assert (LEDGER / "README.md").read_text() == write_ledger(LEDGER)


@pytest.mark.parametrize(
    "name",
    [path.parent.relative_to(LEDGER) for path in sorted(LEDGER.rglob("result.json"))],
    ids=str,
)
def test_committed_tables_give_the_committed_outcomes(name):
    held = hl.load_result(LEDGER / name)
    again, none = (
        held.analysis.judge(held.table, held.scale, held.settings),
        dict.fromkeys(("value", "low", "high"), 0.0),
    )
    for was, now in zip(held.outcomes, again, strict=True):
        assert replace(now, **none) == replace(was, **none)
        numbers = [(each.value, each.low, each.high) for each in (now, was)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-6, abs=1e-12, nan_ok=True)
    assert held.passed or (LEDGER / name / EXPLANATION).exists()


def test_the_command_resumes(tmp_path):
    assert run("lemma5", "--out", tmp_path).exit_code == 0
    record = tmp_path / "lemma5" / "result.json"
    before = record.stat().st_mtime_ns
    assert run("lemma5", "--out", tmp_path).exit_code == 0
    assert record.stat().st_mtime_ns == before
    assert run("lemma5", "--out", tmp_path, "--overwrite").exit_code == 0
    assert record.stat().st_mtime_ns > before


def test_a_failed_check_makes_the_command_fail_and_stays_in_the_ledger(tmp_path, monkeypatch):
    broken = next(s for s in sabotages() if s.analysis == "lemma5" and not s.changes)
    broken.patch(monkeypatch)
    result = run("lemma5", "--out", tmp_path)
    assert result.exit_code == 1
    assert "**fail**" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "lemma5" / "result.json").read_text())["passed"] is False


def test_the_list_names_every_analysis():
    lines, legend = run("--list").output.split("\n\n")
    lines = lines.splitlines()[1:]
    assert "depends: on models and facts" in " ".join(legend.split())
    assert [line.split()[0] for line in lines] == list(ALL)


WRONG = {
    "an unknown id": (["lema5", "--out", "x"], "unknown analysis 'lema5'; did you mean 'lemma5'"),
    "no id": (["--out", "x"], "name an analysis"),
    "no folder": (["lemma5"], "--out is missing"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_commands(name):
    arguments, message = WRONG[name]
    with pytest.raises(InputError, match=message):
        CliRunner().invoke(group, ["reproduce", *arguments], catch_exceptions=False)


def test_another_scale_in_the_folder_is_refused(tmp_path):
    run("lemma5", "--out", tmp_path)
    """`paper` is the former name of `full`."""
    for name in ("full", "paper"):
        result = run("lemma5", "--out", tmp_path, "--scale", name)
        assert isinstance(result.exception, InputError)
        assert "holds lemma5 with the scale quick, not full" in str(result.exception)


def test_settings_are_changed_by_name(tmp_path):
    """The ledger prints the command, and the same command resumes."""
    for _ in range(2):
        shown = run("lemma5", "--out", tmp_path, "--set", "bits=[3,4]")
        assert shown.exit_code == 0
        assert "(scale quick, bits [3, 4], " in shown.output
    assert "--set 'bits=[3, 4]'`" in (tmp_path / "README.md").read_text()
    refused = run("lemma5", "--out", tmp_path, "--set", "bits=3,4")
    assert "'bits=3,4' is not NAME=JSON" in str(refused.exception)
    both = run("lemma5", "lemma6", "--out", tmp_path / "both", "--set", "slopes=[1]")
    assert "unknown setting 'slopes'" in str(both.exception)
    assert not (tmp_path / "both").exists()  # nothing ran before


def test_a_repeated_check_counts_once_and_its_ledger_names_the_first(tmp_path):
    """Two runs of one analysis on the same facts have the same claims and numbers."""
    result = reproduce("lemma5")
    result.save(tmp_path / "lemma5")
    result.save(tmp_path / "again" / "lemma5")
    text = write_ledger(tmp_path)
    assert text.count("| pass, repeats lemma5 |") == len(result.outcomes)
    assert f"- rows that repeat another one: {len(result.outcomes)}" in text
    assert f": {len(result.outcomes)}, of which {len(result.outcomes)} pass" in text


def test_checks_are_hashed_before_the_run(tmp_path, monkeypatch):
    """A changed bound or setting changes the hash, and the ledger says so."""
    lemma, first = ALL["lemma5"], ALL["lemma5"].checks[0]
    settings = lemma.settings["quick"]
    other = replace(lemma, checks=(replace(first, bound=1.0), *lemma.checks[1:]))
    assert (
        len(
            {
                lemma.digest(settings),
                other.digest(settings),
                lemma.digest(replace(settings, offset=1.0)),
            }
        )
        == 3
    )
    result = reproduce("lemma5")
    assert result.digest == lemma.digest(settings)
    replace(result, digest="0" * 64).save(tmp_path / "lemma5")
    assert "the hash that was taken before the run: 0 of 1" in write_ledger(tmp_path)


def test_results_with_former_settings_are_refused(tmp_path):
    reproduce("lemma5", changes={"bits": (3, 4)}).save(tmp_path / "lemma5")
    result = run("lemma5", "--out", tmp_path)
    assert isinstance(result.exception, InputError)
    assert "with other settings than it has now (bits (3, 4), not (3, 5, 7))" in str(
        result.exception
    )


def test_results_with_former_checks_are_refused(tmp_path):
    result = reproduce("lemma5")
    replace(result, outcomes=result.outcomes[1:]).save(tmp_path / "lemma5")
    refused = run("lemma5", "--out", tmp_path)
    assert isinstance(refused.exception, InputError)
    assert "holds lemma5 with other checks than it has now" in str(refused.exception)


STATED = {
    "bits",
    "learning_rates",
    "identity",
    "support",
    "lengths of fig3a",
    "lengths of figc1",
    *(f"{name} of {figure}" for figure in FIGURES_OF_SPECTRA for name in ("seeds", "d_models")),
}
"""Settings of trained models that the paper states (reference page, 3.2), for all or for one."""


@pytest.mark.parametrize("name", ALL)
def test_settings_of_trained_models_are_ours_unless_the_paper_states_them(name):
    analysis = ALL[name]
    if not isinstance(analysis.settings["full"], TrainingSettings):
        return
    names = {item.name for item in fields(analysis.settings["full"])}
    stated = {each for each in names if each in STATED or f"{each} of {name}" in STATED}
    if name == "figc8":  # clusters by two bits are recalled
        stated -= {"support"}
    assert set(analysis.ours) == names - stated


def test_seeds_and_settings_are_in_the_record_and_the_ledger(tmp_path):
    changes = {
        "bits": (3,),
        "lengths": (4, 8),
        "d_model": 8,
        "seeds": 2,
        "steps": 1,
        "evaluation": 64,
    }
    result = reproduce("figc14", changes=changes)
    assert result.provenance.seed == 0
    result.plot().canvas.draw()
    record = result.configuration()
    assert set(record["our_defaults"]) & set(record["settings"]) == set()
    assert record["our_defaults"]["weight_decay"] == 0.01
    result.save(tmp_path / "figc14")
    text = write_ledger(tmp_path)
    assert "seeds* = 0 to 1;" in text
    assert "weight_decay = 0.01" in text
    assert f"torch {result.provenance.versions['torch']}" in text


def test_models_and_facts_are_recorded_and_results_of_others_refused(tmp_path, tiny_folder):
    few = tmp_path / "few.csv"
    hl.atlas().where(relation="P1412").limit(4, seed=0).to_dataframe().to_csv(few, index=False)
    asked = ["figb4", "--out", tmp_path, "--model", tiny_folder, "--facts", few]
    run(*asked)
    held = hl.load_result(tmp_path / "figb4")
    assert held.facts is not None
    assert (held.facts.name, held.facts.n) == ("few.csv", 4)
    held.plot().canvas.draw()
    assert f"--model {tiny_folder} --facts few.csv`" in (tmp_path / "README.md").read_text()
    for changed, what in ((asked[:5], "facts few.csv"), (asked[:3] + asked[5:], "models")):
        refused = run(*changed)
        assert isinstance(refused.exception, InputError)
        assert f"holds figb4 with the {what}" in str(refused.exception)
    run(*asked)  # the same again takes what is there
    assert hl.load_result(tmp_path / "figb4").provenance == held.provenance


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("lemma5", {"bit": (3,)}, "unknown setting 'bit'; did you mean 'bits'"),
        ("lemma5", {"bits": 3}, r"bits is 3; give a value such as \[3, 5, 7\]"),
        ("lemma5", {"bits": []}, r"bits is \[\]; give a value such as"),
        ("lemma2", {"seed": "x"}, "seed is 'x'; give a value such as 0"),
        ("lemma6", {"seeds": 0}, "seeds is 0; give a value such as 2"),
        ("theorem4", {"tasks": [3, 1.0]}, r"tasks is \[3, 1.0\]; give a value such as"),
        ("theorem4", {"slopes": [0.0]}, "equation 5.2 has slopes above 0"),
        ("theorem4", {"offsets": [-5.0]}, "none of these geometries has embeddings"),
        ("fig3b", {"bits": [3, 4], "d_models": [4]}, "give one width for each m"),
        ("figc9", {"bits": [3, 4], "d_models": [8, 8]}, "a figure of spectra has one m"),
        ("sensitivity", {"variants": ["L x 3"]}, "unknown variant 'L x 3'"),
    ],
)
def test_wrong_settings_are_refused(name, changes, message):
    """Before anything is trained."""
    with pytest.raises(InputError, match=message):
        reproduce(name, changes=changes)
