"""The pocket world: its record, its documents, its exact probabilities, its models."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hijacklens.errors import InputError
from hijacklens.facts.loading import load_facts
from hijacklens.facts.records import facts_from_records
from hijacklens.models.loading import load_model
from hijacklens.scoring.execution import Execution
from hijacklens.scoring.hijack import hijack
from hijacklens.world import training
from hijacklens.world.circuits import plant
from hijacklens.world.distribution import Documents, Reader
from hijacklens.world.trained import Recipe, load_world
from hijacklens.world.world import World

TINY = World(bits=2, subjects=6, beta=1, name_words=1, relations=1, wordings=1, length=12)
FAST = Recipe(layers=1, heads=2, d_model=8, steps=6, batch=4, checkpoints=2, state_steps=2)
SHORT = Execution(store=False)


worlds = st.builds(
    World,
    bits=st.just(2),
    subjects=st.integers(4, 7),
    name_words=st.integers(1, 3),
    relations=st.integers(1, 2),
    wordings=st.integers(1, 2),
    sharing=st.sampled_from([0.0, 0.3, 1.0]),
    contradictions=st.sampled_from([0.0, 0.2]),
    repetition=st.sampled_from([0.0, 0.3]),
    negation_topic=st.sampled_from([0.0, 0.5]),
    near_fraction=st.sampled_from([0.0, 0.2]),
    length=st.just(10),
)


@given(world=worlds, seed=st.integers(0, 5), knows=st.booleans())
@settings(max_examples=8, deadline=None)
def test_next_words_of_any_beginning_have_probabilities_that_sum_to_one(world, seed, knows):
    reader = Reader(world, knows=knows)
    document = Documents(world, seed=seed).batch(0, 1)[0]
    for end in range(0, world.length, 4):
        start = [int(token) for token in document[:end]]
        before = reader.document_log_probability(start)
        after = [reader.document_log_probability([*start, t]) for t in range(len(world.vocabulary))]
        assert np.exp(np.array(after) - before).sum() == pytest.approx(1)


@pytest.mark.parametrize("changes", [{}, {"sharing": 0.0, "repetition": 0.3, "zipf": 0.0}])
def test_samples_are_as_frequent_as_the_exact_probabilities_say(changes):
    world = replace(TINY, **changes)
    documents = Documents(world, seed=1).batch(0, 10_000)
    reader = Reader(world)
    for end in (1, 5, 10):
        found, counts = np.unique(documents[:, :end], axis=0, return_counts=True)
        exact = np.exp([reader.document_log_probability(row) for row in found]) * len(documents)
        common = exact > 30
        z = (counts - exact)[common] / np.sqrt(exact[common])
        assert np.abs(z).max() < 5
        assert (z**2).mean() < 1.7


def test_the_exact_posterior_of_a_hand_computable_world():
    world = World(bits=1, subjects=2, name_words=1, relations=1, wordings=1, beta=1 / np.log(3),
                  contradictions=0.2, near_fraction=0.0)  # fmt: skip
    true, false = world.objects[world.homes[0][0]], world.objects[1 - world.homes[0][0]]
    query = f"{world.names[0][0]} lives in"
    # Related objects have probability 3/4 and 1/4 by the topic; before the query both topics are
    # alike, and the name itself makes its true object the topic with probability 3/4.
    stated_false = 0.2 * (3 / 4 * 1 / 4 + 1 / 4 * 3 / 4)
    assert Reader(world).margin(query, true, false) == pytest.approx(
        np.log(stated_false / (1 - stated_false))
    )
    talk = f"People talk about {false} and {false}. "
    # The topic is now the false object with odds 9 to 1 for a reader without memory.
    shift = Reader(world, knows=False).margin(talk + query, true, false)
    assert shift == pytest.approx(np.log((9 * 3 / 4 + 1 / 4) / (9 * 1 / 4 + 3 / 4)))
    apart = Reader(replace(world, sharing=0.0), knows=False)
    assert apart.margin(talk + query, true, false) == pytest.approx(0)


def test_documents_depend_on_world_seed_and_number_alone():
    first = Documents(TINY, seed=3).batch(7, 5)
    assert (first == Documents(replace(TINY), seed=3).batch(7, 5)).all()
    assert (first != Documents(TINY, seed=3).batch(8, 5)).any()
    assert first.shape == (5, TINY.length)


def test_a_record_brings_its_world_back():
    world = World(sharing=0.5, bits=3, subjects=9)
    assert World.from_record(json.loads(json.dumps(world.record()))) == world


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: World(sharing=2), "sharing is 2.0; give a number between 0 and 1"),
        (lambda: World(bits=9), "bits is 9"),
        (lambda: World(subjects=31), "give at least 32"),
        (lambda: World(fact_fraction=0.99), "fractions of at most 1"),
        (lambda: World.from_record({"sharin": 1}), "did you mean 'sharing'"),
        (lambda: Recipe(heads=3), "give a multiple of 6"),
        (lambda: Recipe(family="gemma"), "unknown family 'gemma'"),
        (lambda: TINY.tokens("Paris"), "unknown word of this world 'Paris'"),
        (lambda: Reader(TINY).posterior("in in"), "no document of this world begins with 'in in'"),
        (lambda: load_world("nowhere"), "no finished pocket world"),
        (lambda: plant(World()), "name_words is 2"),
        (lambda: plant(replace(TINY, bits=6, subjects=64)), "Give more heads"),
    ],
)
def test_what_cannot_be_used_is_refused(make, message):
    with pytest.raises(InputError, match=None) as error:
        make()
    assert message in str(error.value)


@pytest.fixture(scope="module")
def pocket(tmp_path_factory):
    return training.train_world(TINY, FAST, out=tmp_path_factory.mktemp("w") / "p", quiet=True)


def test_a_trained_world_is_a_plain_folder_for_every_instrument(pocket):
    assert load_world(pocket.folder) == pocket
    assert list(pocket.checkpoints) == [3, 4, 6]
    assert pocket.scores["loss"] > pocket.scores["exact_loss"] > 0
    facts = load_facts(pocket.facts)
    assert len(facts) == 6
    for folder in pocket.checkpoints.values():
        model = load_model(folder)
    assert model.tokenizer("Bar lives in Baland.").input_ids == TINY.tokens("Bar lives in Baland.")
    schemes = ["do-not-think", "mention", "think", "near-word", "unrelated"]
    result = hijack(model, facts, schemes=schemes, doses=(0, 1), execution=SHORT, quiet=True)
    assert not len(result.skipped)
    assert "world.json" not in pocket.model.name


@pytest.mark.parametrize(("family", "mlps"), [("gpt2", False), ("llama", True), ("llama", False)])
def test_a_model_without_mlps_is_attention_alone(tmp_path, family, mlps):
    recipe = replace(FAST, family=family, mlps=mlps, steps=2, checkpoints=0)
    done = training.train_world(TINY, recipe, out=tmp_path, quiet=True)
    model = load_model(done.model)
    _, cache = model.run_with_cache("Bar lives in")
    assert bool(cache["blocks.0.hook_mlp_out"].any()) == mlps


def test_a_killed_training_resumes_and_ends_with_the_same_weights(pocket, tmp_path, monkeypatch):
    step = training.torch.nn.utils.clip_grad_norm_
    calls = []

    def killed(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(*arguments, **options)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", killed)
    with pytest.raises(KeyboardInterrupt):
        training.train_world(TINY, FAST, out=tmp_path, quiet=True)
    with pytest.raises(InputError, match="unfinished run of another command"):
        training.train_world(TINY, replace(FAST, seed=1), out=tmp_path, quiet=True)
    again = training.train_world(TINY, FAST, out=tmp_path, quiet=True)
    assert len(calls) == 4 + 4  # the state after two steps was kept
    assert again.losses == pocket.losses
    for step, folder in pocket.checkpoints.items():
        weights = (folder / "model.safetensors").read_bytes()
        assert (again.checkpoints[step] / "model.safetensors").read_bytes() == weights
    with pytest.raises(InputError, match="another pocket world"):
        training.train_world(replace(TINY, sharing=0), FAST, out=tmp_path, quiet=True)
    training.train_world(TINY, FAST, out=tmp_path, quiet=True)  # finished already
    assert len(calls) == 8


def test_a_planted_circuit_recalls_and_is_hijacked_by_its_mention_heads():
    world = World(bits=2, subjects=8, name_words=1, relations=1, wordings=1)
    planted = plant(world, layers=2, heads=3, mention=1, seed=1)
    assert planted.precision(planted.carriers) == planted.recalled(planted.carriers) == 1
    assert planted.precision([planted.recall]) == 0
    model = load_model(planted.model, tokenizer=planted.tokenizer, name="planted")
    facts = facts_from_records(list(world.queries()), name="planted")
    result = hijack(model, facts, schemes=["do-not-think"], doses=(0, 1), execution=SHORT,
                    quiet=True)  # fmt: skip
    rows = result.summary().set_index("dose")
    assert rows.retention[0].max() == 1
    assert rows.mean_shift[1].min() > 2


@pytest.mark.slow
def test_a_model_trained_for_long_on_a_tiny_world_comes_near_the_ideal_reader(tmp_path):
    world = World(bits=2, subjects=8, name_words=1, relations=1, wordings=1, length=24)
    recipe = Recipe(d_model=32, steps=2500, batch=32, checkpoints=0)
    done = training.train_world(world, recipe, out=tmp_path, quiet=True)
    assert done.scores["loss"] - done.scores["exact_loss"] < 0.02
    assert done.scores["recall"] == 1
