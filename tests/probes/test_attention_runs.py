"""Attention probes in every way of running: data sets, packs, caches, other runs, refusals."""

from __future__ import annotations

import copy

import pandas as pd
import pytest
import torch
from masked_huggingface import everywhere_masked
from tiny_models import rough, tiny_tokenizer
from torch.testing import assert_close
from transformers import (
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    XGLMConfig,
    XGLMForCausalLM,
)
from type_checks import unchecked

from hijacklens.errors import InputError
from hijacklens.facts.fact import Fact, FactSet
from hijacklens.models.loading import load_model
from hijacklens.one_layer.evaluation import HOOKED_BLOCK, answers
from hijacklens.one_layer.model import OneLayerConfig, OneLayerTransformer
from hijacklens.one_layer.task import ConceptTask
from hijacklens.probe import logits_at, probed
from hijacklens.prompts.layout import Layout
from hijacklens.prompts.tokens import encode
from hijacklens.scoring.execution import Execution
from hijacklens.scoring.hijack import hijack
from probes.attention import knock_out, redirect, rescale, transplant


def spans(names: dict[str, list[tuple[int, int]]], shape: tuple[int, int]) -> dict:
    masks = {name: torch.zeros(shape, dtype=torch.bool) for name in names}
    for name, places in names.items():
        for row, column in places:
            masks[name][row, column] = True
    return masks


PROBES = {
    "knock out": knock_out("last", "far"),
    "knock out after": knock_out("last", "far", when="after"),
    "redirect": redirect("last", "far", layers=1),
    "rescale": rescale(4, "last", "far", heads=[(0, 1), (1, 3)]),
}


@pytest.mark.parametrize("name", PROBES)
def test_prompts_that_share_tokens_in_one_row(pair, name):
    """A tree: two prompts share their first four tokens and part after them."""
    plain, model = pair
    trunk, left, right = [7, 8, 9, 10], [11, 12, 13], [14, 15]
    ids = torch.tensor([trunk + left + right])
    parent = [-1, 0, 1, 2, 3, 4, 5, 3, 7]
    seen = torch.eye(9, dtype=torch.bool)
    for i, above in enumerate(parent):
        if above >= 0:
            seen[i] |= seen[above]
    depth = seen.sum(1) - 1
    mask = torch.zeros(1, 1, 9, 9).masked_fill(~seen, torch.finfo(torch.float32).min)
    windowed = getattr(plain.config, "layer_types", None) is not None
    both = {"full_attention": mask, "sliding_attention": mask} if windowed else mask
    packed = Layout(ids, spans({"far": [(0, 1), (0, 2), (0, 4)], "last": [(0, 6), (0, 8)]}, (1, 9)))
    got = logits_at(
        model,
        packed,
        torch.tensor([0, 0]),
        torch.tensor([6, 8]),
        probes=[PROBES[name]],
        attention_mask=both,
        position_ids=depth[None],
    )
    for place, (branch, far) in enumerate(((left, [1, 2, 4]), (right, [1, 2]))):
        alone = torch.tensor([trunk + branch])
        shape = (1, alone.shape[1])
        last = shape[1] - 1
        layout = Layout(alone, spans({"far": [(0, i) for i in far], "last": [(0, last)]}, shape))
        at = (torch.tensor([0]), torch.tensor([last]))
        (expected,) = logits_at(model, layout, *at, probes=[PROBES[name]])
        (bare,) = logits_at(model, layout, *at)
        assert_close(got[place], expected, atol=1e-4, rtol=0)
        assert float((expected - bare).abs().max()) > 1e-2


@pytest.mark.parametrize("name", PROBES)
def test_keys_from_a_cache(pair, name):
    _, model = pair
    ids = torch.randint(5, 300, (2, 7), generator=torch.Generator().manual_seed(0))
    whole = spans({"far": [(0, 1), (1, 2), (1, 5)], "last": [(0, 6), (1, 6)]}, (2, 7))
    at = (torch.tensor([0, 1]), torch.tensor([6, 6]))
    expected = logits_at(model, Layout(ids, whole), *at, probes=[PROBES[name]])
    with torch.no_grad():
        _, cache = model(ids[:, :4], return_type="logits_and_cache", use_cache=True)
        layout = Layout(
            ids[:, 4:],
            {span: mask[:, 4:] for span, mask in whole.items()},
            ids[:, :4],
            {span: mask[:, :4] for span, mask in whole.items()},
        )
        with probed(model, [PROBES[name]], layout):
            got, _ = model(layout.tokens, return_type="logits_and_cache", past_key_values=cache)
    assert_close(got[:, -1], expected, atol=1e-4, rtol=0)


def run(model, ids, probes=(), masks=None):
    layout = Layout(torch.tensor(ids), masks or {})
    with torch.no_grad(), probed(model, list(probes), layout):
        return model.run_with_cache(layout.tokens)


class TestTransplant:
    ids = ([[7, 8, 9, 10, 11]], [[7, 20, 21, 10, 11]])

    def test_of_a_run_into_itself_changes_nothing(self, pair):
        _, model = pair
        logits, cache = run(model, self.ids[0])
        again, _ = run(model, self.ids[0], [transplant(cache)])
        assert_close(again, logits, atol=1e-5, rtol=0)

    def test_of_another_run(self, pair):
        _, model = pair
        _, cache = run(model, self.ids[0])
        bare, own = run(model, self.ids[1])
        probe = transplant(cache, source="at:-1", layers=[1], heads=[0, 2])
        masks = spans({"at:-1": [(0, 4)]}, (1, 5))
        logits, changed = run(model, self.ids[1], [probe], masks)
        new = own["pattern", 1].clone()
        new[:, [0, 2], -1] = cache["pattern", 1][:, [0, 2], -1]
        assert torch.equal(changed["pattern", 1], new)
        assert torch.equal(changed["pattern", 0], own["pattern", 0])
        assert float((logits - bare)[0, -1].abs().max()) > 1e-3
        assert torch.equal(logits[0, :-1], bare[0, :-1])

    def test_prompts_are_known_by_their_tokens(self, gpt2):
        """Of three prompts of a run, two are run in another order, each with its own attention."""
        rows = torch.randint(5, 300, (3, 5), generator=torch.Generator().manual_seed(0))
        _, cache = run(gpt2, rows.tolist())
        probe = transplant(cache, prompts=rows)
        backwards = rows.flip(0)[:2].tolist()
        expected, own = run(gpt2, backwards)
        logits, changed = run(gpt2, backwards, [probe])
        assert_close(changed["pattern", 0], own["pattern", 0], atol=1e-6, rtol=0)
        assert_close(logits, expected, atol=1e-5, rtol=0)
        swapped = transplant(cache, prompts=rows.flip(0))
        _, changed = run(gpt2, rows.tolist(), [swapped])
        assert torch.equal(changed["pattern", 1], cache["pattern", 1].flip(0))

    def test_own_attention_changes_no_score(self, gpt2):
        """The engine sorts prompts and cuts them into batches of two."""
        facts = FactSet(
            tuple(
                Fact(case_id=i, relation_id="", subject=subject, template="The {} is in",
                     target_true="Rome", target_false="Guam")
                for i, subject in enumerate(("z", "x", "cat", "a"))
            ),
            name="four",
        )  # fmt: skip
        prompts = encode(gpt2.tokenizer, [fact.prompt for fact in facts])
        targets = encode(
            gpt2.tokenizer, [f"{f.prompt} {t}" for f in facts for t in ("Rome", "Guam")]
        )
        length = len(prompts[0])
        assert {len(ids) for ids in prompts} == {length}
        assert {len(ids) for ids in targets} == {length + 1}
        _, cache = run(gpt2, prompts)
        probe = transplant(cache, prompts=prompts)
        for size in (2 * length, 1000):
            execution = Execution(store=False, batch_tokens=size)
            options: dict = {"doses": [0], "execution": execution, "quiet": True}
            bare = hijack(gpt2, facts, **options).items
            own = hijack(gpt2, facts, probes=[probe], **options).items
            pd.testing.assert_frame_equal(own, bare, atol=1e-4, rtol=0)
        half = {name: cache[name][:2] for name in cache.keys() if name.endswith("hook_pattern")}  # noqa: SIM118
        with pytest.raises(InputError, match="is not one of the 2 that transplant has"):
            hijack(gpt2, facts, probes=[transplant(half, prompts=prompts[:2])], **options)

    def test_more_contexts_than_a_block(self):
        task = ConceptTask(bits=4, length=12)
        model = OneLayerTransformer(OneLayerConfig(vocab=16, d_model=16, length=12))
        tokens = task.sample(2 * HOOKED_BLOCK, torch.Generator().manual_seed(1)).tokens
        _, cache = model.run_with_cache(tokens)
        probe = transplant(cache, prompts=tokens)
        got, expected = answers(model, task, probes=[probe])(tokens), answers(model, task)(tokens)
        assert_close(got, expected, atol=1e-5, rtol=0)

    def test_under_a_cache_of_keys_and_values(self, gpt2):
        (ids,), (other,) = self.ids
        _, cache = run(gpt2, [other])
        probe = transplant(cache, layers=1)
        expected = run(gpt2, [ids], [probe])[0]
        with torch.no_grad():
            _, kept = gpt2(torch.tensor([ids[:3]]), return_type="logits_and_cache", use_cache=True)
            layout = Layout(torch.tensor([ids[3:]]), {}, torch.tensor([ids[:3]]))
            with probed(gpt2, [probe], layout):
                got, _ = gpt2(layout.tokens, return_type="logits_and_cache", past_key_values=kept)
        assert_close(got, expected[:, 3:], atol=1e-4, rtol=0)

    def test_what_cannot_be_transplanted(self, gpt2):
        _, cache = run(gpt2, self.ids[0])
        with pytest.raises(InputError, match=r"prompts of 5 tokens .* of 3 with"):
            run(gpt2, [[7, 8, 9]], [transplant(cache)])
        some = {"blocks.1.attn.hook_pattern": cache["pattern", 1][0]}
        assert transplant(some).layers == (1,)
        with pytest.raises(InputError, match=r"no pattern of layer 0; it has layers \[1\]"):
            run(gpt2, self.ids[0], [transplant(some, heads=[(0, 1)])])
        with pytest.raises(InputError, match=r"no pattern .* run_with_cache"):
            transplant({"blocks.0.hook_resid_pre": torch.zeros(1, 5, 32)})
        two = {"blocks.1.attn.hook_pattern": cache["pattern", 1].repeat(2, 1, 1, 1)}
        (ids,), (other,) = self.ids
        with pytest.raises(InputError, match=r"of 2 prompts; say which prompt gets which: .*pro"):
            transplant(two)
        with pytest.raises(InputError, match=r"2 prompts of 5 tokens, and prompts are 1 of \[5\]"):
            transplant(two, prompts=[ids])
        with pytest.raises(InputError, match=r"prompts are 2 of \[4, 5\] tokens"):
            transplant(two, prompts=[ids, other[:4]])
        with pytest.raises(InputError, match="a prompt occurs twice"):
            transplant(two, prompts=[ids, ids])

    def test_the_key_tells_patterns_apart(self, gpt2):
        _, one = run(gpt2, self.ids[0])
        _, other = run(gpt2, self.ids[1])
        assert transplant(one).key == transplant(one).key != transplant(other).key
        assert transplant(one).key.startswith("transplant:cache=")
        assert transplant(one, prompts=self.ids[0]).key != transplant(one, prompts=self.ids[1]).key
        assert not transplant(one).packs


KEYS = {
    "knock-out:source=last,target=hijack": knock_out("last", "hijack"),
    "knock-out:source=last,target=hijack+subject,layers=8-11,when=after,renormalise=no": knock_out(
        "last", "hijack+subject", layers=range(8, 12), when="after", renormalise=False
    ),
    'knock-out:source=last,target="text:Rome, Italy",heads=8.3+9.1': knock_out(
        "last", "text:Rome, Italy", heads=[(9, 1), (8, 3)]
    ),
    "rescale:factor=2.0,source=last,target=hijack": rescale(2, "last", "hijack"),
    "rescale:factor=0.5,source=all,target=bos,layers=1,when=before": rescale(
        0.5, "all", "bos", layers=1, when="before"
    ),
    "redirect:source=last,target=cluster": redirect("last", "cluster"),
    "redirect:source=last,target=own,split=proportional": redirect(
        "last", "own", split="proportional"
    ),
}


@pytest.mark.parametrize("key", KEYS)
def test_keys_say_what_a_probe_does(key):
    assert KEYS[key].key == key
    assert KEYS[key].packs
    assert set(KEYS[key].spans) == {KEYS[key].source, KEYS[key].target}


def test_keys_of_spans_that_could_be_mistaken_for_one_another():
    texts = (
        "text:x",
        "text:x,target=text:y",
        '"x"',
        "text:x\n",
        "text:x\\n",
        "text:y,target=z",
        "z",
    )
    with unchecked():
        keys = {knock_out(a, b).key for a in texts for b in texts}
    assert len(keys) == len(texts) ** 2
    assert all(key.isprintable() for key in keys)


def test_layers_given_as_an_iterator_can_be_read_again(gpt2):
    probe = knock_out("all", "at:0", layers=iter([0, 1]))
    layout = Layout(torch.tensor([[7, 8, 9]]), spans({"at:0": [(0, 0)]}, (1, 3)))
    counts = [len(probe.hooks(gpt2, layout)) for _ in range(2)]
    assert counts == [6, 6]


WRONG = {
    "when": (lambda: knock_out("last", "hijack", when="during"), "unknown when 'during'"),
    "not renormalised before": (
        lambda: knock_out("last", "hijack", renormalise=False),
        'renormalise=False needs when="after"',
    ),
    "scores not renormalised": (
        lambda: rescale(2, "last", "hijack", when="before", renormalise=False),
        "renormalise=False needs",
    ),
    "negative factor": (
        lambda: rescale(-1, "last", "hijack"),
        "factor is -1; give a finite number of at least 0",
    ),
    "endless factor": (
        lambda: rescale(float("inf"), "last", "hijack", when="before"),
        "factor is inf; give a finite number",
    ),
    "split": (lambda: redirect("last", "hijack", split="equal"), "unknown split 'equal'"),
    "span": (lambda: knock_out("last", "at:first"), "cannot read the span 'at:first'"),
    "no span": (lambda: knock_out("", "hijack"), "cannot read the span ''"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_choices(name):
    make, message = WRONG[name]
    with unchecked(), pytest.raises(InputError, match=message):
        make()


def test_what_the_model_or_the_layout_lacks(gpt2):
    ids = torch.tensor([[7, 8, 9]])
    layout = Layout(ids, spans({"last": [(0, 2)]}, (1, 3)))
    with pytest.raises(InputError, match="layer 2 is not one of this model's; it has 2"):
        knock_out("last", "all", layers=2).hooks(gpt2, layout)
    with pytest.raises(InputError, match="head 4 is not one of this model's; it has 4"):
        knock_out("last", "all", heads=4).hooks(gpt2, layout)
    with pytest.raises(InputError, match=r"unknown span 'hijack'.*Allowed: all, last"):
        knock_out("last", "hijack").hooks(gpt2, layout)
    with pytest.raises(InputError, match="unknown span 'hijak'; did you mean 'hijack'"):
        knock_out("last", "hijak")
    with pytest.raises(InputError, match="unknown argument of knock_out 'layer'; did you mean 'l"):
        knock_out("last", "hijack", layer=3)
    with (
        pytest.raises(InputError, match=r"is \(1, 4, 4, 4\).* the layout says \(1, 4, 3, 3\)"),
        probed(gpt2, [knock_out("last", "all")], layout),
    ):
        gpt2(torch.tensor([[7, 8, 9, 10]]))


SHAPE = {"vocab_size": 400, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
DELEGATED = {
    "gpt_neo": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=400,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global"], 2]],
        )
    ),
    "gptj": lambda: GPTJForCausalLM(
        GPTJConfig(vocab_size=400, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
    ),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SHAPE, ffn_dim=64, word_embed_proj_dim=32)),
    "xglm": lambda: XGLMForCausalLM(
        XGLMConfig(vocab_size=400, d_model=32, ffn_dim=64, num_layers=2, attention_heads=4)
    ),
}
"""Families whose attention TransformerLens leaves to transformers."""


@pytest.mark.parametrize("family", DELEGATED)
def test_attention_that_transformers_computes_is_edited(family):
    plain = rough(DELEGATED[family]())
    model = load_model(copy.deepcopy(plain), tokenizer=tiny_tokenizer("gpt2"), device="cpu")
    ids, target, late = [7, 8, 9, 10, 11, 8, 12], 3, range(4, 7)
    masks = spans({"late": [(0, i) for i in late], "target": [(0, target)]}, (1, len(ids)))
    removed = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    removed[late.start :, target] = True
    others = torch.zeros_like(removed)
    others[late.start :] = True
    others[:, target] = False
    before = {name: list(point.fwd_hooks) for name, point in model.hook_dict.items()}
    for probe, hidden in (
        (knock_out("late", "target"), removed),
        (redirect("late", "target"), others),
    ):
        logits, cache = run(model, [ids], [probe], masks)
        assert_close(logits[0], everywhere_masked(plain, ids, hidden), atol=1e-5, rtol=0)
        assert (cache["pattern", 1][0, :, -1, target] == hidden[-1, 0]).all()
    with (
        pytest.raises(ZeroDivisionError),
        probed(model, [probe], Layout(torch.tensor([ids]), masks)),
    ):
        raise ZeroDivisionError
    with torch.no_grad():
        expected = plain(torch.tensor([ids])).logits
        assert_close(model(torch.tensor([ids])), expected, atol=1e-5, rtol=0)
    assert {name: list(point.fwd_hooks) for name, point in model.hook_dict.items()} == before


def test_a_hooked_transformer_of_transformer_lens_3():
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    with pytest.warns(DeprecationWarning):
        model = HookedTransformer(
            HookedTransformerConfig(
                n_layers=2, d_model=16, n_ctx=16, d_head=4, n_heads=4, d_vocab=50, seed=0,
                act_fn="gelu", n_key_value_heads=2, positional_embedding_type="rotary",
                init_weights=True, initializer_range=0.5,
            )
        )  # fmt: skip
    model.eval()
    masks = spans({"far": [(0, 1), (0, 2)], "last": [(0, 4)]}, (1, 5))
    _, bare = run(model, [[7, 8, 9, 10, 11]])
    for when in ("before", "after"):
        probe = knock_out("last", "far", heads=[(0, 3), (1, 0)], when=when)
        _, cache = run(model, [[7, 8, 9, 10, 11]], [probe], masks)
        expected = bare["pattern", 0].clone()
        expected[0, 3, 4, [1, 2]] = 0
        expected[0, 3, 4] /= expected[0, 3, 4].sum()
        assert_close(cache["pattern", 0], expected, atol=1e-6, rtol=0)
        assert float(cache["pattern", 1][0, 0, 4, [1, 2]].abs().max()) == 0.0
    everything = knock_out("all", "all")
    _, cache = run(model, [[7, 8, 9, 10, 11]], [everything], masks)
    assert float(cache["z", 1].abs().max()) == 0.0
