"""Activation patching: against hooks on plain models, single prompts, and identities."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from plain_huggingface import PlainScorer
from sample_facts import sample_facts
from tiny_models import rough, tiny_model, tiny_tokenizer
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)
from type_checks import unchecked

from hijacklens.errors import InputError
from hijacklens.models.agreement import comparing_once
from hijacklens.models.loading import load_model
from hijacklens.one_layer import spans
from hijacklens.one_layer.model import OneLayerConfig, OneLayerTransformer
from hijacklens.one_layer.task import ConceptTask
from hijacklens.probe import probed
from hijacklens.prompts.correspondence import Correspondence, align_contexts
from hijacklens.prompts.layout import Layout
from hijacklens.scoring.execution import Execution
from hijacklens.scoring.hijack import hijack
from hijacklens.scoring.pairs import pairs
from probes.ablation import ablate
from probes.activation_sites import HEAD_AXES
from probes.activations import patch, patch_between

STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
SITES = (*STREAM, *HEAD_AXES)
KV_HEADS = {"gpt2": 4}
HEADS = 4


def pair_of(model, case=1, dose=2):
    return pairs(model, sample_facts()[case : case + 1], dose=dose)[0]


def run(model, ids, *probes):
    tokens = torch.tensor([ids])
    with probed(model, probes, Layout(tokens, {})), torch.no_grad():
        return model(tokens)[0]


class Patched:
    """A plain model whose modules are read in one run and written in another."""

    def __init__(self, family, site, layer, head):
        self.plain = copy.deepcopy(tiny_model(family))
        gpt2 = family == "gpt2"
        block = (self.plain.transformer.h if gpt2 else self.plain.model.layers)[layer]
        attn = block.attn if gpt2 else block.self_attn
        normed = family in ("gemma2", "gemma3")
        inputs = site in ("resid_pre", "z")
        module = {
            "resid_pre": lambda: block,
            "resid_post": lambda: block,
            "attn_out": lambda: block.post_attention_layernorm if normed else attn,
            "mlp_out": lambda: block.post_feedforward_layernorm if normed else block.mlp,
            "z": lambda: attn.c_proj if gpt2 else attn.o_proj,
            "q": lambda: attn.c_attn if gpt2 else attn.q_proj,
            "k": lambda: attn.c_attn if gpt2 else attn.k_proj,
            "v": lambda: attn.c_attn if gpt2 else attn.v_proj,
        }[site]()
        self.part = slice(None)
        if site in HEAD_AXES:
            width = 8 if family in ("gpt2", "llama") else 16
            start = {"k": 32, "v": 64}.get(site, 0) if gpt2 else 0
            self.part = slice(start + head * width, start + (head + 1) * width)
        self.module, self.inputs = module, inputs

    def _hooked(self, edit):
        if self.inputs:
            return self.module.register_forward_pre_hook(
                lambda _, args, kwargs: self._at_input(edit, args, kwargs), with_kwargs=True
            )

        def at_output(_, args, output):
            if isinstance(output, tuple):
                return (edit(output[0]), *output[1:])
            return edit(output)

        return self.module.register_forward_hook(at_output)

    def _at_input(self, edit, args, kwargs):
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    def logits(self, source, target, pairs):
        seen = []

        def keep(x):
            seen.append(x.clone())
            return x

        def put(x):
            x = x.clone()
            for i, j in pairs:
                x[0, j, self.part] = seen[0][0, i, self.part]
            return x

        with ExitStack() as stack, torch.no_grad():
            handle = self._hooked(keep)
            self.plain(torch.tensor([source]))
            handle.remove()
            stack.callback(self._hooked(put).remove)
            return self.plain(torch.tensor([target])).logits[0]


@pytest.mark.parametrize(
    ("site", "direction"),
    [
        *((site, "denoise") for site in SITES if site != "resid_mid"),
        ("resid_post", "noise"),
        ("k", "noise"),
    ],
)
def test_equal_to_hooks_on_the_plain_model(family, model, site, direction):
    pair = pair_of(model)
    layer = 1  # without embedded positions, these tokens have the same inputs in layer 0
    grouped = site in ("k", "v") and family != "gpt2"
    head = None if site in STREAM else (1 if grouped else 2)
    where = pair.align(direction=direction, span="query+bos" if family != "gpt2" else "query")
    assert len(where.source) != len(where.target)
    made = patch(model, where, site=site, layers=layer, heads=head)
    expected = Patched(family, site, layer, head).logits(where.source, where.target, where.pairs)
    got = run(model, where.target, made)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
    last_key = direction == "denoise" and site in ("q", "k")
    assert (got - run(model, where.target)).abs().max() > (1e-4 if last_key else 1e-2)


def test_the_stream_at_the_last_token_decides(model):
    """What is read at the last token is the last layer's stream there, and nothing else."""
    pair = pair_of(model)
    where = pair.align(direction="denoise", span="last")
    clean = run(model, where.source)[-1]
    for site in ("resid_mid", "resid_post"):
        made = patch(model, where, site=site, layers=1)
        torch.testing.assert_close(run(model, where.target, made)[-1], clean, atol=2e-5, rtol=0)
    made = patch(model, where, site="resid_pre", layers=1)
    assert (run(model, where.target, made)[-1] - clean).abs().max() > 1e-2


def test_all_that_a_token_is_made_of_reproduces_the_clean_run(family, model):
    """Its embedding and what every head wrote: the rest is computed token by token."""
    pair = pair_of(model, case=4)  # the first word is cut otherwise by some tokenizers
    where = pair.align(direction="denoise", span="all")
    made = [patch(model, where, site="resid_pre", layers=0), patch(model, where, site="z")]
    source, target = (list(side) for side in zip(*where.pairs, strict=True))
    clean, patched = run(model, where.source), run(model, where.target, *made)
    torch.testing.assert_close(patched[target], clean[source], atol=2e-5, rtol=0)
    # The sentences are there to be seen, so the stream of the first layer alone is not enough.
    only = run(model, where.target, made[0])
    seen = family != "gemma3"  # whose two windows of 8 do not reach from this query's end to them
    assert ((only[-1] - clean[-1]).abs().max() > 1e-2) == seen


def test_the_patched_middle_of_a_layer_is_in_the_stream(model):
    pair = pair_of(model)
    where = pair.align(direction="denoise")
    with torch.no_grad():
        _, clean = model.run_with_cache(torch.tensor([where.source]))
        made = patch(model, where, site="resid_mid", layers=0)
        tokens = torch.tensor([where.target])
        with probed(model, [made], Layout(tokens, {})):
            _, patched = model.run_with_cache(tokens)
    source, target = (list(side) for side in zip(*where.pairs, strict=True))
    for name in ("hook_resid_mid", "hook_mlp_out", "hook_resid_post"):
        torch.testing.assert_close(
            patched[f"blocks.0.{name}"][0, target],
            clean[f"blocks.0.{name}"][0, source],
            atol=1e-5,
            rtol=0,
        )


SIZE = {"vocab_size": 400, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
NO_SUM = {
    "OPT-350m": lambda: OPTForCausalLM(
        OPTConfig(**SIZE, ffn_dim=64, word_embed_proj_dim=16, do_layer_norm_before=False)
    ),
    "GPT": lambda: OpenAIGPTLMHeadModel(
        OpenAIGPTConfig(vocab_size=400, n_embd=32, n_layer=2, n_head=4)
    ),
    "BLOOM": lambda: BloomForCausalLM(
        BloomConfig(
            vocab_size=400, hidden_size=32, n_layer=2, n_head=4,
            apply_residual_connection_post_layernorm=True,
        )
    ),
    "Falcon-H1": lambda: FalconH1ForCausalLM(
        FalconH1Config(
            **SIZE, intermediate_size=64, num_key_value_heads=2, mamba_d_ssm=32, mamba_n_heads=4,
            mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8,
        )
    ),
}  # fmt: skip
"""Models whose stream between attention and MLP is not `resid_pre + attn_out`."""


@pytest.mark.parametrize("name", NO_SUM)
def test_a_middle_that_is_no_sum_is_refused(name):
    """The patched run is not the source run there, which it is where the stream is a sum."""
    model = load_model(rough(NO_SUM[name]()), tokenizer=tiny_tokenizer("gpt2"), device="cpu")
    where = Correspondence((7, 8, 9, 10), (7, 20, 21, 22), tuple((i, i) for i in range(4)))
    made = patch(model, where, site="resid_mid", layers=1)
    with pytest.raises(InputError, match=r"resid_mid of this model cannot be patched: at blocks.1"):
        run(model, where.target, made)


def test_other_probes_may_change_the_parts_of_the_middle(model):
    """The stream is read and measured after them, whatever the order."""
    where = Correspondence((7, 8, 9, 10), (7, 20, 21, 22), tuple((i, i) for i in range(4)))
    middle, before = (patch(model, where, site=f"resid_{n}", layers=1) for n in ("mid", "pre"))
    source = run(model, where.source)
    for order in ([middle, before], [before, middle]):
        torch.testing.assert_close(run(model, where.target, *order), source, atol=1e-4, rtol=0)
    run(model, where.target, middle, ablate(layers=1, site="attn_out"))


def test_patching_a_prompt_with_itself_changes_nothing(model):
    ids = pair_of(model).hijacked.ids
    same = Correspondence(ids, ids, tuple((i, i) for i in range(len(ids))))
    got = run(model, ids, *(patch(model, same, site=site) for site in SITES))
    torch.testing.assert_close(got, run(model, ids), atol=1e-5, rtol=0)
    none = [patch(model, Correspondence(ids, ids, ()), site=site) for site in SITES]
    assert torch.equal(run(model, ids, *none), run(model, ids))


def test_scores_of_a_batch_are_those_of_single_plain_runs(family, model):
    site = "resid_post" if family == "gemma" else "v"
    direction = "noise" if family in ("llama", "gemma3") else "denoise"
    facts = sample_facts()[2:5]
    head = None if site == "resid_post" else 1
    options = {"direction": direction, "site": site, "layers": 1, "heads": head}
    made = patch_between(model, pairs(model, facts), **options)
    single = patch_between(model, pairs(model, facts), **options, batch_tokens=1)
    torch.testing.assert_close(made.values[1], single.values[1], atol=1e-5, rtol=0)
    items = hijack(
        model,
        facts,
        doses=[0, 1, 2],
        probes=[made],
        execution=Execution(batch_tokens=200),
        quiet=True,
    ).items.set_index(["case_id", "dose"])
    bare = hijack(model, facts, doses=[0, 1, 2], quiet=True).items.set_index(["case_id", "dose"])
    moved = 1 if direction == "denoise" else 0
    for pair in pairs(model, facts, dose=1):
        case = pair.fact.case_id
        for dose in {0, 1, 2} - {moved}:
            assert items.loc[(case, dose), "sum_true"] == pytest.approx(
                bare.loc[(case, dose), "sum_true"], abs=1e-4
            )
        where = pair.align(direction=direction)
        logits = Patched(family, site, 1, head).logits(where.source, where.target, where.pairs)
        first = pair.answers()[0]
        assert items.loc[(case, moved), "first_true"] == pytest.approx(
            float(logits[-1].double().log_softmax(-1)[first]), abs=1e-4
        )
    moves = items["first_true"] - bare["first_true"]
    assert moves[moves.index.get_level_values("dose") == moved].abs().max() > 0.01


def test_a_longer_row_with_a_target_after_the_prompt_is_patched_too(gpt2):
    """New York has two tokens; the second is read after the prompt and the first."""
    facts = sample_facts()[5:6]
    made = patch_between(gpt2, pairs(gpt2, facts), span="last", layers=1)
    pair = pairs(gpt2, facts)[0]
    assert len(pair.items[1].true) > 1
    got = hijack(gpt2, facts, doses=[1], probes=[made], quiet=True).items.iloc[-1]
    where = pair.align(direction="denoise", span="last")
    before, token = pair.items[1].true[1]
    rows = Patched("gpt2", "resid_post", 1, None).logits(where.source, before, where.pairs)
    second = float(rows[-1].log_softmax(-1)[token])
    scorer = PlainScorer(copy.deepcopy(tiny_model("gpt2")), gpt2.tokenizer)
    first = scorer.scores(pair.bare.text, "New York")[0]  # the clean run's, at the last token
    assert got["first_true"] == pytest.approx(first, abs=1e-4)
    if len(pair.items[1].true) == 2:
        assert got["sum_true"] == pytest.approx(first + second, abs=1e-4)


def test_nothing_is_left_behind(gpt2):
    before = [parameter.clone() for parameter in gpt2.parameters()]
    made = patch_between(gpt2, pairs(gpt2, sample_facts()[:2]), site="resid_mid")
    hijack(gpt2, sample_facts()[:2], doses=[1], probes=[made], quiet=True)
    ids = pair_of(gpt2, case=0, dose=1).hijacked.ids
    with pytest.raises(KeyboardInterrupt), probed(gpt2, [made], Layout(torch.tensor([ids]), {})):
        raise KeyboardInterrupt
    assert all(torch.equal(a, b) for a, b in zip(before, gpt2.parameters(), strict=True))
    assert not any(point.fwd_hooks for point in gpt2.hook_dict.values())
    assert not made.values[0].is_inference()


def test_the_one_layer_model():
    task = ConceptTask(bits=3, length=16)
    model = OneLayerTransformer(OneLayerConfig(vocab=8, d_model=4, d_attn=3, length=16))
    draw = torch.Generator().manual_seed(0)
    clean, other = (spans.layout(task, task.sample(5, draw).tokens) for _ in range(2))
    with torch.no_grad():
        expected, plain = model(clean.tokens), model(other.tokens)
        for site in ("resid_post", "attn_out", "z"):
            made = patch(model, align_contexts(clean, other, span="last"), site=site)
            with probed(model, [made], other):
                got = model(other.tokens)
            assert torch.equal(got[:, -1], expected[:, -1])
            assert torch.equal(got[:, :-1], plain[:, :-1])
        everywhere = align_contexts(clean, other)
        swapped = [patch(model, everywhere, site=site) for site in ("q", "k", "v")]
        with probed(model, swapped, other):
            torch.testing.assert_close(model(other.tokens), expected)
    with pytest.raises(InputError, match="unknown site of this model 'mlp_out'"):
        patch(model, everywhere, site="mlp_out")


def test_a_hooked_transformer_of_one_s_own():
    """The class that TransformerLens 3.9 still has: grouped heads, random weights."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    config = HookedTransformerConfig(
        n_layers=2,
        d_model=16,
        d_head=4,
        n_heads=4,
        n_key_value_heads=2,
        n_ctx=32,
        d_vocab=12,
        d_mlp=20,
        act_fn="gelu",
        positional_embedding_type="rotary",
        rotary_dim=4,
        seed=0,
        init_weights=True,
        device="cpu",
    )
    model = HookedTransformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    source, target = (1, 2, 3, 4), (1, 7, 8, 9, 2, 3, 4)
    pairs = ((0, 0), (1, 4), (2, 5), (3, 6))
    everywhere = Correspondence(source, target, pairs)
    for site in ("resid_mid", "resid_post"):
        made = patch(model, Correspondence(source, target, pairs[-1:]), site=site, layers=1)
        torch.testing.assert_close(run(model, target, made)[-1], run(model, source)[-1])
    made = [
        patch(model, everywhere, site="resid_pre", layers=0),
        patch(model, everywhere, site="z"),
    ]
    clean = run(model, source)
    torch.testing.assert_close(run(model, target, *made)[[0, 4, 5, 6]], clean)
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([source]))
    v = patch(model, everywhere, site="v", layers=1, heads=1)
    for slot, (i, _) in enumerate(pairs):
        assert torch.equal(v.values[1][slot, 0], cache["blocks.1.attn.hook_v"][0, i, 1])
    without = copy.deepcopy(model)
    with torch.no_grad():
        without.blocks[1].attn.W_O[2] = 0
    got = run(model, target, ablate(heads=[(1, 2)]))
    torch.testing.assert_close(got, run(without, target))


def test_under_a_key_value_cache_only_new_tokens_are_patched(gpt2):
    """Positions include the tokens in the cache."""
    pair = pair_of(gpt2)
    where = pair.align(direction="denoise", span="last")
    made = patch(gpt2, where, layers=1)
    ids, n = where.target, len(where.target) - 3
    tokens, past = torch.tensor([ids[n:]]), torch.tensor([ids[:n]])
    with torch.no_grad():
        _, cache = gpt2(past, return_type="logits_and_cache", use_cache=True)
        with probed(gpt2, [made], Layout(tokens, {}, past, {})):
            logits, _ = gpt2(tokens, return_type="logits_and_cache", past_key_values=cache)
    torch.testing.assert_close(logits[0], run(gpt2, ids, made)[n:], atol=2e-5, rtol=0)


@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "mlp_out", "z", "q", "k", "v"])
@pytest.mark.parametrize("which", ["gpt2", "llama"])
def test_the_same_as_transformer_lens_where_prompts_are_equally_long(which, site):
    from transformer_lens import patching

    model = load_model(tiny_model(which), tokenizer=tiny_tokenizer(which), device="cpu")
    source, target = (7, 9, 30, 12, 41), (7, 50, 31, 12, 40)
    whole = {
        "resid_pre": patching.get_act_patch_resid_pre,
        "attn_out": patching.get_act_patch_attn_out,
        "mlp_out": patching.get_act_patch_mlp_out,
    }
    by_head = {
        "z": patching.get_act_patch_attn_head_out_all_pos,
        "q": patching.get_act_patch_attn_head_q_all_pos,
        "k": patching.get_act_patch_attn_head_k_all_pos,
        "v": patching.get_act_patch_attn_head_v_all_pos,
    }

    def metric(logits):
        return logits[0, -1, 3] - logits[0, -1, 4]

    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([source]))
        theirs = {**whole, **by_head}[site](model, torch.tensor([target]), cache, metric)
    every = tuple((i, i) for i in range(5))
    with comparing_once(model):
        for layer, index in np.ndindex(*theirs.shape):
            pairs = (every[index],) if site in whole else every
            heads = None if site in whole else index
            where = Correspondence(source, target, pairs)
            made = patch(model, where, site=site, layers=layer, heads=heads)
            ours = metric(run(model, target, made)[None])
            assert float(ours) == pytest.approx(float(theirs[layer, index]), abs=1e-5)


def test_bad_input(gpt2):
    ids = (5, 6, 7)
    where = Correspondence(ids, ids, ((0, 0),))
    with pytest.raises(InputError, match="unknown site 'pattern'"), unchecked():
        patch(gpt2, where, site="pattern")
    with pytest.raises(InputError, match="resid_pre is not split into heads"):
        patch(gpt2, where, site="resid_pre", heads=[0])
    with pytest.raises(InputError, match="layer 2 is not one"):
        patch(gpt2, where, layers=2)
    other = Correspondence((5, 6, 8), ids, ((0, 0),))
    with pytest.raises(InputError, match="from two sources"):
        patch(gpt2, [where, other])
    assert patch(gpt2, [where, where]).targets == {ids: ((0, 1),)}
    with pytest.raises(InputError, match="unknown direction 'both'"), unchecked():
        patch_between(gpt2, pairs(gpt2, sample_facts()), direction="both")
    with pytest.raises(InputError, match=r"fact 0 cannot be patched: .*span 'hijack'"):
        patch_between(gpt2, pairs(gpt2, sample_facts()), span="hijack")
    gemma = load_model(tiny_model("gemma"), tokenizer=tiny_tokenizer("gemma"), device="cpu")
    of_gpt2, layout = [patch(gpt2, where, site="z")], Layout(torch.tensor([ids]), {})
    message = "of width 8, and .*hook_in of this model has 16"
    with pytest.raises(InputError, match=message), probed(gemma, of_gpt2, layout):
        gemma(layout.tokens)
    gpt2.train()
    try:
        with pytest.raises(InputError, match="training mode"):
            patch(gpt2, where)
    finally:
        gpt2.eval()
