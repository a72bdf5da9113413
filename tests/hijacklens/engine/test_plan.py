"""Plans: plain, packed and cached, their units and counts, and the command that prints them."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import planned_reads
from sample_facts import sample_facts
from tiny_models import tiny_tokenizer
from type_checks import unchecked

from analyses.commands.group import group
from hijacklens.engine import plan as plans
from hijacklens.engine.packs import Costs, Limits
from hijacklens.engine.trie import Trie
from hijacklens.errors import InputError
from hijacklens.prompts.prefixes import prefix_of
from hijacklens.scoring.forecast import forecast

FREE = Costs(pair=0.0, past=0.0, row=0.0, forward_pass=0.0)
SMALL = Costs(pair=0.05, past=0.01, row=0.1, forward_pass=0.0)
"""Attention is dear, so that packs are small and trunks pay."""
SENTENCE = (1, 2, 3, 4, 5, 6)
PROMPTS = [SENTENCE * dose + (7, query, 9) for dose in range(4) for query in range(10, 30)]
DISTINCT = 3 * len(SENTENCE) + 4 * (1 + 20 * 2)


def make_plan(prefixes, *arguments, **options):
    return plans.make_plan(Trie.of(map(prefix_of, prefixes)), *arguments, **options)


words = st.lists(st.integers(0, 2), min_size=1, max_size=10).map(tuple)


@pytest.mark.parametrize("sharing", ["plain", "packed", "cached"])
def test_what_a_plan_counts(sharing):
    plan = make_plan(PROMPTS, SMALL, sharing=sharing)
    assert (plan.sharing, plan.why) == (sharing, "it was requested")
    assert plan.naive_tokens == sum(map(len, PROMPTS)) == 960
    assert plan.trie_tokens == DISTINCT == 182
    assert planned_reads(plan) == sorted(PROMPTS)
    if sharing == "plain":
        assert plan.forward_tokens == plan.naive_tokens
    elif sharing == "packed":
        assert DISTINCT < plan.forward_tokens < plan.naive_tokens / 2
    else:
        assert plan.units[0].trunk is not None
        assert DISTINCT <= plan.forward_tokens < 1.05 * DISTINCT


def test_the_cheapest_sharing_is_taken():
    assert make_plan(PROMPTS, SMALL).sharing == "cached"
    assert make_plan(PROMPTS, SMALL).why == "it costs least"
    assert make_plan(PROMPTS[:40], FREE).sharing == "packed"  # one pack: nothing to gain
    assert make_plan([(1, 2), (3, 4)], FREE).sharing == "plain"
    slow = Costs(pair=0.0, past=0.0, row=0.0, forward_pass=300.0)
    assert make_plan(PROMPTS, slow, Limits(pack_tokens=30)).sharing == "packed"


def test_trunks_are_no_longer_than_allowed():
    whole = make_plan(PROMPTS, SMALL, sharing="cached")
    parts = make_plan(PROMPTS, SMALL, Limits(trunk_tokens=12), sharing="cached")
    assert len(whole.units) == 1 < len(parts.units)
    for unit in parts.units:
        longest = max((pack.past for pack in unit.leaves.packs), default=0)
        assert unit.trunk is None or unit.trunk.trie.nodes <= max(12, longest)
    assert planned_reads(parts) == sorted(PROMPTS)
    assert parts.forward_tokens > whole.forward_tokens


@settings(max_examples=60)
@given(
    st.sets(words, min_size=1, max_size=25),
    st.sampled_from(["plain", "packed", "cached", "auto"]),
    st.integers(1, 40),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(0, 3),
)
def test_every_prefix_is_read_once(prefixes, sharing, batch, pack, trunk, reads):
    plan = make_plan(
        prefixes,
        SMALL,
        Limits(batch_tokens=batch, pack_tokens=pack, trunk_tokens=trunk, pack_reads=reads),
        sharing=sharing,
    )
    assert planned_reads(plan) == sorted(prefixes)
    assert plan.trie_tokens <= plan.forward_tokens
    for unit in plan.units:
        for level in unit.levels:
            several = [one for one in level.packs if one.stop - one.first > 1]
            assert all(one.computed <= min(batch, pack) for one in several)


def test_prefixes_by_themselves():
    plan = plans.separate_plan(map(prefix_of, [(1, 2), (1,), (1, 2)]), why="a test")
    assert [pack.computed for pack in plan.units[0].leaves.packs] == [1, 2]
    assert (plan.sharing, plan.why, plan.forward_tokens, plan.trie_tokens) == (
        "plain",
        "a test",
        3,
        2,
    )


def test_a_forecast_counts_prompts_as_a_run_does():
    tokenizer = tiny_tokenizer("gpt2")
    found = forecast(tokenizer, sample_facts(), schemes=["do-not-think", "relation"], doses=[1, 2])
    # Three doses, as 0 always belongs to them.
    assert found.prompts + 3 * found.skipped == 2 * 3 * len(sample_facts())
    assert found.plan.trie_tokens <= found.plan.forward_tokens < found.naive_tokens
    alone = forecast(tokenizer, sample_facts(), doses=[0], sharing="plain")
    assert alone.plan.forward_tokens == alone.naive_tokens


def test_unknown_sharings_are_refused():
    with unchecked(), pytest.raises(InputError, match="unknown sharing 'fast'"):
        make_plan([(1,)], FREE, sharing="fast")


def test_the_command(tmp_path):
    tiny_tokenizer("llama").save_pretrained(tmp_path)
    arguments = ["plan", "--tokenizer", str(tmp_path), "--limit", "20", "--doses", "0-2"]
    done = CliRunner().invoke(group, arguments)
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0].startswith("atlas") and "do-not-think · doses 0-2" in lines[0]
    assert lines[1].split() == ["prompts", "60"]
    assert [line.split("  ")[0] for line in lines[1:5]] == [
        "prompts",
        "naive tokens",
        "planned forward tokens",
        "trie bound",
    ]


def test_a_folder_without_a_tokenizer(tmp_path):
    done = CliRunner().invoke(group, ["plan", "--tokenizer", str(tmp_path)])
    assert isinstance(done.exception, InputError)
    assert "no tokenizer can be read there" in str(done.exception)


@pytest.mark.slow
def test_the_whole_of_counterfact(shared):
    from transformers import AutoTokenizer

    from hijacklens.facts.loading import counterfact

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    found = forecast(tokenizer, counterfact(shared / "counterfact" / "counterfact_21919.parquet"))
    assert (found.prompts, found.naive_tokens) == (131_514, 2_975_539)
    assert found.plan.trie_tokens == 904_726
    assert found.plan.forward_tokens <= 950_000
