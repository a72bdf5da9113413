"""Where numbers depend on the longest prompt of a batch, probes give those of single prompts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from sample_facts import sample_facts
from tiny_models import tiny_model, tiny_tokenizer

from hijacklens.engine.batches import batches
from hijacklens.models.loading import load_model
from hijacklens.scoring.pairs import pairs
from probes import ablation, heads, logit_shift, patching


def steered():
    """A model with a hook of the user at the last position of a batch, which may be padding."""
    plain = tiny_model("llama")

    def steer(module, inputs, out):
        out = out.clone()
        out[:, -1] += torch.linspace(-2, 2, out.shape[-1])
        return out

    plain.model.layers[0].mlp.register_forward_hook(steer)
    return plain


@pytest.fixture(scope="module")
def model():
    return load_model(steered(), tokenizer=tiny_tokenizer("llama"), device="cpu")


@pytest.fixture(scope="module")
def made(model):
    found = pairs(model, sample_facts(), scheme="do-not-think", dose=1)
    assert len({len(pair.bare.ids) for pair in found}) > 1
    return found


def test_a_batch_has_rows_of_one_length(model, gpt2):
    rows = [(5, 6, 7), (8,), (9, 9, 9)]
    assert [batch.members for batch in batches(model, rows, limit=99)] == [(0, 2), (1,)]
    assert [batch.members for batch in batches(gpt2, rows, limit=99)] == [(0, 2, 1)]
    apart = batches(gpt2, rows, limit=99, one_length=True)
    assert [batch.members for batch in apart] == [(0, 2), (1,)]
    (both, *_) = batches(gpt2, rows, limit=6)
    assert both.symbols.tolist() == [[5, 6, 7], [9, 9, 9]]


def test_an_account_is_that_of_the_plain_model(model, made):
    plain = steered()
    facts = logit_shift.average(model, made, quiet=True).facts.set_index("case_id")
    for pair in made:
        true, false = pair.answers()
        for side, prompt in (("bare", pair.bare), ("hijacked", pair.hijacked)):
            with torch.no_grad():
                last = plain(torch.tensor([prompt.ids])).logits[0, -1]
            expected = float(last[false] - last[true])
            assert facts.at[pair.fact.case_id, side] == pytest.approx(expected, abs=1e-4)


def test_patching_attribution_and_means_do_not_depend_on_the_batch(model, made):
    whole, single = (
        patching.sweep(model, made, quiet=True, **options).to_dataframe()
        for options in ({}, {"batch_tokens": 1})
    )
    pd.testing.assert_frame_equal(whole, single, atol=1e-4)
    whole, single = (
        heads.gradient_attribution(model, made, **options) for options in ({}, {"batch_tokens": 1})
    )
    np.testing.assert_allclose(whole, single, atol=1e-4)
    facts = sample_facts()
    whole, single = (
        ablation.mean_outputs(model, facts, **options) for options in ({}, {"batch_tokens": 1})
    )
    torch.testing.assert_close(whole.values, single.values, atol=1e-5, rtol=0)
