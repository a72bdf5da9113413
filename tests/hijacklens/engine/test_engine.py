"""Contract 1 for every sharing of prefixes: the numbers are those of plain forward passes."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_huggingface import PlainScorer
from planned import planned_reads
from sample_facts import sample_facts
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer
from transformers.models.llama.modeling_llama import LlamaAttention
from type_checks import unchecked

from hijacklens.engine import batch_size, engine
from hijacklens.engine.engine import next_token_logprobs, read
from hijacklens.engine.forward import Pass
from hijacklens.engine.packs import Pack, trunk
from hijacklens.engine.plan import Level, Plan, Unit
from hijacklens.engine.reading import ReadOptions
from hijacklens.engine.trie import Trie
from hijacklens.errors import InputError
from hijacklens.models.loading import load_model
from hijacklens.probe import HookProbe, logits_at
from hijacklens.prompts.layout import Layout, mark
from hijacklens.prompts.prefixes import prefix_of
from hijacklens.prompts.schemes import get_scheme
from hijacklens.scoring.execution import Execution
from hijacklens.scoring.hijack import hijack

SHARED = ("packed", "cached")
CPU_MESSAGE = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
SENTENCE = (11, 12, 13, 14, 15, 16)
QUERIES = [(21, 22, 23, 24), (21, 22, 25, 26, 27), (31, 32), (21, 22, 25, 28, 29, 30)]


@pytest.fixture(autouse=True)
def memory_is_never_clean():
    """Memory that is taken and not written holds NaN, so that code that reads it is noticed."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def prompts(doses=(0, 1, 3)):
    """Hijack prompts of several queries, with targets of one, two and three tokens.

    At dose 3 they are three times as long as the windows of the tiny Gemma models.
    """
    wanted = {}
    for dose in doses:
        for i, query in enumerate(QUERIES):
            prompt = SENTENCE * dose + query
            wanted[prompt] = {1, 2 + i}
            wanted[(*prompt, 40)] = {7}
            wanted[(*prompt, 41, 42)] = {8, 9}
    wanted[(99, 98)] = {5}  # shares nothing
    return wanted


def tiny_pair(family):
    """A tiny model, and a hooked copy of it."""
    plain = tiny_model(family)
    tokenizer = tiny_tokenizer(family)
    return plain, load_model(copy.deepcopy(plain), tokenizer=tokenizer, device="cpu")


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    return tiny_pair(request.param)


@pytest.fixture(scope="module")
def gemma3():
    plain = tiny_model("gemma3", seed=2)
    return plain, load_model(copy.deepcopy(plain), tokenizer=tiny_tokenizer("gemma3"), device="cpu")


@pytest.fixture(scope="module")
def gpt2():
    plain = tiny_model("gpt2", seed=1)
    return plain, load_model(copy.deepcopy(plain), tokenizer=tiny_tokenizer("gpt2"), device="cpu")


@cache
def plain_logprobs(plain, prefix):
    with torch.no_grad():
        return plain(torch.tensor([prefix])).logits[0, -1].double().log_softmax(-1).tolist()


@cache
def alone(model, symbols, probes, spans):
    """Log-probabilities after one prefix, in a separate forward pass."""
    layout = Layout.of_symbols(torch.tensor([symbols]), spans)
    place = torch.tensor([0]), torch.tensor([len(symbols) - 1])
    return logits_at(model, layout, *place, probes=probes)[0].double().log_softmax(-1).tolist()


def check(plain, readings, wanted, tolerance=1e-4):
    assert set(readings) == set(wanted)
    for prefix, tokens in wanted.items():
        expected = plain_logprobs(plain, prefix)
        reading = readings[prefix]
        assert set(reading.logprobs) == set(tokens)
        for token, value in reading.logprobs.items():
            assert value == pytest.approx(expected[token], abs=tolerance)
        assert reading.top_logprob == pytest.approx(max(expected), abs=tolerance)
        assert expected[reading.top_token] == pytest.approx(max(expected), abs=tolerance)


@pytest.mark.parametrize("sharing", ["plain", *SHARED])
def test_every_sharing_equals_plain_forward_passes(pair, sharing):
    plain, model = pair
    wanted = prompts()
    readings = read(model, wanted, ReadOptions(sharing=sharing))
    assert readings.accounting.sharing == sharing
    check(plain, readings, wanted)


@pytest.mark.parametrize("sharing", SHARED)
@pytest.mark.parametrize(("batch_tokens", "pack_tokens"), [(1, 1), (40, 9), (64, 64), (1000, 23)])
def test_any_size_of_packs_and_batches(gemma3, sharing, batch_tokens, pack_tokens):
    plain, model = gemma3
    wanted = prompts((0, 3))
    options = ReadOptions(sharing=sharing, batch_tokens=batch_tokens, pack_tokens=pack_tokens)
    readings = read(model, wanted, options)
    assert readings.accounting.sharing == sharing
    check(plain, readings, wanted)


def random_packs(trie, random, *, cached):
    """The trie cut at random, every pack with a past of any length that its leaves share."""
    packs, first = [], 0
    while first < len(trie.leaves):
        stop = random.randint(first + 1, min(first + 4, len(trie.leaves)))
        lengths = trie.lengths[first:stop]
        base = int(min(*trie.shared[first + 1 : stop], lengths[0] - 1, math.inf))
        past = random.choice([0, random.randint(0, base)]) if cached else 0
        tokens = int(lengths.sum() - trie.shared[first + 1 : stop].sum())
        packs.append(Pack(first, stop, past, tokens - past))
        first = stop
    return packs


words = st.lists(st.integers(0, 4), min_size=1, max_size=20).map(tuple)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.dictionaries(words, st.sets(st.integers(0, 255), max_size=3), min_size=1, max_size=9),
    st.randoms(use_true_random=False),
    st.integers(1, 80),
)
def test_random_trees_cut_at_random(gemma3, wanted, random, batch_tokens):
    """Any cuts, pasts of any length, and windows of 8 tokens."""
    plain, model = gemma3
    trie = Trie.of(map(prefix_of, wanted))
    leaves = Level(trie, random_packs(trie, random, cached=True))
    below = trunk(trie, leaves.packs)
    trunk_level = Level(below, random_packs(below, random, cached=False))
    plan = Plan("cached", "a test", [Unit(trunk_level if below.leaves else None, leaves)], 0, 0)
    assert planned_reads(plan) == sorted(wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "make_plan", lambda *args, **options: plan)
        readings = read(model, wanted, ReadOptions(batch_tokens=batch_tokens))
    assert readings.accounting.forward_tokens == plan.forward_tokens
    check(plain, readings, wanted)


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(words, st.sets(st.integers(0, 255), max_size=3), min_size=1, max_size=8))
def test_random_sets_of_prefixes(gpt2, wanted):
    plain, model = gpt2
    # Some requested prefixes continue others, so that rows have several reads.
    wanted |= {prefix[: len(prefix) // 2]: {3} for prefix in wanted if len(prefix) > 1}
    check(plain, read(model, wanted, ReadOptions(batch_tokens=30)), wanted)


def test_limit_on_reads_gives_the_same_numbers(gpt2, monkeypatch):
    plain, model = gpt2
    monkeypatch.setitem(batch_size.READ_VALUES, "cpu", 3 * model.cfg.d_vocab)
    check(plain, read(model, prompts()), prompts())


def test_next_token_logprobs_equal_plain(pair):
    plain, model = pair
    ids = SENTENCE + QUERIES[1]
    expected = torch.tensor(plain_logprobs(plain, ids), dtype=torch.float32)
    torch.testing.assert_close(next_token_logprobs(model, ids), expected, atol=1e-4, rtol=0)


@dataclass(frozen=True)
class Dim:
    """Attention to the hijack gets weaker, and the residual stream in it a constant."""

    key: str = "dim"
    spans: tuple[str, ...] = ("hijack", "last")
    packs: bool = True

    def hooks(self, model, layout):
        def pattern(value, hook):
            return value * (1 - 0.7 * layout.pairs("last", "hijack").float())

        def residual(value, hook):
            return value + 0.5 * layout.query("hijack")[:, :, None]

        return [
            ("blocks.0.attn.hook_pattern", pattern),
            ("blocks.1.attn.hook_pattern", pattern),
            ("blocks.0.hook_resid_post", residual),
        ]


def marked():
    """The prompts in symbols, and for one dose the last token of a prompt in another span."""
    found = {}
    for prefix, tokens in prompts().items():
        sentences = sum(prefix[i : i + 6] == SENTENCE for i in range(0, len(prefix), 6))
        hijack = range(6 * sentences)
        found[mark(prefix, [hijack, [len(prefix) - 1]])] = tokens
    return found


@pytest.mark.parametrize("sharing", ["plain", *SHARED])
def test_probes_act_on_shared_tokens_as_on_single_prompts(pair, sharing):
    _, model = pair
    wanted = marked()
    probe = Dim()
    options = ReadOptions(probes=[probe], spans=probe.spans, sharing=sharing, batch_tokens=200)
    readings = read(model, wanted, options)
    assert readings.accounting.sharing == sharing
    bare = read(model, wanted, ReadOptions(spans=probe.spans, sharing=sharing))
    moved = 0.0
    for symbols, tokens in wanted.items():
        expected = alone(model, symbols, (probe,), probe.spans)
        for token in tokens:
            value = readings[symbols].logprobs[token]
            assert value == pytest.approx(expected[token], abs=1e-4)
            moved = max(moved, abs(value - bare[symbols].logprobs[token]))
    assert moved > 0.1


def test_probes_that_do_not_pack_run_alone(gemma3):
    _, model = gemma3
    wanted = {(1, 2, 3): {4}, (1, 2): {5}, (6, 7, 8): {9}}
    first = HookProbe("first", (("blocks.0.hook_resid_pre", lambda value, hook: forget(value)),))

    def forget(value):
        value = value.clone()
        value[:, 0] = 0
        return value

    readings = read(model, wanted, ReadOptions(probes=[first], sharing="cached"))
    accounting = readings.accounting
    assert (accounting.sharing, accounting.why) == ("plain", "the probe first does not pack")
    assert accounting.forward_tokens == accounting.naive_tokens == 8
    for prefix, tokens in wanted.items():
        for token in tokens:
            expected = alone(model, prefix, (first,), ())[token]
            assert readings[prefix].logprobs[token] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("prompts", "shared"), [(4, False), (60, True)])
def test_few_prompts_with_probes_are_not_shared(gemma3, monkeypatch, prompts, shared):
    """To test whether sharing is right would cost more than sharing saves."""
    _, model = gemma3
    tested = []
    real = engine.disagreement
    monkeypatch.setattr(
        engine, "disagreement", lambda *args, **options: tested.append(1) or real(*args, **options)
    )
    half = HookProbe(
        "half", (("blocks.0.hook_mlp_out", lambda value, hook: value / 2),), packs=True
    )
    wanted = {(*SENTENCE, *SENTENCE, 21 + i, 1): {2} for i in range(prompts)}
    readings = read(model, wanted, ReadOptions(probes=[half]))
    assert (readings.accounting.sharing != "plain") == shared == bool(tested)
    for prefix in [*wanted][:2]:
        expected = alone(model, prefix, (half,), ())
        assert readings[prefix].logprobs[2] == pytest.approx(expected[2], abs=1e-4)
    read(model, wanted, ReadOptions(probes=[half], sharing="packed"))
    assert len(tested) == 1 + shared


@pytest.mark.parametrize("sharing", SHARED)
def test_a_probe_that_is_wrong_on_packs_is_noticed(gemma3, sharing):
    """It claims to pack, but uses positions in the row."""
    _, model = gemma3
    ramp = HookProbe(
        "ramp",
        [
            (
                "blocks.0.hook_mlp_out",
                lambda value, hook: value * torch.arange(value.shape[1])[:, None],
            )
        ],
        packs=True,
    )
    readings = read(model, prompts(), ReadOptions(probes=[ramp], sharing=sharing))
    assert readings.accounting.sharing == "plain"
    assert "packed and plain prompts gave different numbers" in readings.accounting.why
    half = HookProbe(
        "half", (("blocks.0.hook_mlp_out", lambda value, hook: value / 2),), packs=True
    )
    readings = read(model, prompts(), ReadOptions(probes=[half], sharing=sharing))
    assert readings.accounting.sharing == sharing
    prefix = SENTENCE * 3 + QUERIES[1]
    expected = alone(model, prefix, (half,), ())
    assert readings[prefix].logprobs[3] == pytest.approx(expected[3], abs=1e-4)


@pytest.mark.parametrize("sharing", ["plain", *SHARED])
def test_a_run_continues_when_memory_runs_out(gemma3, monkeypatch, sharing):
    plain, model = gemma3
    cuda, cpu = torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(CPU_MESSAGE)
    error = cuda if sharing == "packed" else cpu
    wanted = prompts()
    real = Pass.logits

    def tight(self, batch, pool=None, *, keep=False):
        if int(batch.real.sum()) > 30:
            raise error
        return real(self, batch, pool, keep=keep)

    monkeypatch.setattr(Pass, "logits", tight)
    fractions = []
    readings = read(
        model,
        wanted,
        ReadOptions(sharing=sharing),
        lambda readings, fraction: fractions.append(fraction),
    )
    assert readings.accounting.sharing == sharing
    assert readings.accounting.shrunk > 0 and readings.accounting.batch_tokens < 100
    assert sum(fractions) == pytest.approx(1)
    check(plain, readings, wanted)


def test_a_prompt_that_does_not_fit_and_other_errors(gemma3, monkeypatch):
    _, model = gemma3

    def broken(error):
        def logits(self, batch, pool=None, *, keep=False):
            raise error

        monkeypatch.setattr(Pass, "logits", logits)

    broken(torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(InputError, match="not enough memory for a single prompt of 2 tokens"):
        read(model, {(1, 2): {3}})
    broken(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        read(model, prompts())


def test_items_are_the_same_with_every_sharing(pair):
    """From facts to scores, against plain forward passes of single prompts."""
    plain, model = pair
    facts = sample_facts()
    options = {"doses": [0, 1, 3], "quiet": True}
    results = {
        sharing: hijack(model, facts, execution=Execution(sharing=sharing, store=False), **options)
        for sharing in ("plain", *SHARED)
    }
    scorer = PlainScorer(plain, model.tokenizer)
    by_case = {fact.case_id: fact for fact in facts}
    scheme = get_scheme("do-not-think")
    expected = {}
    for item in results["plain"].items.to_dict("records"):
        fact = by_case[item["case_id"]]
        prompt = " ".join([scheme.sentence(fact)] * item["dose"] + [fact.prompt])
        for side, target in (("true", fact.target_true), ("false", fact.target_false)):
            expected[item["case_id"], item["dose"], side] = sum(scorer.scores(prompt, target))
    for sharing, result in results.items():
        (settings,) = result.settings.models
        engine_record = settings.engine.record()
        assert engine_record["sharing"] == sharing
        assert engine_record["naive_tokens"] >= engine_record["forward_tokens"] > 0
        assert engine_record["trie_tokens"] <= engine_record["forward_tokens"]
        assert engine_record["peak_memory"] > 0 and engine_record["seconds"] > 0
        for item in result.items.to_dict("records"):
            for side in ("true", "false"):
                whole = expected[item["case_id"], item["dose"], side]
                tolerance = 1e-4 * item[f"n_tokens_{side}"]
                assert item[f"sum_{side}"] == pytest.approx(whole, abs=tolerance)


@pytest.mark.parametrize("sharing", ["plain", *SHARED])
def test_bfloat16_rounds_and_does_no_more(sharing):
    plain = tiny_model("gemma3", seed=2)
    tokenizer = tiny_tokenizer("gemma3")
    model = load_model(copy.deepcopy(plain), tokenizer=tokenizer, dtype="bfloat16", device="cpu")
    wanted = prompts((0, 3))
    readings = read(model, wanted, ReadOptions(sharing=sharing))
    assert readings.accounting.sharing == sharing
    check(plain, readings, wanted, tolerance=0.25)


def test_progress_sums_to_one(gpt2):
    _, model = gpt2
    fractions, kept = [], {}
    wanted = {(1, 2): {1}, (1,): {2}, (3, 4, 5): {2}}

    def finished(readings, fraction):
        kept.update(readings)
        fractions.append(fraction)

    found = read(model, wanted, ReadOptions(sharing="plain", batch_tokens=1), finished)
    assert fractions == pytest.approx([3 / 5, 2 / 5])
    assert kept == found


def test_only_read_positions_are_unembedded(gpt2, monkeypatch):
    _, model = gpt2
    shapes = []
    unembedding = model.unembed.original_component
    real, note = unembedding.forward, shapes.append

    def seen(x):
        note(real(x).shape)
        return real(x)

    wanted = {tuple(range(50)): {1}, tuple(range(60, 100)): {1}, (*range(40), 7, 8): {2}}
    sharings = ("plain", "packed", "cached")
    # Not by a hook: with one on it, the model would be run without sharing.
    monkeypatch.setattr(unembedding, "forward", seen)
    for sharing in sharings:  # the first run checks the changed model, and tries a few prompts
        read(model, wanted, ReadOptions(sharing=sharing))
    shapes.clear()
    for sharing in sharings:
        accounting = read(model, wanted, ReadOptions(sharing=sharing)).accounting
        assert accounting.sharing == sharing
    reads = [shape[1] for shape in shapes if shape[1]]
    assert sum(reads) == 9 and all(shape[::2] == (1, model.cfg.d_vocab) for shape in shapes)


@pytest.mark.parametrize("place", ["hook point", "module"])
def test_a_hook_on_the_last_position_acts_on_no_padding(place):
    """Put on after loading, it makes every prefix run with others of its length only."""
    plain, model = tiny_pair("llama")

    def steer(value):
        return torch.cat([value[:, :-1], value[:, -1:] + torch.linspace(-2, 2, 32)], dim=1)

    for tree in (plain, model.original_model) if place == "module" else (plain,):
        tree.model.layers[1].mlp.register_forward_hook(lambda module, x, out: steer(out))
    if place == "hook point":
        model.blocks[1].mlp.hook_out.add_hook(lambda value, hook: steer(value))
    check(plain, read(model, prompts()), prompts())


def test_a_module_that_is_exchanged_after_a_run_is_noticed():
    """The check of the load and the test of packs are of another computation."""
    plain, model = tiny_pair("llama")
    read(model, prompts())
    for tree in (plain, model.original_model):
        for part in tree.modules():
            if type(part) is LlamaAttention:
                part.__class__ = Windowed
    readings = read(model, prompts())
    check(plain, readings, prompts())
    assert readings.accounting.sharing == "plain"


class Windowed(LlamaAttention):
    """Attention to the last five tokens, whatever the mask."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **options):
        at = torch.arange(hidden_states.shape[1])
        seen = (at[:, None] >= at) & (at[:, None] - at < 5)
        mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[None, None]
        return super().forward(hidden_states, position_embeddings, attention_mask=mask, **options)


def test_no_hook_or_gradient_remains(gpt2):
    plain, model = gpt2
    read(model, {(1, 2): {1}})
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    want = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        own = name.replace("._original_component", "")
        if own in want:
            assert torch.equal(parameter, want[own])


def test_hooks_that_are_on_the_model_act(gpt2):
    _, model = gpt2
    wanted = {(1, 2): {1}}
    bare = read(model, wanted)[1, 2].logprobs[1]
    hook = ("blocks.0.hook_mlp_out", lambda value, hook: value * 0)
    with model.hooks(fwd_hooks=[hook]):
        ablated = read(model, wanted, ReadOptions(sharing="packed"))
    assert abs(ablated[1, 2].logprobs[1] - bare) > 1e-3
    # They may go by positions in a row.
    assert (ablated.accounting.sharing, ablated.accounting.why) == (
        "plain",
        "hooks that are not probes are on it",
    )
    assert read(model, wanted)[1, 2].logprobs[1] == bare


def test_nothing_to_read(gpt2):
    readings = read(gpt2[1], {})
    assert len(readings) == 0
    assert (readings.accounting.sharing, readings.accounting.passes) == ("none", 0)
    assert readings.accounting.why == "nothing was requested"


def test_bad_input(gpt2):
    _, model = gpt2
    with pytest.raises(InputError, match="empty prefix"):
        read(model, {(): {1}})
    with pytest.raises(InputError, match="batch size must be at least 1 token, not -5"):
        read(model, {(1,): {1}}, ReadOptions(batch_tokens=-5))
    with pytest.raises(InputError, match="pack size must be at least 1 token, not 0"):
        read(model, {(1,): {1}}, ReadOptions(pack_tokens=0))
    with unchecked(), pytest.raises(InputError, match=r"unknown sharing 'fast'.*cached.*plain"):
        read(model, {(1,): {1}}, ReadOptions(sharing="fast"))
    model.train()
    try:
        with pytest.raises(InputError, match="scoring needs a model in evaluation mode"):
            read(model, {(1,): {1}})
    finally:
        model.eval()
