"""Contract 4: the account of a logit difference balances, and every part is what it says."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from own_transformer import own_transformer
from tiny_models import tiny_model, tiny_tokenizer

from hijacklens.errors import InputError
from hijacklens.models.loading import load_model
from hijacklens.one_layer.architecture import OneLayerWeights
from hijacklens.one_layer.model import OneLayerConfig, OneLayerTransformer
from hijacklens.probe import HookProbe
from probes import values
from probes.account import SINGLE, Question, accounts
from probes.anatomy.norms import Norm

TEXTS = ["Do not think of Guam. The Eiffel Tower is in the city of", "Rome is", "The capital of"]
PLUS, MINUS = 300, 310


def eager(plain):
    plain.set_attn_implementation("eager")
    return plain


def questions(model, texts=TEXTS):
    rows = [tuple(model.tokenizer(text).input_ids) for text in texts]
    return [Question(ids, len(ids) - 1, PLUS, MINUS) for ids in rows]


def plain_logits(plain, ids):
    with torch.no_grad():
        return plain(torch.tensor([ids])).logits[0].double()


def check(account, expected, tolerance=1e-4):
    assert account.whole == pytest.approx(expected, abs=1e-4)
    # Where two logits nearly cancel, float32 rounding remains.
    assert abs(account.residual) <= max(tolerance * abs(account.whole), 2e-6)
    assert account.total == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("mode", ["raw", "compatible", "processed"])
def test_parts_sum_to_the_difference_of_a_plain_forward_pass(pair, mode):
    plain, model = pair
    if mode != "raw":
        model = load_model(copy.deepcopy(plain), tokenizer=model.tokenizer, device="cpu")
        model.enable_compatibility_mode(no_processing=mode != "processed")
    asked = questions(model)
    for question, account in zip(asked, accounts(model, asked), strict=True):
        last = plain_logits(plain, question.symbols)[-1]
        check(account, float(last[PLUS] - last[MINUS]))


def test_an_earlier_position_and_a_single_log_probability(pair):
    plain, model = pair
    (ids,) = (question.symbols for question in questions(model)[:1])
    earlier, single = accounts(model, [Question(ids, 4, PLUS, MINUS), Question(ids, 6, PLUS, None)])
    logits = plain_logits(plain, ids)
    check(earlier, float(logits[4, PLUS] - logits[4, MINUS]))
    check(single, float(logits[6].log_softmax(-1)[PLUS]))
    assert not earlier.attention[..., 5:].any()
    assert single.single[SINGLE.index("normaliser")] == pytest.approx(
        -float(logits[6].logsumexp(-1)), abs=1e-4
    )
    other = accounts(model, [Question(ids, 7, MINUS, None)])[0]
    both = single - other
    check(both, float(logits[6].log_softmax(-1)[PLUS] - logits[7].log_softmax(-1)[MINUS]))


class Opened:
    """One forward pass of a plain model, with the inputs and outputs on the path of each head."""

    def __init__(self, plain, ids):
        core = getattr(plain, "transformer", None) or plain.model
        self.gpt2 = hasattr(plain, "transformer")
        self.layers = core.h if self.gpt2 else core.layers
        self.plain, self.final = plain, core.ln_f if self.gpt2 else core.norm
        self.seen = {}
        handles = []
        for i, layer in enumerate(self.layers):
            attn = layer.attn if self.gpt2 else layer.self_attn
            handles += [
                self.keep(attn.c_proj if self.gpt2 else attn.o_proj, ("output", i)),
                self.keep(attn.c_attn if self.gpt2 else attn.v_proj, ("value", i)),
            ]
        handles.append(self.keep(self.final, "final"))
        with torch.no_grad():
            self.attentions = plain(torch.tensor([ids]), output_attentions=True).attentions
        for handle in handles:
            handle.remove()

    def keep(self, module, name):
        def hook(module, inputs, output):
            self.seen[name] = (inputs[0][0].double(), output[0].double())

        return module.register_forward_hook(hook)

    def gain(self, norm):
        """The effective weight."""
        offset = "Gemma" in type(norm).__name__
        return norm.weight.detach().double() + (1.0 if offset else 0.0)

    def through(self, norm, part, whole):
        """A part of a norm's input after the norm, at the scale of the complete input."""
        if self.gpt2:
            part, whole = part - part.mean(), whole - whole.mean()
        eps = getattr(norm, "eps", None) or norm.variance_epsilon
        return self.gain(norm) * part / (whole.pow(2).mean() + eps).sqrt()

    def read(self, layer, part):
        """The contribution of a part of a layer's attention output to the final difference."""
        if hasattr(self.layers[layer], "pre_feedforward_layernorm"):  # Gemma-2 and Gemma-3
            whole = self.seen["output", layer][1][-1]
            part = self.through(self.layers[layer].post_attention_layernorm, part, whole)
        normed = self.through(self.final, part, self.seen["final"][0][-1])
        columns = self.plain.lm_head.weight.detach().double()
        return float(normed @ (columns[PLUS] - columns[MINUS]))

    def output_of(self, layer, z):
        """The output projection of one row, without its bias."""
        attn = self.layers[layer].attn if self.gpt2 else self.layers[layer].self_attn
        return z @ attn.c_proj.weight.double() if self.gpt2 else z @ attn.o_proj.weight.double().T


@torch.no_grad()
def test_heads_equal_zeroing_their_path(pair):
    """A head's part is what vanishes when its path at the last position is cut, norms frozen."""
    plain, model = pair
    question = questions(model)[0]
    account = accounts(model, [question])[0]
    opened = Opened(plain, question.symbols)
    n_heads = plain.config.num_attention_heads
    for layer in range(plain.config.num_hidden_layers):
        z = opened.seen["output", layer][0][-1]
        for head in range(n_heads):
            cut = z.reshape(n_heads, -1).clone()
            cut[head] = 0
            gone = opened.output_of(layer, z) - opened.output_of(layer, cut.reshape(-1))
            assert account.by_head[layer, head] == pytest.approx(opened.read(layer, gone), abs=2e-6)


@torch.no_grad()
def test_parts_of_attended_tokens_equal_attention_times_value(pair):
    plain, model = pair
    question = questions(model)[0]
    account = accounts(model, [question])[0]
    opened = Opened(plain, question.symbols)
    config = plain.config
    n_heads, length = config.num_attention_heads, len(question.symbols)
    for layer in range(config.num_hidden_layers):
        values = opened.seen["value", layer][1]
        if opened.gpt2:
            values = values[:, 2 * config.n_embd :]
            bias = opened.layers[layer].attn.c_attn.bias.double()[2 * config.n_embd :]
            values = values - bias
        width = opened.seen["output", layer][0].shape[-1] // n_heads
        values = values.reshape(length, -1, width)
        group = n_heads // values.shape[1]
        for head in range(n_heads):
            weight = opened.attentions[layer][0, head, -1].double()
            for j in range(length):
                z = torch.zeros(n_heads, width, dtype=torch.float64)
                z[head] = weight[j] * values[j, head // group]
                expected = opened.read(layer, opened.output_of(layer, z.reshape(-1)))
                assert account.attention[layer, head, j] == pytest.approx(expected, abs=2e-6)


def test_position_and_biases_of_gpt2():
    plain = eager(tiny_model("gpt2"))
    model = load_model(copy.deepcopy(plain), tokenizer=tiny_tokenizer("gpt2"), device="cpu")
    question = questions(model)[0]
    account = accounts(model, [question])[0]
    opened = Opened(plain, question.symbols)
    columns = plain.lm_head.weight.detach().double()
    end = len(question.symbols) - 1
    with torch.no_grad():
        whole = opened.seen["final"][0][-1]
        for name, row in (
            ("position", plain.transformer.wpe.weight[end]),
            ("embedding", plain.transformer.wte.weight[question.symbols[end]]),
        ):
            normed = opened.through(opened.final, row.double(), whole)
            expected = float(normed @ (columns[PLUS] - columns[MINUS]))
            assert account.single[SINGLE.index(name)] == pytest.approx(expected, abs=2e-6)
        bias = float(plain.transformer.ln_f.bias.double() @ (columns[PLUS] - columns[MINUS]))
        assert account.single[SINGLE.index("norm_bias")] == pytest.approx(bias, abs=2e-6)
        for layer, block in enumerate(plain.transformer.h):
            expected = opened.read(layer, block.attn.c_proj.bias.double())
            assert account.output_bias[layer] == pytest.approx(expected, abs=2e-6)


def test_a_removed_value_bias_is_no_part():
    """The account under the probe is that of a model whose value bias is zero."""
    question = [Question((1, 20, 30, 40, 50, 60), position=5, plus=7, minus=9)]
    plain = tiny_model("gpt2")
    edited = copy.deepcopy(plain)
    for block in edited.transformer.h:
        block.attn.c_attn.bias.data[64:] = 0
    models = (
        load_model(each, tokenizer=tiny_tokenizer("gpt2"), device="cpu") for each in (plain, edited)
    )
    model, without = models
    (expected,) = accounts(without, question)
    removed = values.replace(values.scaled(1.0), keep_bias=False)
    (account,) = accounts(model, question, probes=[removed])
    assert not account.value_bias.any()
    np.testing.assert_allclose(account.attention, expected.attention, atol=1e-5)
    nothing = values.replace(values.zero(), layers=1, heads=2, keep_bias=False)
    (account,) = accounts(model, question, probes=[nothing])
    assert not account.attention[1, 2].any() and account.value_bias[1, 2] == 0
    assert account.value_bias[0].all() and account.value_bias[1, [0, 1, 3]].all()
    assert abs(account.residual) < 1e-4


def test_the_soft_cap_is_a_separate_part():
    plain = tiny_model("gemma2")
    plain.config.final_logit_softcapping = 2.0
    uncapped = copy.deepcopy(plain)
    uncapped.config.final_logit_softcapping = None
    model = load_model(copy.deepcopy(plain), tokenizer=tiny_tokenizer("gemma2"), device="cpu")
    ids = questions(model)[0].symbols
    capped, whole = (plain_logits(m, ids)[-1] for m in (plain, uncapped))
    plus, minus = int(capped.argmax()), int(capped.argmin())
    account = accounts(model, [Question(ids, len(ids) - 1, plus, minus)])[0]
    added = float((capped[plus] - capped[minus]) - (whole[plus] - whole[minus]))
    assert added < -0.1
    assert account.single[SINGLE.index("soft_cap")] == pytest.approx(added, abs=1e-5)
    check(account, float(capped[plus] - capped[minus]))


def test_one_layer_model_by_hand():
    """Three tokens with unit embeddings and no attention scores: each takes a third of W_V."""
    value = torch.tensor([[1.0, 4.0, 0.0], [0.0, 2.0, 6.0], [5.0, 0.0, 3.0]])
    zero = torch.zeros(3, 3)
    model = OneLayerTransformer.from_weights(
        OneLayerWeights(W_E=torch.eye(3), W_Q=zero, W_K=zero, W_V=value), length=8
    )
    account = accounts(model, [Question((2, 0, 1), position=2, plus=1, minus=0)])[0]
    # Token t puts row t of W_V into the logits: 1/3 of (0-5, 4-1, 2-0).
    np.testing.assert_allclose(account.attention[0, 0], [-5 / 3, 1, 2 / 3], atol=1e-6)
    assert account.whole == pytest.approx(0.0, abs=1e-6)
    assert not account.single.any() and not account.mlp.any() and not account.value_bias.any()


def test_one_layer_model_balances_and_shows_a_probe():
    model = OneLayerTransformer(OneLayerConfig(vocab=16, d_model=8, length=32, init_scale=1.0))
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 16, (5, 20), generator=draw)
    asked = [Question(tuple(row.tolist()), 19, 3, 7) for row in rows]
    expected = model.last_logits(rows).detach()
    for account, logits in zip(accounts(model, asked), expected, strict=True):
        check(account, float(logits[3] - logits[7]))
    doubled = HookProbe("v", [("blocks.0.attn.hook_v", lambda value, hook: 2 * value)], packs=True)
    for account, logits in zip(accounts(model, asked, probes=[doubled]), expected, strict=True):
        check(account, 2 * float(logits[3] - logits[7]))


def test_a_changed_pattern_balances(pair):
    _, model = pair
    asked = questions(model)[:1]
    key = len(asked[0].symbols) - 4  # inside every sliding window

    def blind(pattern, hook):
        pattern = pattern.clone()
        pattern[..., key] = 0
        return pattern

    probe = HookProbe("blind", [("blocks.1.attn.hook_pattern", blind)])
    before, after = accounts(model, asked)[0], accounts(model, asked, probes=[probe])[0]
    assert before.attention[1, :, key].any() and not after.attention[1, :, key].any()
    check(after, after.whole)
    assert after.whole != pytest.approx(before.whole, abs=1e-4)


@pytest.fixture(scope="module")
def alone(pair):
    """Each question's account from a separate run."""
    return [accounts(pair[1], [question])[0] for question in questions(pair[1])]


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(order=st.permutations(range(3)), batch_tokens=st.sampled_from([1, 25, 500]))
def test_any_batch_gives_the_same_parts(pair, alone, order, batch_tokens):
    _, model = pair
    asked = questions(model)
    together = accounts(model, [asked[i] for i in order], batch_tokens=batch_tokens)
    for i, account in zip(order, together, strict=True):
        np.testing.assert_allclose(account.attention, alone[i].attention, atol=2e-6)
        np.testing.assert_allclose(account.mlp, alone[i].mlp, atol=2e-6)
        np.testing.assert_allclose(account.single, alone[i].single, atol=2e-6)


def test_nothing_is_left_behind(pair):
    _, model = pair
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    accounts(model, questions(model))
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_no_questions_and_bad_ones(pair):
    _, model = pair
    assert accounts(model, []) == []
    with pytest.raises(InputError, match="position 9 is not one of the 2 tokens"):
        accounts(model, [Question((5, 6), 9, 1, 2)])
    with pytest.raises(InputError, match="at least 1 token, not 0"):
        accounts(model, questions(model), batch_tokens=0)
    model.train()
    try:
        with pytest.raises(InputError, match="evaluation mode"):
            accounts(model, questions(model))
    finally:
        model.eval()


@pytest.mark.parametrize("width", [4, 7])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_norm_is_measured_by_applying_it(width, kind):
    draw = torch.Generator().manual_seed(width)
    weight, bias = torch.randn(2, width, generator=draw)
    module = torch.nn.LayerNorm(width) if kind == "layer" else torch.nn.RMSNorm(width, eps=1e-6)
    with torch.no_grad():
        module.weight.copy_(weight)
        if kind == "layer":
            module.bias.copy_(bias)
    norm = Norm.of(module, width, module.weight)
    torch.testing.assert_close(norm.weight, weight, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(norm.bias, bias if kind == "layer" else torch.zeros(width))
    assert norm.centred == (kind == "layer")


@pytest.mark.parametrize(
    "settings",
    [
        {"normalization_type": "LN"},
        {"normalization_type": "LNPre"},
        {"normalization_type": None},
        {"normalization_type": "LN", "attn_only": True},
        {"normalization_type": "RMS", "n_key_value_heads": 2, "final_rms": True,
         "positional_embedding_type": "rotary", "rotary_dim": 8},
        {"normalization_type": "RMS", "final_rms": True, "output_logits_soft_cap": 3.0,
         "use_normalization_before_and_after": True},
        {"normalization_type": "LN", "parallel_attn_mlp": True},
    ],
    ids=["LN", "folded", "no-norm", "attention-only", "grouped", "gemma-2-like", "parallel"],
)  # fmt: skip
def test_hooked_transformers_balance(settings):
    model = own_transformer(**settings)
    ids = (3, 9, 27, 5, 5, 11)
    account = accounts(model, [Question(ids, 5, 7, 30)])[0]
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, -1]
    check(account, float(logits[7] - logits[30]))
