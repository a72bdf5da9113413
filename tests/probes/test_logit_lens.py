"""The logit lens: each layer as a plain model's own norm and unembedding would read it."""

from __future__ import annotations

import copy
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as hf
from plain_huggingface import PlainScorer
from sample_facts import sample_facts
from tiny_models import FAMILIES, rough, tiny_model, tiny_tokenizer

from hijacklens.errors import InputError
from hijacklens.models.agreement import agreement_of
from hijacklens.models.loading import load_model
from hijacklens.one_layer.model import OneLayerConfig, OneLayerTransformer
from hijacklens.probe import HookProbe
from hijacklens.prompts.layout import Layout
from hijacklens.results.result import load_result
from hijacklens.scoring.pairs import pairs
from probes import logit_lens

FACT = sample_facts()[0]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    plain = tiny_model(request.param)
    if request.param == "gemma2":
        plain.config.final_logit_softcapping = 3.0  # low enough to show
    tokenizer = tiny_tokenizer(request.param)
    return plain, load_model(copy.deepcopy(plain), tokenizer=tokenizer, device="cpu")


@pytest.fixture(scope="module")
def lens(pair):
    return logit_lens.trace(pair[1], pairs(pair[1], sample_facts()[:1]))


@torch.no_grad()
def test_every_layer_and_position_equals_the_plain_models_own_reading(pair):
    plain, model = pair
    ids = tuple(model.tokenizer("Do not think of Guam. The Eiffel Tower is in").input_ids)
    other = tuple(reversed(ids))
    layout = Layout(torch.tensor([ids, other]), {})
    seen = logit_lens.through(model, layout, [300, 305], [310, 290])
    for row, (tokens, plus, minus) in enumerate([(ids, 300, 310), (other, 305, 290)]):
        out = plain(torch.tensor([tokens]), output_hidden_states=True)
        norm = plain.transformer.ln_f if hasattr(plain, "transformer") else plain.model.norm
        logits = [plain.lm_head(norm(stream[0])) for stream in out.hidden_states[:-1]]
        cap = getattr(plain.config, "final_logit_softcapping", None)
        if cap:
            logits = [cap * torch.tanh(one / cap) for one in logits]
        logits.append(out.logits[0])
        for depth, one in enumerate(logits):
            logprobs = one.double().log_softmax(-1)
            for found, token in ((seen.logprob_plus, plus), (seen.logprob_minus, minus)):
                np.testing.assert_allclose(found[depth, row], logprobs[:, token], atol=1e-4)
            ranks = (one > one[:, plus, None]).sum(-1)
            assert np.abs(seen.rank_plus[depth, row] - ranks.numpy()).max() <= 1
            np.testing.assert_allclose(
                seen.difference[depth, row], (one[:, plus] - one[:, minus]).double(), atol=1e-4
            )


def test_the_last_layer_is_the_answer(pair, lens):
    scorer = PlainScorer(pair[0], pair[1].tokenizer)
    table = lens.at_last()
    for dose, prompt in ((0, FACT.prompt), (1, f"Do not think of Guam. {FACT.prompt}")):
        row = table[(table["dose"] == dose) & (table["layer"] == 1)].iloc[0]
        assert row["logprob_false"] == pytest.approx(scorer.scores(prompt, "Guam")[0], abs=1e-4)
        assert row["logprob_true"] == pytest.approx(scorer.scores(prompt, "Paris")[0], abs=1e-4)
        assert row["token"] == "of" and row["span"] == "last"
        assert lens.configuration()["difference"][str(dose)] == row["difference"]


class Capped(hf.LlamaForCausalLM):
    """A subclass that caps its logits, of which no configuration knows."""

    def forward(self, *args, **options):
        out = super().forward(*args, **options)
        out.logits = 2 * torch.tanh(out.logits / 2)
        return out


SHAPE = {"vocab_size": 420, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SHAPE, "intermediate_size": 64, "pad_token_id": 3}
OPT = {**SHAPE, "ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False}
AFTER = {
    "a divisor of logits": (hf.GraniteForCausalLM, {**LLAMA, "logits_scaling": 4.0}),
    "a factor of logits": (hf.CohereForCausalLM, {**LLAMA, "logit_scale": 0.25}),
    "a subclass": (Capped, LLAMA),
    "a projection": (hf.OPTForCausalLM, OPT),
    "a fixed batch": (hf.GPTBigCodeForCausalLM, SHAPE),
    "lm_head": (hf.LlamaForCausalLM, LLAMA),
    "model.norm": (hf.LlamaForCausalLM, LLAMA),
}


@pytest.mark.parametrize("at_once", [None, 1])
@pytest.mark.parametrize("name", AFTER)
def test_what_follows_the_last_layer_is_the_models_own(name, at_once, monkeypatch):
    kind, settings = AFTER[name]
    plain = rough(kind(kind.config_class(**settings)))
    if kind is hf.LlamaForCausalLM:  # as an adapter would change what the part gives
        plain.get_submodule(name).register_forward_hook(lambda module, inputs, out: out / 2)
    if at_once:
        monkeypatch.setattr(logit_lens, "read_values", lambda device: at_once)
    model = load_model(copy.deepcopy(plain), tokenizer=tiny_tokenizer("llama"), device="cpu")
    if version("transformer-lens").startswith("3.") and agreement_of(model).hooked:
        pytest.skip("TransformerLens 3.9 does not compute what this model does, so it is refused")
    tokens = torch.tensor([[5, 9, 300, 12, 7], [8, 310, 9, 11, 6]])
    seen = logit_lens.through(model, Layout(tokens, {}), [300, 305], [310, 290])
    for row in range(2):
        with torch.no_grad():
            own = plain(tokens[row : row + 1]).logits[0].double().log_softmax(-1)
        np.testing.assert_allclose(seen.logprob_plus[-1, row], own[:, [300, 305][row]], atol=1e-4)
        np.testing.assert_allclose(seen.logprob_minus[-1, row], own[:, [310, 290][row]], atol=1e-4)
        assert np.abs(seen.logprob_plus[0, row] - seen.logprob_plus[-1, row]).max() > 1e-2


def test_a_change_between_the_last_norm_and_the_unembedding_is_refused():
    plain = tiny_model("llama")

    def halve(module, inputs, out):
        out.last_hidden_state = out.last_hidden_state / 2
        return out

    plain.model.register_forward_hook(halve)
    model = load_model(plain, tokenizer=tiny_tokenizer("llama"), device="cpu")
    with pytest.raises(InputError, match="more than a norm between its layers"):
        logit_lens.through(model, Layout(torch.tensor([[5, 9, 300]]), {}), [300], [310])


def test_a_model_without_the_hooks_of_its_streams_is_refused():
    plain = rough(hf.OpenAIGPTLMHeadModel(hf.OpenAIGPTConfig(**SHAPE)))
    model = load_model(plain, tokenizer=tiny_tokenizer("llama"), device="cpu")
    with pytest.raises(InputError, match="do not show the stream after every layer"):
        logit_lens.through(model, Layout(torch.tensor([[5, 9, 300]]), {}), [300], [310])


def test_the_table_has_a_row_per_dose_layer_and_position(pair, lens):
    model = pair[1]
    lengths = [
        len(model.tokenizer(text).input_ids)
        for text in (FACT.prompt, f"Do not think of Guam. {FACT.prompt}")
    ]
    table = lens.to_dataframe()
    assert len(table) == (model.cfg.n_layers + 1) * sum(lengths)
    assert not table.duplicated(["dose", "layer", "position"]).any()
    assert table["layer"].unique().tolist() == [-1, 0, 1]
    np.testing.assert_allclose(table["difference"], table["logprob_false"] - table["logprob_true"])


def test_the_one_layer_model_is_read_at_its_output():
    model = OneLayerTransformer(OneLayerConfig(vocab=16, d_model=8, length=32, init_scale=1.0))
    tokens = torch.randint(0, 16, (3, 9), generator=torch.Generator().manual_seed(0))
    seen = logit_lens.through(model, Layout(tokens, {}), [1, 2, 3], [4, 5, 6])
    expected = model.last_logits(tokens).detach().log_softmax(-1)
    for row in range(3):
        assert seen.logprob_plus[1, row, -1] == pytest.approx(
            float(expected[row, 1 + row]), abs=1e-5
        )


def test_a_probe_shows(pair):
    model = pair[1]
    silent = HookProbe("silent", [("blocks.0.hook_attn_out", lambda value, hook: 0 * value)])
    tokens = torch.tensor([[5, 9, 300, 12]])
    whole, cut = (
        logit_lens.through(model, Layout(tokens, {}), [300], [310], probes=probes)
        for probes in ([], [silent])
    )
    np.testing.assert_allclose(whole.difference[0], cut.difference[0])
    assert np.abs(whole.difference[1] - cut.difference[1]).max() > 1e-3


def test_it_comes_back_as_it_was(gpt2, tmp_path):
    lens = logit_lens.trace(gpt2, pairs(gpt2, sample_facts()[4:5])[0])
    lens.save(tmp_path)
    found = load_result(tmp_path)
    pd.testing.assert_frame_equal(found.to_dataframe(), lens.to_dataframe())
    assert repr(found) == repr(lens)
    assert {path.name for path in tmp_path.iterdir()} >= {"lens.svg", "lens.png", "result.json"}


def test_the_figure_shows_the_dose_that_is_asked_for(gpt2):
    lens = logit_lens.trace(gpt2, pairs(gpt2, sample_facts()[:1]))
    for dose, given in ((1, None), (0, 0)):
        lines, grid = lens.plot(dose=given).axes[:2]
        rows = lens.table[lens.table["dose"] == dose]
        np.testing.assert_allclose(
            grid.images[0].get_array().ravel(),
            rows.sort_values(["position", "layer"])["difference"],
        )
        assert [line.get_label() for line in lines.get_lines()[:2]] == ["dose 0", "dose 1"]
    probed = replace(lens, settings=replace(lens.settings, probes=("ablate:heads=0",)))
    assert "with ablate:heads=0, " in probed.plot()._suptitle.get_text()
    with pytest.raises(InputError, match="dose 3 was not read; there are 0, 1"):
        lens.plot(dose=3)


def test_the_bare_query_alone(gpt2):
    pair = pairs(gpt2, sample_facts()[:1])[0]
    lens = logit_lens.trace(gpt2, pair, hijacked=False)
    assert lens.settings.doses == (0,) and set(lens.table["dose"]) == {0}
    both = logit_lens.trace(gpt2, pair)
    pd.testing.assert_frame_equal(both.table[both.table["dose"] == 0], lens.table)


@pytest.mark.parametrize("dose", [0, 2])
def test_the_old_form_takes_a_fact(gpt2, dose):
    with pytest.warns(FutureWarning, match="trace takes prompt pairs"):
        old = logit_lens.read(gpt2, FACT, dose=dose)
    new = logit_lens.trace(gpt2, pairs(gpt2, sample_facts()[:1], dose=2), hijacked=dose > 0)
    pd.testing.assert_frame_equal(old.table, new.table)


def test_bad_input_is_refused(gpt2):
    with pytest.raises(InputError, match="give a token per row: 1 rows, 2 and 1 tokens"):
        logit_lens.through(gpt2, Layout(torch.tensor([[1, 2]]), {}), [1, 2], [3])
    with pytest.raises(InputError, match=r"logit_lens.trace takes one pair .* these are 10"):
        logit_lens.trace(gpt2, pairs(gpt2, sample_facts()))
