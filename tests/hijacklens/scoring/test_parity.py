"""Which verdicts differ between two runs: by hand, and between float32 and bfloat16."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
from sample_facts import sample_facts
from tiny_models import tiny_model, tiny_tokenizer

from hijacklens.errors import InputError
from hijacklens.models.loading import load_model
from hijacklens.results.result import load_result
from hijacklens.scoring.execution import Execution
from hijacklens.scoring.hijack import hijack
from hijacklens.scoring.parity import compare


def run(dtype="float32", **options):
    model = load_model(
        copy.deepcopy(tiny_model("llama")),
        tokenizer=tiny_tokenizer("llama"),
        dtype=dtype,
        device="cpu",
    )
    return hijack(
        model, sample_facts(), doses=[0, 1], execution=Execution(store=False), quiet=True, **options
    )


@pytest.fixture(scope="module")
def full():
    return run()


def test_a_run_agrees_with_itself(full):
    parity = compare(full, full)
    assert parity.flips.empty
    assert len(parity.to_dataframe()) == 3 * len(full.items)
    assert (parity.summary()["largest"] == 0).all()


def test_flips_by_hand(full):
    """Two verdicts are turned, one under the rule `first` alone; a tie is a verdict too."""
    items = full.items.copy()
    items.loc[3, "first_false"] = items.loc[3, "first_true"] - np.sign(
        items.loc[3, "first_false"] - items.loc[3, "first_true"]
    )
    items.loc[5, ["sum_true", "n_tokens_true"]] = items.loc[5, ["sum_false", "n_tokens_false"]]
    parity = compare(full, replace(full, items=items))
    flips = {(row.case_id, row.dose, row.rule) for row in parity.flips.itertuples()}
    third, fifth = ((items.loc[i, "case_id"], items.loc[i, "dose"]) for i in (3, 5))
    assert flips == {(*third, "first"), (*fifth, "sum"), (*fifth, "mean")}
    assert parity.configuration()["flipped"] == {"first": 1, "sum": 1, "mean": 1}
    table = parity.summary().set_index(["dose", "rule"])
    assert table.loc[(third[1], "first"), "flipped"] == 1
    n = len(full.items) / 2
    assert table.loc[(third[1], "first"), "share"] == pytest.approx(1 / n)


def test_bfloat16_against_float32(full, tmp_path):
    half = run("bfloat16")
    parity = compare(full, half)
    assert parity.runs["reference"][0].dtype == "float32"
    assert parity.runs["other"][0].dtype == "bfloat16"
    sizes = parity.to_dataframe()["difference"].abs()
    assert 1e-4 < sizes.max() < 1
    widest = parity.flips["reference"].abs().max() if len(parity.flips) else 0
    assert widest <= sizes.max()
    again = load_result(parity.save(tmp_path / "parity"))
    assert again.to_dataframe().equals(parity.to_dataframe())
    assert again.configuration() == parity.configuration()
    assert len(parity.plot().axes) == 1


def test_runs_that_cannot_be_compared(full):
    with pytest.raises(InputError, match=r"not hold the same items: .* are in one of them only"):
        compare(full, replace(full, items=full.items.iloc[1:]))
    with pytest.raises(InputError, match="different probes"):
        compare(full, replace(full, settings=replace(full.settings, probes=("x",))))
