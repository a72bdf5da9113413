"""A hooked model is compared with the plain one; scores are the plain model's, or it is refused."""

from __future__ import annotations

import copy
import types
from itertools import product

import pytest
import torch
from tiny_models import SHAPE, random_model, tiny_model, tiny_tokenizer
from transformer_lens.model_bridge import TransformerBridge
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hijacklens.engine.batches import batches
from hijacklens.engine.engine import next_token_logprobs, read
from hijacklens.engine.reading import ReadOptions
from hijacklens.errors import InputError
from hijacklens.models import verification, wrapping
from hijacklens.models.agreement import agreement_of, require_agreement
from hijacklens.models.computation import computation_of
from hijacklens.models.loading import load_model
from hijacklens.models.verification import difference
from hijacklens.probe import HookProbe
from hijacklens.prompts.layout import Layout
from hijacklens.scoring.execution import Execution
from probes.ablation import mean_outputs
from probes.logit_lens import through

IDLE = HookProbe("idle", (), packs=True)
SENTENCE = tuple(range(11, 21))
REQUESTS = {
    SENTENCE * dose + query: {1, 2}
    for dose in range(3)
    for query in ((21, 22, 23), (21, 24), (31,))
}


def load(plain):
    return load_model(plain, tokenizer=tiny_tokenizer("gpt2"), device="cpu")


def expected_scores(plain):
    scores = {}
    for prefix, tokens in REQUESTS.items():
        with torch.no_grad():
            logprobs = plain(torch.tensor([prefix])).logits[0, -1].log_softmax(-1)
        scores[prefix] = {token: float(logprobs[token]) for token in tokens}
    return scores


def assert_scores(model, expected, **options):
    readings = read(model, REQUESTS, ReadOptions(**options))
    for prefix, values in expected.items():
        assert readings[prefix].logprobs == pytest.approx(values, abs=1e-4)
    return readings.accounting


class LowRank(torch.nn.Module):
    """An adapter as peft makes it: the base layer's weight is visible, its output is not all."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        out = base.nf if hasattr(base, "nf") else base.out_features
        self.down = torch.nn.Parameter(torch.randn(32, 2))
        self.up = torch.nn.Parameter(torch.randn(2, out))

    def __getattr__(self, name):
        if name in ("weight", "bias", "nf", "in_features", "out_features"):
            return getattr(self.base_layer, name)
        return super().__getattr__(name)

    def forward(self, x):
        return self.base_layer(x) + x @ self.down @ self.up


def gpt2():
    return copy.deepcopy(tiny_model("gpt2"))


def fused_adapter():
    plain = gpt2()
    torch.manual_seed(0)
    attention = plain.transformer.h[1].attn
    attention.c_attn = LowRank(attention.c_attn)
    return plain


def adapter_on_neox():
    plain = random_model("GPTNeoX:GPTNeoXForCausalLM", **SHAPE)
    torch.manual_seed(0)
    attention = plain.gpt_neox.layers[0].attention
    attention.query_key_value = LowRank(attention.query_key_value)
    return plain


def hook_on_attention():
    plain = random_model("Llama:LlamaForCausalLM", **SHAPE)
    attention = plain.model.layers[1].self_attn
    attention.register_forward_hook(lambda module, args, out: (out[0] * 3, *out[1:]))
    return plain


def hook_before_attention():
    plain = gpt2()
    plain.transformer.h[1].ln_1.register_forward_hook(lambda module, args, out: out * 2)
    return plain


def replaced_forward():
    plain = random_model("Llama:LlamaForCausalLM", **SHAPE)

    def forward(self, *args, **kwargs):
        out, weights = type(self).forward(self, *args, **kwargs)
        return out * -2, weights

    attention = plain.model.layers[1].self_attn
    attention.forward = types.MethodType(forward, attention)
    return plain


def unscaled():
    size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return random_model("GPT2:GPT2LMHeadModel", **size, scale_attn_weights=False)


def alibi():
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return random_model("Falcon:FalconForCausalLM", **size, alibi=True)


CHANGED = [fused_adapter, adapter_on_neox, hook_on_attention, hook_before_attention]
CHANGED += [replaced_forward, unscaled, alibi]


@pytest.mark.parametrize("make", CHANGED, ids=lambda make: make.__name__)
def test_scores_are_those_of_the_plain_model(make):
    """Each of these loses something with hook points, or keeps it; nothing goes unnoticed."""
    plain = make()
    expected = expected_scores(plain)
    model = load(plain)
    for sharing in ("plain", "packed", "cached"):
        assert_scores(model, expected, sharing=sharing)
    prefix = max(REQUESTS, key=len)
    assert float(next_token_logprobs(model, prefix)[1]) == pytest.approx(
        expected[prefix][1], abs=1e-4
    )
    if make is hook_before_attention and not agreement_of(model).hooked:
        assert_scores(model, expected, probes=[IDLE])
        return
    with pytest.raises(InputError, match="needs hooks"):
        read(model, REQUESTS, ReadOptions(probes=[IDLE]))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Gemma3Text:Gemma3ForCausalLM", {"head_dim": 8, "use_bidirectional_attention": True}),
        ("Bert:BertLMHeadModel", {"is_decoder": False}),
    ],
)
def test_a_model_that_looks_ahead_is_refused(name, options):
    with pytest.raises(InputError, match="is not a causal language model"):
        load(random_model(name, **SHAPE, **options))


def longrope():
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 4.0, 16.0, 64.0]}
    scaling = {"type": "longrope", **factors}
    shape = {**SHAPE, "original_max_position_embeddings": 16, "rope_scaling": scaling}
    return random_model("Phi3:Phi3ForCausalLM", **shape)


def test_the_longest_prompt_of_a_batch_changes_no_other():
    """Rotary frequencies switch at 16 tokens; prompts have 1 to 23."""
    plain = longrope()
    expected = expected_scores(plain)
    model = load(plain)
    assert agreement_of(model).switch == 16
    sharings, sizes = ("plain", "packed", "cached", "auto"), (None, 1)
    for sharing, probes, size in product(sharings, ([], [IDLE]), sizes):
        options = {"sharing": sharing, "probes": probes, "batch_tokens": size}
        accounting = assert_scores(model, expected, **options)
        assert "prompts of more than 16 tokens separately" in accounting.why


def test_a_model_whose_positions_depend_on_the_batch_runs_every_prompt_alone(monkeypatch):
    """As longrope does, but for a reason that no setting tells."""
    plain = random_model("Llama:LlamaForCausalLM", **SHAPE)
    real = type(plain.model.rotary_emb).forward

    def by_longest(self, x, position_ids):
        cos, sin = real(self, x, position_ids)
        factor = 1 + 0.1 * position_ids.max()
        return cos * factor, sin * factor

    monkeypatch.setattr(type(plain.model.rotary_emb), "forward", by_longest)
    expected = expected_scores(plain)
    model = load(plain)
    for probes in ([], [IDLE]):
        accounting = assert_scores(model, expected, probes=probes)
        assert "depend" in accounting.why


def windowed(module, query, key, value, attention_mask, scaling=None, **options):
    """Attention to the last 60 tokens: prompts of the check are shorter."""
    at = torch.arange(key.shape[2])
    seen = (at[:, None] >= at) & (at[:, None] - at < 60)
    scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~seen[-query.shape[2] :], -1e9)
    pattern = scores.softmax(-1)
    return (pattern @ value).transpose(1, 2).contiguous(), pattern


def test_attention_of_the_user_is_never_replaced(monkeypatch):
    """No prompt of a check is long enough for everything that a function may do."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "windowed", windowed)
    plain = gpt2()
    keys = [computation_of(load(copy.deepcopy(plain))).digest]
    plain.set_attn_implementation("windowed")
    model = load(copy.deepcopy(plain))
    keys.append(computation_of(model).digest)
    assert keys[0] != keys[1]
    prefix = (*range(11, 91),)
    with torch.no_grad():
        expected = plain(torch.tensor([prefix])).logits[0, -1].log_softmax(-1)
    found = next_token_logprobs(model, prefix)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    with pytest.raises(InputError, match="its attention function is not one of transformers"):
        require_agreement(model, operation="a probe")


def test_probes_are_refused_on_prompts_that_show_a_difference_which_the_check_does_not():
    """Methods of the user that see 60 tokens: those of Llama are lost with hook points."""
    plain = random_model("Llama:LlamaForCausalLM", **SHAPE)

    def forward(self, hidden_states, attention_mask=None, **options):
        at = torch.arange(hidden_states.shape[1])
        seen = (at[:, None] >= at) & (at[:, None] - at < 60)
        mask = torch.zeros(seen.shape).masked_fill(~seen, -1e9)[None, None]
        return type(self).forward(self, hidden_states, attention_mask=mask, **options)

    for layer in plain.model.layers:
        layer.self_attn.forward = types.MethodType(forward, layer.self_attn)
    long, short = (*range(11, 91),), (*range(11, 61),)
    with torch.no_grad():
        expected = plain(torch.tensor([long])).logits[0, -1].log_softmax(-1)
    model = load(plain)
    torch.testing.assert_close(next_token_logprobs(model, long), expected, atol=1e-4, rtol=0)
    assert read(model, {short: {1}}, ReadOptions(probes=[IDLE])) == read(model, {short: {1}})
    refused = pytest.raises(InputError, match=r"not the plain one after a prompt of 80 tokens")
    with refused:
        read(model, {short: {1}, long: {1}}, ReadOptions(probes=[IDLE]))
    with refused:
        next_token_logprobs(model, long, probes=[IDLE])
    with refused:
        list(batches(model, [short, long]))
    layout = Layout.of_symbols(torch.tensor([long]), ())
    with refused:
        through(model, layout, [1], [2])
    with refused:
        mean_outputs(model, layout)


def test_a_model_that_is_loaded_again_gets_new_hook_points(monkeypatch):
    """Its attention is again the user's, and a load that fails leaves a plain model."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "windowed", windowed)
    for make in (gpt2, adapter_free_neox):
        plain = make()
        plain.set_attn_implementation("windowed")
        expected, modules = expected_scores(plain), [type(x) for x in plain.modules()]
        older, model = load(plain), load(plain)
        assert_scores(model, expected)
        assert computation_of(model).digest == computation_of(load(copy.deepcopy(plain))).digest
        with pytest.raises(InputError, match="was loaded again"):
            read(older, REQUESTS)
        with monkeypatch.context() as changed:
            changed.setattr(wrapping, "check", lambda *_: _refuse())
            with pytest.raises(InputError, match="refused"):
                load(plain)
        assert [type(x) for x in plain.modules()] == modules
        assert plain.config._attn_implementation == "windowed"
        assert expected_scores(plain) == expected


def _refuse():
    raise InputError("refused")


def test_a_bridge_from_elsewhere_is_checked_when_it_is_used(tmp_path):
    for name, make in (("good", gpt2), ("unscaled", unscaled)):
        plain = make()
        plain.save_pretrained(tmp_path / name)
        tiny_tokenizer("gpt2").save_pretrained(tmp_path / name)
        plain.set_attn_implementation("eager")
        expected = expected_scores(plain)
        model = TransformerBridge.boot_transformers(str(tmp_path / name), device="cpu")
        model.eval()
        assert_scores(model, expected)
        if name == "good":
            assert_scores(model, expected, probes=[IDLE])
        else:
            with pytest.raises(InputError, match="needs hooks"):
                require_agreement(model, operation="a probe")


def test_weights_that_change_after_loading_are_followed_or_refused():
    """TransformerLens has copies of the joint matrix of GPT-NeoX, and views of most others."""
    for make in (adapter_free_neox, gpt2):
        model = load(make())
        before = read(model, REQUESTS)
        with torch.no_grad():
            for name, weight in model.original_model.named_parameters():
                if "qkv" in name:
                    weight.data.mul_(1.5)
        if make is gpt2:
            assert read(model, REQUESTS) != before
            continue
        for probes in ([], [IDLE]):
            with pytest.raises(InputError, match="changed after loading"):
                read(model, REQUESTS, ReadOptions(probes=probes))


def adapter_free_neox():
    return random_model("GPTNeoX:GPTNeoXForCausalLM", **SHAPE)


def test_an_option_that_changes_after_loading_is_noticed():
    model = load(random_model("Llama:LlamaForCausalLM", **SHAPE))
    for part in model.original_model.modules():
        if hasattr(part, "scaling"):
            part.scaling *= 3
    expected = next_token_logprobs(model, SENTENCE)
    try:
        probed = read(model, {SENTENCE: {1}}, ReadOptions(probes=[IDLE]))
    except InputError as error:
        assert "changed after loading" in str(error)
    else:
        assert probed[SENTENCE].logprobs[1] == pytest.approx(float(expected[1]), abs=1e-4)


def test_difference_by_hand():
    zero, infinite = torch.zeros(1, 4), torch.tensor([[0.0, 0.0, 0.0, -torch.inf]])
    moved = zero + torch.tensor([0.0, 0.0, 0.0, 2.1e-4])  # a root mean square of 1.05e-4
    assert difference(moved, zero, exact=True) == "log-probabilities differ by up to 0.00021 nats"
    assert not difference(moved / 1.1, zero, exact=True)
    assert not difference(infinite, infinite, exact=True)
    assert difference(infinite, zero, exact=True) == "some log-probabilities are not finite"
    spread = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    assert not difference(spread + 0.2, spread, exact=False)
    assert difference(spread + 0.3, spread, exact=False)


def test_the_two_forms_are_compared_once_while_a_model_is_held(monkeypatch):
    model = load(gpt2())
    execution = Execution(store=False)
    compared = []
    real = verification._hooked_logits
    monkeypatch.setattr(
        verification, "_hooked_logits", lambda *args: compared.append(1) or real(*args)
    )
    for runs in (1, 2):
        with pytest.raises(KeyError), execution.held(model) as held, held.running(model):
            for _ in range(3):
                read(model, REQUESTS, ReadOptions(probes=[IDLE]))
            raise KeyError
        assert len(compared) == runs
    read(model, REQUESTS, ReadOptions(probes=[IDLE]))
    read(model, REQUESTS, ReadOptions(probes=[IDLE]))
    assert len(compared) == 4
