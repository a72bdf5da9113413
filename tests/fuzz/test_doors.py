"""Fuzz: wrong Python types at the doors; what counts as a number (NumPy's too) has to work."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from campaign import campaign, holds
from hostile import words
from hypothesis import given
from hypothesis import strategies as st
from sample_facts import sample_facts
from tiny_models import tiny_model, tiny_tokenizer

import hijacklens as hl
from hijacklens.prompts.schemes import Scheme, get_scheme
from hijacklens.prompts.spans import atoms
from probes import attention, heads, logit_lens, logit_shift, values
from probes.specification import parse

ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    3,
    10**30,
    2.5,
    float("nan"),
    float("inf"),
    1j,
    Fraction(3, 2),
    "",
    "relation",
    "0-5",
    b"bytes",
    (),
    [],
    [1, 1],
    [None],
    ["do-not-think", "do-not-think"],
    [["nested"]],
    {},
    {"a": 1},
    {1, 2},
    range(3),
    range(0),
    np.int64(2),
    np.array([1, 2]),
    np.float32(0.5),
    torch.tensor(2),
    torch.tensor([1.0, 2.0]),
    object(),
    int,
    print,
    Path("nowhere"),
)
ANYTHING = st.sampled_from(ODD)


@pytest.fixture(scope="module")
def model():
    return hl.load_model(tiny_model("gpt2"), tokenizer=tiny_tokenizer("gpt2"))


FACTS = sample_facts().where(case_ids=[0, 3])
TASK = hl.ConceptTask(bits=3, length=8)


def doors(model: Any, x: Any, folder: Path) -> dict[str, Any]:
    """Every public door with something odd as one of its arguments."""
    few: dict[str, Any] = {
        "doses": [1],
        "quiet": True,
        "execution": hl.Execution(store=False),
    }
    quick: dict[str, Any] = {"d_model": 4, "seeds": 1, "steps": 1, "batch": 2, "evaluation": 2}
    quick |= {"learning_rates": (0.1,), "quiet": True}

    def score(**changes: Any) -> Any:
        return hl.hijack(model, FACTS, **{**few, **changes})

    def train(**changes: Any) -> Any:
        return hl.train(TASK, **{**quick, **changes})

    return {
        "where relation": lambda: FACTS.where(relation=x),
        "where case_ids": lambda: FACTS.where(case_ids=x),
        "sample": lambda: FACTS.sample(x),
        "sample seed": lambda: FACTS.sample(1, seed=x),
        "limit": lambda: FACTS.limit(x),
        "counterfact": lambda: x is None or hl.counterfact(x),
        "Fact": lambda: hl.Fact(
            case_id=x,
            relation_id="P1",
            subject="a",
            template="{} b",
            target_true="c",
            target_false="d",
        ),
        "Fact subject": lambda: hl.Fact(
            case_id=1, relation_id=x, subject=x, template="{} b", target_true="c", target_false=x
        ),
        "FactSet": lambda: hl.FactSet(x, name="odd"),
        "add_scheme": lambda: Scheme(name=x, template=x),
        "Scheme template": lambda: Scheme(name="odd", template=x),
        "Scheme templates": lambda: Scheme(name="odd", templates=x),
        "Scheme direction": lambda: Scheme(name="odd", template="x.", direction=x),
        "get_scheme": lambda: get_scheme(x),
        "atoms": lambda: atoms(x),
        "parse": lambda: parse(x),
        "load_model": lambda: hl.load_model(x),
        "load_model dtype": lambda: hl.load_model("nowhere/nowhere", dtype=x),
        "load_model device": lambda: hl.load_model("nowhere/nowhere", device=x),
        "load_model devices": lambda: hl.load_model("nowhere/nowhere", devices=x),
        "load_model revision": lambda: hl.load_model("nowhere/nowhere", revision=x),
        "load_result": lambda: hl.load_result(x),
        "hijack model": lambda: hl.hijack(x, FACTS, **few),
        "hijack facts": lambda: hl.hijack(model, x, **few),
        "hijack schemes": lambda: score(schemes=x),
        "hijack doses": lambda: score(doses=x),
        "hijack probes": lambda: score(probes=x),
        "hijack seed": lambda: score(seed=x, schemes="do-not-think-other"),
        "hijack batch_tokens": lambda: score(execution=hl.Execution(store=False, batch_tokens=x)),
        "hijack sharing": lambda: score(execution=hl.Execution(store=False, sharing=x)),
        "hijack execution": lambda: score(execution=x),
        "hijack engine": lambda: score(execution=hl.Execution(store=False, engine=x)),
        "hijack store": lambda: (
            isinstance(x, (str, Path)) or score(execution=hl.Execution(store=x))
        ),
        "summary rule": lambda: score().summary(rule=x),
        "summary relation": lambda: score().summary(relation=x),
        "answer": lambda: hl.answer(model, x, tokens=1),
        "answer targets": lambda: hl.answer(model, "Rome is", targets=x, tokens=1),
        "answer top": lambda: hl.answer(model, "Rome is", top=x, tokens=1),
        "answer tokens": lambda: hl.answer(model, "Rome is", tokens=x),
        "ConceptTask bits": lambda: hl.ConceptTask(bits=x),
        "ConceptTask omega": lambda: hl.ConceptTask(bits=3, omega=x),
        "ConceptTask beta": lambda: hl.ConceptTask(bits=3, beta=x),
        "ConceptTask length": lambda: hl.ConceptTask(bits=3, length=x),
        # A rule of the user's own that raises keeps its traceback.
        "ConceptTask support": lambda: callable(x) or hl.ConceptTask(bits=3, support=x),
        "train task": lambda: hl.train(x, **quick),
        **{
            f"train {name}": lambda name=name: train(**{name: x})
            for name in words(
                "d_model d_attn seeds batch learning_rates freeze value_init init_scale "
                "weight_decay evaluation dtype device checkpoint_seconds"
            )
        },
        "train steps": lambda: str(x) == str(10**30) or train(steps=x),
        "knock_out source": lambda: attention.knock_out(source=x, target="hijack"),
        "knock_out target": lambda: attention.knock_out(source="last", target=x),
        "knock_out layers": lambda: score(
            probes=[attention.knock_out(source="last", target="query", layers=x)]
        ),
        "knock_out heads": lambda: score(
            probes=[attention.knock_out(source="last", target="query", heads=x)]
        ),
        "rescale factor": lambda: attention.rescale(source="last", target="query", factor=x),
        "values low_rank": lambda: values.low_rank(x),
        "values scaled": lambda: values.scaled(x),
        "values random": lambda: values.random(seed=x),
        "values replace": lambda: score(probes=[values.replace(x)]),
        "pairs facts": lambda: hl.pairs(model, x),
        "pairs dose": lambda: hl.pairs(model, FACTS, dose=x),
        "pairs scheme": lambda: hl.pairs(model, FACTS, scheme=x),
        "pairs seed": lambda: hl.pairs(model, FACTS, seed=x),
        "trace pairs": lambda: logit_shift.trace(model, x),
        "average pairs": lambda: logit_shift.average(model, x),
        "lens pairs": lambda: logit_lens.trace(model, x),
        "halves": lambda: heads.halves(FACTS, by=x),
        "halves seed": lambda: heads.halves(FACTS, seed=x),
        "search size": lambda: heads.search(model, hl.pairs(model, FACTS), size=x, quiet=True),
    }


NAMES = tuple(doors(None, None, Path()))


@campaign(40, 4_000)
@given(name=st.sampled_from(NAMES), i=st.integers(0, len(ODD) - 1))
def test_doors(name, i, model, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    try:
        holds("wrong types at doors", doors(model, ODD[i], folder)[name])
    except Exception as error:
        error.add_note(f"at the door {name!r} with {ODD[i]!r}")
        raise


@pytest.mark.parametrize("number", [np.int64(2), np.int32(2), np.uint8(2), torch.tensor(2)])
def test_numbers_of_any_kind_are_numbers(number, model):
    facts = sample_facts().where(case_ids=[np.int64(0), 3, 1])
    assert len(facts.sample(number)) == len(facts.limit(number)) == 2
    result = hl.hijack(
        model, facts, doses=[number], seed=number, execution=hl.Execution(store=False), quiet=True
    )
    assert set(result.items["dose"]) == {0, 2}
    assert result.settings.seed == 2
