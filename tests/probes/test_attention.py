"""Attention probes against plain Hugging Face models whose masks were edited, family by family."""

from __future__ import annotations

import copy
import math
from functools import cache

import pytest
import torch
from masked_huggingface import HIDDEN, added, everywhere_masked, layer_kinds, visible
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer
from torch.testing import assert_close

from hijacklens.models.loading import load_model
from hijacklens.probe import logits_at, probed
from hijacklens.prompts.layout import Layout
from probes import attention

LENGTHS = (14, 11, 3)
"""Longer than the sliding window of 8, and one without any token of the far span."""
SPANS = {"far": (1, 2, 3), "own": (9, 10), "last": None}
HEADS = [(0, 3), (1, 0), (1, 2)]


@cache
def models(family: str, *, cap: float | None = None):
    """The plain model and the hooked one, with the same weights."""
    plain = tiny_model(family)
    plain.set_attn_implementation("eager")
    if cap is not None:
        plain.config.attn_logit_softcapping = cap
        for layer in plain.model.layers:
            layer.self_attn.attn_logit_softcapping = cap
    hooked = load_model(copy.deepcopy(plain), tokenizer=tiny_tokenizer(family), device="cpu")
    return plain, hooked


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    return models(request.param)


def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(5, 300, (n,), generator=draw).tolist() for n in LENGTHS]


def batch_layout(rows: list[list[int]]) -> Layout:
    """Right-padded prompts; no span contains the padding."""
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    masks = {name: torch.zeros_like(tokens, dtype=torch.bool) for name in SPANS}
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
        for name in SPANS:
            masks[name][i, [k for k in held(name, len(row)) if k < len(row)]] = True
    return Layout(tokens, masks)


def held(name: str, length: int) -> tuple[int, ...]:
    places = SPANS[name]
    return (length - 1,) if places is None else places


def between(source: str, target: str, length: int) -> torch.Tensor:
    """[query, key]: pairs of a source and a target token."""
    found = torch.zeros(length, length, dtype=torch.bool)
    for i in held(source, length):
        for j in held(target, length):
            if i < length and j < length:
                found[i, j] = True
    return found


def all_logits(model, probes, rows=None):
    """Logits [pos, vocab] of every prompt, run in one right-padded batch."""
    rows = rows or prompts()
    layout = batch_layout(rows)
    row = torch.tensor([i for i, ids in enumerate(rows) for _ in ids])
    position = torch.tensor([j for ids in rows for j in range(len(ids))])
    found = logits_at(model, layout, row, position, probes=probes)
    return list(found.split([len(ids) for ids in rows]))


def one_bias(removed: torch.Tensor, heads, value: float = HIDDEN) -> torch.Tensor:
    bias = torch.zeros(4, *removed.shape)
    bias[list(heads)] = bias[list(heads)].masked_fill(removed, value)
    return bias


@pytest.mark.parametrize("when", ["before", "after"])
def test_knock_out_equals_a_mask_in_all_layers(pair, when):
    plain, model = pair
    probe = attention.knock_out("last+own", "far", when=when)
    before = all_logits(model, [])
    moved = 0.0
    for ids, got, bare in zip(prompts(), all_logits(model, [probe]), before, strict=True):
        removed = between("last", "far", len(ids)) | between("own", "far", len(ids))
        assert_close(got, everywhere_masked(plain, ids, removed), atol=1e-4, rtol=0)
        moved = max(moved, float((got - bare).abs().max()))
    assert moved > 0.1


@pytest.mark.parametrize("when", ["before", "after"])
def test_knock_out_of_single_heads_equals_a_mask_in_them(pair, when):
    plain, model = pair
    probe = attention.knock_out("own", "far", heads=HEADS, when=when)
    ids = prompts()[0]
    removed = between("own", "far", len(ids))
    bias = {0: one_bias(removed, [3]), 1: one_bias(removed, [0, 2])}
    (got,) = all_logits(model, [probe], [ids])
    assert_close(got, added(plain, ids, bias), atol=1e-4, rtol=0)
    (layer,) = all_logits(model, [attention.knock_out("own", "far", layers=1, when=when)], [ids])
    assert_close(layer, added(plain, ids, {1: one_bias(removed, range(4))}), atol=1e-4, rtol=0)
    assert not torch.allclose(got, layer, atol=1e-2)


def test_rescaled_weights_equal_a_logarithm_on_the_scores(pair):
    plain, model = pair
    ids = prompts()[0]
    pairs = between("last", "own", len(ids))
    probe = attention.rescale(3.0, "last", "own", heads=HEADS)
    log = math.log(3.0)
    bias = {0: one_bias(pairs, [3], log), 1: one_bias(pairs, [0, 2], log)}
    (got,) = all_logits(model, [probe], [ids])
    assert_close(got, added(plain, ids, bias), atol=1e-4, rtol=0)
    (zero,) = all_logits(model, [attention.rescale(0, "last", "own")], [ids])
    (out,) = all_logits(model, [attention.knock_out("last", "own")], [ids])
    assert_close(zero, out, atol=1e-4, rtol=0)
    (same,) = all_logits(model, [attention.rescale(1, "last", "own")], [ids])
    assert_close(same, all_logits(model, [], [ids])[0], atol=1e-5, rtol=0)


def test_proportional_redirect_equals_a_mask_over_all_other_keys(pair):
    plain, model = pair
    ids = prompts()[0]
    length = len(ids)
    target = between("last", "own", length)
    others = torch.zeros_like(target)
    others[-1] = ~target[-1]
    got = all_logits(model, [attention.redirect("last", "own", split="proportional")])
    assert_close(got[0], everywhere_masked(plain, ids, others), atol=1e-4, rtol=0)
    # The third prompt has no token of the target: it keeps its attention, to the bit.
    assert torch.equal(got[2], all_logits(model, [])[2])


def site(model, layer, probes, layout):
    """Scores, pattern, values by query head and z of a layer."""
    names = [f"blocks.{layer}.attn.hook_{part}" for part in ("attn_scores", "pattern", "v", "z")]
    with torch.no_grad(), probed(model, probes, layout):
        _, cache = model.run_with_cache(layout.tokens, names_filter=lambda name: name in names)
    scores, pattern, v, z = (cache[name] for name in names)
    return scores, pattern, v.repeat_interleave(4 // v.shape[2], dim=2), z


def mixed(pattern, v):
    return torch.einsum("bhqk,bkhd->bqhd", pattern, v)


@pytest.mark.parametrize("layer", [0, 1])
def test_edits_of_a_layer_equal_direct_recomputation(pair, layer):
    _, model = pair
    layout = batch_layout(prompts())
    scores, pattern, v, _ = site(model, layer, [], layout)
    chosen = torch.zeros(1, 4, 1, 1, dtype=torch.bool)
    chosen[:, [0, 3]] = True
    edge = layout.pairs("last", "own") & chosen
    seen = scores > -1e9

    half = torch.where(edge, 0.5 * pattern, pattern)
    doubled = torch.where(edge & seen, 2.0 * scores, scores).softmax(-1)
    row = (edge & seen).any(-1, keepdim=True)
    even = (edge & seen).float()
    uniform = torch.where(row, even / even.sum(-1, keepdim=True).clamp_min(1), pattern)
    gone = pattern.masked_fill(edge, 0.0)
    expected = {
        attention.rescale(0.5, "last", "own", layers=layer, heads=[0, 3], renormalise=False): half,
        attention.rescale(2, "last", "own", layers=layer, heads=[0, 3], when="before"): doubled,
        attention.redirect("last", "own", layers=layer, heads=[0, 3]): uniform,
        attention.knock_out(
            "last", "own", layers=layer, heads=[0, 3], when="after", renormalise=False
        ): gone,
    }
    for probe, new in expected.items():
        _, got, _, z = site(model, layer, [probe], layout)
        assert_close(got, new, atol=1e-6, rtol=0)
        assert_close(z, mixed(new, v), atol=1e-5, rtol=0)
        assert float((got - pattern).abs().max()) > 1e-2


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_token_with_no_key_left_attends_to_nothing(pair, when):
    _, model = pair
    layout = batch_layout(prompts())
    probe = attention.knock_out("last", "all", layers=1, heads=[1], when=when)
    _, bare, _, _ = site(model, 1, [], layout)
    _, pattern, _, z = site(model, 1, [probe], layout)
    for i, length in enumerate(LENGTHS):
        assert float(pattern[i, 1, length - 1].abs().max()) == 0.0
        assert float(z[i, length - 1, 1].abs().max()) == 0.0
        assert torch.equal(pattern[i, 1, : length - 1], bare[i, 1, : length - 1])
    others = [0, 2, 3]
    assert torch.equal(pattern[:, others], bare[:, others])


@pytest.mark.parametrize("when", ["before", "after"])
def test_attention_that_is_taken_away_never_goes_to_later_tokens(pair, when):
    """All that the source tokens see is knocked out, and the tokens after them are not."""
    _, model = pair
    (ids,) = prompts()[:1]
    masks = {name: torch.zeros(1, len(ids), dtype=torch.bool) for name in ("middle", "seen")}
    masks["middle"][0, [5, 9]] = True
    masks["seen"][0, :10] = True
    layout = Layout(torch.tensor([ids]), masks)
    for layer in range(2):
        probe = attention.knock_out("middle", "seen", when=when)
        _, pattern, _, z = site(model, layer, [probe], layout)
        assert float(pattern[:, :, [5, 9]].abs().max()) == 0.0
        assert float(z[:, [5, 9]].abs().max()) == 0.0
        assert float(pattern[:, :, 8].sum()) == pytest.approx(4, abs=1e-5)


EXTREME = {
    "none": attention.rescale(0, "all", "all", when="before"),
    "turned round": attention.rescale(-3.0, "all", "all", when="before"),
    "huge": attention.rescale(1e6, "all", "all", when="before"),
    "huge and turned": attention.rescale(-1e6, "all", "all", when="before"),
    "weights": attention.rescale(1e6, "all", "own"),
    "redirect": attention.redirect("all", "all"),
}


@pytest.mark.parametrize("name", EXTREME)
def test_hidden_keys_stay_hidden(pair, name):
    plain, model = pair
    ids = prompts()[0]
    layout = batch_layout([ids])
    for layer in range(2):
        _, pattern, _, _ = site(model, layer, [EXTREME[name]], layout)
        seen = visible(plain, len(ids), layer_kinds(plain)[layer])
        assert float(pattern[0, :, ~seen].abs().max()) == 0.0
        assert_close(pattern.sum(-1), torch.ones(1, 4, len(ids)), atol=1e-5, rtol=0)


def test_scores_are_soft_capped_before_a_probe_sees_them():
    plain, model = models("gemma2", cap=1.5)
    ids = prompts()[0]
    layout = batch_layout([ids])
    scores, _, _, _ = site(model, 0, [], layout)
    seen = scores > -1e9
    assert 1.2 < float(scores[seen].abs().max()) <= 1.5
    pairs = between("last", "own", len(ids))
    bias = {0: one_bias(pairs, range(4), math.log(3.0)), 1: one_bias(pairs, [1])}
    probes = [
        attention.rescale(3, "last", "own", layers=0),
        attention.knock_out("last", "own", heads=[(1, 1)]),
    ]
    (got,) = all_logits(model, probes, [ids])
    assert_close(got, added(plain, ids, bias), atol=1e-4, rtol=0)
    doubled = attention.rescale(2, "last", "own", layers=0, when="before")
    _, pattern, _, _ = site(model, 0, [doubled], layout)
    edge = layout.pairs("last", "own") & seen
    assert_close(pattern, torch.where(edge, 2 * scores, scores).softmax(-1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_half_precision(family, dtype):
    plain = tiny_model(family)
    tokenizer = tiny_tokenizer(family)
    model = load_model(plain, tokenizer=tokenizer, device="cpu", dtype=dtype)
    layout = batch_layout(prompts())
    removed = layout.pairs("last", "own")
    for probe in (
        attention.knock_out("last", "own"),
        attention.knock_out("last", "own", when="after"),
        attention.rescale(1e5, "last", "far", when="before"),
        attention.rescale(1e5, "last", "far"),
        attention.redirect("last", "own", split="proportional"),
        attention.knock_out("last", "all"),
        attention.knock_out("last", "all", when="after"),
    ):
        for layer in range(2):
            scores, pattern, _, z = site(model, layer, [probe], layout)
            assert scores.dtype == pattern.dtype == getattr(torch, dtype)
            assert bool(pattern.isfinite().all()) and bool(z.isfinite().all())
            sums = pattern.float().sum(-1)
            left = torch.ones_like(sums)
            if probe.target == "all":
                for i, length in enumerate(LENGTHS):
                    left[i, :, length - 1] = 0
            assert_close(sums, left, atol=0.02, rtol=0)
            later = torch.ones(14, 14, dtype=torch.bool).triu(1)
            assert float(pattern[:, :, later].abs().max()) == 0.0
            if "knock-out" in probe.key:
                assert float(pattern.masked_fill(~removed, 0).abs().max()) == 0.0
