"""Ablation: against edited Hugging Face weights, by hand, and in packed runs."""

from __future__ import annotations

import copy

import pytest
import torch
from plain_huggingface import PlainScorer
from sample_facts import sample_facts
from tiny_models import tiny_model, tiny_tokenizer
from type_checks import unchecked

from hijacklens.errors import InputError
from hijacklens.one_layer import spans
from hijacklens.one_layer.model import OneLayerConfig, OneLayerTransformer
from hijacklens.one_layer.task import ConceptTask
from hijacklens.probe import probed
from hijacklens.prompts.layout import Layout
from hijacklens.scoring.execution import Execution
from hijacklens.scoring.hijack import hijack
from probes.ablation import MeanOutputs, ablate, mean_outputs

HEADS = [(0, 1), (1, 0), (1, 3)]


def output_matrix(plain, family, layer):
    """Rows (of the transposed weight) by head: [head * d_head, d_model], editable in place."""
    if family == "gpt2":
        return plain.transformer.h[layer].attn.c_proj.weight
    return plain.model.layers[layer].self_attn.o_proj.weight.T


def without_heads(family, heads):
    plain = copy.deepcopy(tiny_model(family))
    for layer, head in heads:
        rows = output_matrix(plain, family, layer)
        width = rows.shape[0] // 4
        with torch.no_grad():
            rows[head * width : (head + 1) * width] = 0
    return plain


def test_zeroed_heads_equal_zeroed_rows_of_the_output_matrix(family, model):
    scorer = PlainScorer(without_heads(family, HEADS), tiny_tokenizer(family))
    probe = ablate(heads=HEADS)
    before = [parameter.clone() for parameter in model.parameters()]
    few = sample_facts()[4:8]
    result = hijack(
        model, few, doses=[0, 2], probes=[probe], execution=Execution(batch_tokens=300), quiet=True
    )
    bare = hijack(model, few, doses=[0, 2], quiet=True)
    assert result.settings.probes == (probe.key,)
    far = (result.items["first_true"] - bare.items["first_true"]).abs()
    assert far.max() > 0.1
    facts = {fact.case_id: fact for fact in few}
    for row in result.items.itertuples():
        fact = facts[row.case_id]
        sentence = f"Do not think of {fact.target_false}. "
        prompt = sentence * row.dose + fact.prompt
        assert row.sum_true == pytest.approx(sum(scorer.scores(prompt, fact.target_true)), abs=1e-4)
        assert row.first_false == pytest.approx(
            scorer.scores(prompt, fact.target_false)[0], abs=1e-4
        )
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize("site", ["attn_out", "mlp_out"])
def test_zeroed_layers_add_nothing_to_the_stream(model, site):
    ids = torch.tensor([model.tokenizer("The Eiffel Tower is in").input_ids])
    with probed(model, [ablate(layers=1, site=site)], Layout(ids, {})), torch.no_grad():
        _, cache = model.run_with_cache(ids)
    pre, mid, post = (cache[f"blocks.1.hook_resid_{name}"] for name in ("pre", "mid", "post"))
    assert torch.equal(*((pre, mid) if site == "attn_out" else (mid, post)))
    assert not torch.equal(*((mid, post) if site == "attn_out" else (pre, mid)))


def test_all_heads_of_a_layer_are_that_layer_of_attention(model, family):
    """Without the bias of GPT-2's output matrix; every other family has none."""
    ids = torch.tensor([model.tokenizer("The Eiffel Tower is in").input_ids])
    found = []
    for probe in (ablate(layers=0), ablate(layers=0, site="attn_out")):
        with probed(model, [probe], Layout(ids, {})), torch.no_grad():
            found.append(model(ids))
    assert torch.allclose(*found, atol=1e-6) == (family != "gpt2")


def test_only_tokens_of_the_span_are_touched(gpt2):
    ids = torch.tensor([[5, 6, 7, 8], [9, 5, 5, 5]])
    probe = ablate(heads=[(1, 2)], span="token:5")
    with probed(gpt2, [probe], Layout(ids, {})), torch.no_grad():
        _, cache = gpt2.run_with_cache(ids)
    z = cache["blocks.1.attn.hook_z"]
    silent = (z == 0).all(-1)  # [batch, pos, head]
    assert silent.nonzero().tolist() == [[0, 0, 2], [1, 1, 2], [1, 2, 2], [1, 3, 2]]


@pytest.mark.parametrize("site", ["z", "attn_out", "mlp_out"])
def test_means_are_those_of_single_runs_whatever_the_batch(model, site):
    facts = sample_facts()[:4]
    name = {"z": "blocks.{}.attn.hook_z"}.get(site, f"blocks.{{}}.hook_{site}")
    for span in ("all", "last"):
        seen = [[], []]
        for fact in facts:
            ids = torch.tensor([model.tokenizer(fact.prompt).input_ids])
            with torch.no_grad():
                _, cache = model.run_with_cache(ids)
            for layer in (0, 1):
                rows = cache[name.format(layer)][0]
                seen[layer].append(rows if span == "all" else rows[-1:])
        expected = torch.stack([torch.cat(rows).mean(0) for rows in seen])
        for size in (1, 45, None):
            means = mean_outputs(model, facts, site=site, span=span, batch_tokens=size)
            torch.testing.assert_close(means.values, expected, atol=1e-5, rtol=0)
            assert means.count == sum(len(rows) for rows in seen[0])


def test_mean_ablation_writes_the_mean(gpt2):
    means = mean_outputs(gpt2, sample_facts(), span="last")
    ids = torch.tensor([[5, 6, 7]])
    probe = ablate(heads=[(0, 3)], kind="mean", means=means, span="token:7")
    with probed(gpt2, [probe], Layout(ids, {})), torch.no_grad():
        _, cache = gpt2.run_with_cache(ids)
    with torch.no_grad():
        _, plain = gpt2.run_with_cache(ids)
    z, before = cache["blocks.0.attn.hook_z"], plain["blocks.0.attn.hook_z"]
    assert torch.equal(z[0, 2, 3], means.values[0, 3])
    changed = (z != before).any(-1)
    assert changed.nonzero().tolist() == [[0, 2, 3]]


def test_the_mean_of_one_prompt_at_its_last_token_changes_nothing_there(gpt2):
    facts = sample_facts()[:1]
    means = mean_outputs(gpt2, facts, site="attn_out", span="last")
    probe = ablate(site="attn_out", kind="mean", means=means, span="last")
    bare = hijack(gpt2, facts, doses=[0], quiet=True).items
    same = hijack(gpt2, facts, doses=[0], probes=[probe], quiet=True).items
    # Only the first token of a target is read where the mean was taken.
    assert same["first_true"].tolist() == pytest.approx(bare["first_true"].tolist(), abs=1e-5)


def test_the_one_layer_model_without_its_head_says_nothing():
    task = ConceptTask(bits=3, length=16)
    model = OneLayerTransformer(OneLayerConfig(vocab=8, d_model=4, length=16))
    contexts = task.sample(5, torch.Generator().manual_seed(0))
    layout = spans.layout(task, contexts.tokens)
    with probed(model, [ablate(heads=[(0, 0)], span="last")], layout), torch.no_grad():
        logits = model(contexts.tokens)
    with torch.no_grad():
        plain, cache = model.run_with_cache(contexts.tokens)
    assert not logits[:, -1].any()
    assert torch.equal(logits[:, :-1], plain[:, :-1])
    means = mean_outputs(model, layout, span="last")
    assert means.count == 5
    expected = cache["blocks.0.attn.hook_z"][:, -1].mean(0)
    torch.testing.assert_close(means.values[0], expected)
    with pytest.raises(InputError, match=r"unknown site of this model 'mlp_out'.*attn_out, z"):
        ablate(site="mlp_out").hooks(model, layout)
    with pytest.raises(InputError, match="without a tokenizer"):
        mean_outputs(model, sample_facts())


def test_keys_tell_probes_apart(gpt2):
    means = [mean_outputs(gpt2, sample_facts()[i:], span="last") for i in (0, 1)]
    probes = [
        ablate(),
        ablate(heads=[(1, 0)]),
        ablate(heads=iter([(0, 1)])),
        ablate(layers=range(2), heads=1),
        ablate(layers=1, site="attn_out"),
        ablate(layers=1, site="mlp_out"),
        ablate(span="last"),
        *(ablate(kind="mean", means=each, span="last") for each in means),
    ]
    assert len({probe.key for probe in probes}) == len(probes)
    assert probes[1].key == "ablate:heads=1.0"
    assert all(probe.packs for probe in probes)


MEANS = MeanOutputs("z", "all", 1, torch.zeros(2, 4, 3))
WRONG = {
    "site": ({"site": "resid"}, "unknown site 'resid'"),
    "kind": ({"kind": "noise"}, "unknown kind of ablation 'noise'"),
    "heads of an MLP": ({"heads": [0], "site": "mlp_out"}, "mlp_out is not split into heads"),
    "no means": ({"kind": "mean"}, "needs means=mean_outputs"),
    "means unasked": ({"means": MEANS}, "takes no means"),
    "means of another site": (
        {"site": "attn_out", "kind": "mean", "means": MEANS},
        "means are of z, not of attn_out",
    ),
    "span": ({"span": "at:x"}, "cannot read the span"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input(name):
    asked, message = WRONG[name]
    with pytest.raises(InputError, match=message), unchecked():
        ablate(**asked)


def test_what_the_model_lacks_shows_when_the_probe_is_put_on(gpt2):
    layout = Layout(torch.tensor([[5]]), {})
    with pytest.raises(InputError, match="layer 2 is not one of this model's"):
        ablate(layers=2).hooks(gpt2, layout)
    with pytest.raises(InputError, match="unknown span 'subject'"):
        ablate(span="subject").hooks(gpt2, layout)
    means = [ablate(kind="mean", means=MEANS)]
    with pytest.raises(InputError, match="means are those of another"), probed(gpt2, means, layout):
        gpt2(layout.tokens)
    with pytest.raises(InputError, match="no token of the reference"):
        mean_outputs(gpt2, sample_facts(), span="token:419")
    with pytest.raises(InputError, match="unknown site 'q'"), unchecked():
        mean_outputs(gpt2, sample_facts(), site="q")
