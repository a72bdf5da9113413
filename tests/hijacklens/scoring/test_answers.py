"""Answers to one text are those of the plain Hugging Face model and its `generate`."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from hijacklens.errors import InputError
from hijacklens.models.loading import load_model
from hijacklens.scoring.answers import answer


@pytest.mark.parametrize("several", [True, False])
def test_a_completion_stops_where_generate_stops(several):
    plain, tokenizer = copy.deepcopy(tiny_model("gpt2")), tiny_tokenizer("gpt2")
    ids = torch.tensor([tokenizer("The city of").input_ids])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    third = int(plain.generate(ids, **options)[0, ids.shape[1] + 2])
    # The end token of the tokenizer is never said here; chat models have others.
    plain.generation_config.eos_token_id = [tokenizer.eos_token_id, third] if several else third
    expected = plain.generate(ids, **options)[0, ids.shape[1] :]
    assert len(expected) <= 3
    found = answer(load_model(plain, tokenizer=tokenizer), "The city of", tokens=12)
    assert found.completion == tokenizer.decode(expected[:-1], skip_special_tokens=True)


def test_equal_targets_are_refused():
    model = load_model(copy.deepcopy(tiny_model("gpt2")), tokenizer=tiny_tokenizer("gpt2"))
    for target in ("Rome", " Rome"):
        with pytest.raises(InputError, match="are not all different"):
            answer(model, "The city of", targets=["Rome", target], tokens=0)
    assert len(answer(model, "The city of", targets=["Rome", "rome"], tokens=0).targets) == 2
