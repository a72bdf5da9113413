"""Probes of several kinds together: in their order, and nothing of them stays."""

from __future__ import annotations

import copy

import pytest
import torch
from masked_huggingface import HIDDEN, added
from model_state import hooks_on, left_as_it_was
from sample_facts import sample_facts
from tiny_models import tiny_model, tiny_tokenizer
from torch.testing import assert_close

from hijacklens.engine import engine
from hijacklens.engine.reading import ReadOptions
from hijacklens.models.loading import load_model
from hijacklens.probe import HookProbe, logits_at, probed
from hijacklens.prompts.layout import Layout
from hijacklens.scoring.execution import Execution
from hijacklens.scoring.hijack import hijack
from probes import attention, values
from probes.ablation import ablate

IDS = torch.tensor([[5, 9, 300, 42, 7, 8]])
MASKS = {name: torch.zeros(1, 6, dtype=torch.bool) for name in ("far", "last")}
MASKS["far"][0, 1:3] = True
MASKS["last"][0, 5] = True
LAYOUT = Layout(IDS, MASKS)


@pytest.fixture(scope="module", params=["gpt2", "llama", "gemma3"])
def pair(request):
    plain = tiny_model(request.param)
    plain.set_attn_implementation("eager")
    tokenizer = tiny_tokenizer(request.param)
    return plain, load_model(copy.deepcopy(plain), tokenizer=tokenizer, device="cpu")


def edited(plain, *, zero_value: tuple[int, int], ablated: tuple[int, int]):
    """A copy with W_V and b_V of a key/value head, and the rows of W_O of a head, set to zero."""
    new = copy.deepcopy(plain)
    with torch.no_grad():
        if plain.config.model_type == "gpt2":
            layer, head = zero_value
            start = 2 * 32 + 8 * head
            new.transformer.h[layer].attn.c_attn.weight[:, start : start + 8] = 0
            new.transformer.h[layer].attn.c_attn.bias[start : start + 8] = 0
            layer, head = ablated
            new.transformer.h[layer].attn.c_proj.weight[8 * head : 8 * head + 8] = 0
        else:
            width = new.model.layers[0].self_attn.head_dim
            layer, head = zero_value
            new.model.layers[layer].self_attn.v_proj.weight[width * head : width * (head + 1)] = 0
            layer, head = ablated
            out = new.model.layers[layer].self_attn.o_proj.weight
            out[:, width * head : width * (head + 1)] = 0
    return new


def test_three_kinds_of_probes_equal_a_plain_model_edited_in_three_ways(pair):
    plain, model = pair
    bias = torch.zeros(4, 6, 6)
    bias[2, 5, 1:3] = HIDDEN
    new = edited(plain, zero_value=(0, 1), ablated=(1, 3))
    expected = added(new, IDS[0].tolist(), {1: bias})
    probes = [
        attention.knock_out("last", "far", heads=[(1, 2)]),
        values.replace(values.zero(), heads=[(0, 1)], keep_bias=False),
        ablate(heads=[(1, 3)]),
    ]
    row, position = torch.zeros(6, dtype=torch.long), torch.arange(6)
    got = logits_at(model, LAYOUT, row, position, probes=probes)
    assert_close(got, expected, atol=1e-4, rtol=0)
    others = logits_at(model, LAYOUT, row, position, probes=probes[::-1])
    assert_close(others, got, atol=1e-5, rtol=0)
    for left_out in range(3):
        fewer = [probe for i, probe in enumerate(probes) if i != left_out]
        less = logits_at(model, LAYOUT, row, position, probes=fewer)
        assert float((less - expected).abs().max()) > 1e-3


def last_row(model, probes, layer=1, head=0) -> torch.Tensor:
    with torch.no_grad(), probed(model, probes, LAYOUT):
        _, cache = model.run_with_cache(IDS)
    return cache["pattern", layer][0, head, -1]


def test_the_order_of_probes_is_the_order_they_are_listed_in(pair):
    _, model = pair
    put = attention.redirect("last", "far", layers=1)
    double = attention.rescale(3, "last", "token:9", layers=1)
    even = torch.tensor([0, 0.5, 0.5, 0, 0, 0])
    assert_close(last_row(model, [double, put]), even)
    assert_close(last_row(model, [put, double]), torch.tensor([0, 0.75, 0.25, 0, 0, 0]))
    blind = attention.knock_out("last", "token:9", layers=1)
    for probes in ([put, blind], [blind, put]):
        assert_close(last_row(model, probes), torch.tensor([0, 0, 1.0, 0, 0, 0]))

    def wipe(pattern, hook):
        return torch.zeros_like(pattern)

    own = HookProbe("own", [("blocks.1.attn.hook_pattern", wipe)])
    assert float(last_row(model, [put, own]).abs().max()) == 0.0
    assert_close(last_row(model, [own, put]), even)


ALL_KINDS = [
    attention.knock_out("last", "hijack"),
    attention.rescale(2, "query", "subject", when="before"),
    attention.redirect("last", "subject", layers=[1]),
    values.replace(values.low_rank(2), layers=[0]),
    values.replace_circuit(values.random(seed=0), heads=[(1, 2)]),
    ablate(heads=[(0, 1)], span="last"),
]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_a_run_leaves_the_model_as_it_was(pair, error):
    _, model = pair

    def fail(value, hook):
        if error is not None:
            raise error("stop")

    probes = [*ALL_KINDS, HookProbe("fail", [("blocks.1.hook_mlp_out", fail)], packs=True)]
    facts = sample_facts()[:2]
    with left_as_it_was(model, IDS):
        if error is not None:
            with pytest.raises(error, match="stop"):
                hijack(model, facts, doses=[1], probes=probes, quiet=True)
            return
        result = hijack(model, facts, doses=[1], probes=probes, quiet=True)
    assert result.settings.probes == tuple(probe.key for probe in probes)
    bare = hijack(model, facts, doses=[1], quiet=True).items
    assert float((result.items["first_true"] - bare["first_true"]).abs().max()) > 1e-3


def test_a_run_that_stops_between_batches_leaves_nothing(pair):
    _, model = pair
    with torch.no_grad():  # the first run puts on hooks of transformers and TransformerLens
        model(IDS)
    count = hooks_on(model)
    done: list[float] = []

    def finished(readings: object, fraction: float) -> None:
        done.append(fraction)
        raise KeyboardInterrupt

    wanted = {(5, 9, 8): {7}, (5, 9, 300, 42): {7}}
    options = ReadOptions(probes=[ablate(heads=0)], batch_tokens=1)
    with pytest.raises(KeyboardInterrupt):
        engine.read(model, wanted, options, finished)
    assert len(done) == 1
    assert hooks_on(model) == count


def test_probes_of_all_kinds_do_not_depend_on_the_batch(pair):
    _, model = pair
    facts = sample_facts()[3:5]
    runs = [
        hijack(
            model,
            facts,
            doses=[1],
            probes=ALL_KINDS,
            execution=Execution(batch_tokens=size),
            quiet=True,
        ).items
        for size in (60, 10_000)
    ]
    columns = ["first_true", "first_false", "sum_true", "sum_false", "top_logprob"]
    assert float((runs[0][columns] - runs[1][columns]).abs().to_numpy().max()) < 1e-4
