"""Probes written as text: what is read, and what each error says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from campaign import campaign
from hypothesis import given, reject
from hypothesis import strategies as st
from sample_facts import sample_facts
from tiny_models import tiny_model, tiny_tokenizer

from analyses.commands.group import main
from hijacklens.errors import InputError
from hijacklens.facts.atlas import atlas
from hijacklens.models.loading import load_model
from hijacklens.probe import Probe
from hijacklens.prompts.layout import Layout
from hijacklens.results.result import load_result
from hijacklens.scoring.hijack import hijack
from probes import attention, values
from probes.ablation import ablate, mean_outputs
from probes.specification import KINDS, Kind, parse

SAME = {
    "knock-out:source=last,target=hijack,layers=8-11": attention.knock_out(
        "last", "hijack", layers=range(8, 12)
    ),
    "knock-out:target=hijack+subject,source=last,renormalise=no,when=after": attention.knock_out(
        "last", "hijack+subject", when="after", renormalise=False
    ),
    "knock-out:layers=1+8-9+8,heads=0+2,source=all,target=at:-3..-1": attention.knock_out(
        "all", "at:-3..-1", layers=(1, 8, 9), heads=(0, 2)
    ),
    "rescale:factor=.5,heads=8.3+9.1,source=last,target=subject": attention.rescale(
        0.5, "last", "subject", heads=[(8, 3), (9, 1)]
    ),
    "rescale:factor=-2,when=before,source=last,target=bos": attention.rescale(
        -2, "last", "bos", when="before"
    ),
    "redirect:source=last,target=text:Rome, in=Italy,layers=3": attention.redirect(
        "last", "text:Rome, in=Italy", layers=3
    ),
    'redirect:source="text:a,layers=b",target="text:Rome, \\"I\\"",layers=3': attention.redirect(
        "text:a,layers=b", 'text:Rome, "I"', layers=3
    ),
    "zero-value:keep_bias=no": values.replace(values.zero(), keep_bias=False),
    "scale-value:factor=.5,of=circuit,heads=0-1": values.replace_circuit(
        values.scaled(0.5), heads=[1, 0]
    ),
    "ablate:heads=8.3+9.1,kind=zero": ablate(heads=[(8, 3), (9, 1)]),
    "ablate:layers=2,site=mlp_out,span=last": ablate(layers=(2,), site="mlp_out", span="last"),
}


@pytest.mark.parametrize("text", SAME)
def test_the_same_as_the_call(text):
    specification = parse(text)
    assert specification.text == text
    assert not specification.needs_model
    assert specification.probe().key == SAME[text].key


LISTS = st.lists(st.integers(0, 40), min_size=1, max_size=6)
PAIRS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=4)
SPANS = st.sampled_from(["last", "hijack+subject", "at:-3..-1", "token:7", "all"]) | st.text(
    min_size=1
).map(lambda text: f"bos+text:{text}")


def options_of(kind: Kind) -> st.SearchStrategy[dict[str, Any]]:
    """Values of every type for some of the options of a kind, as a user gives them in Python."""
    by_name: dict[str, Any] = {
        "layers": st.none() | st.integers(0, 40) | LISTS,
        "heads": st.none() | st.integers(0, 40) | LISTS | PAIRS,
        "rank": st.integers(1, 64),
        "seed": st.integers(0, 2**63 - 1),
        "factor": st.floats(0, 1e300),
        "renormalise": st.booleans(),
        "keep-bias": st.booleans(),
        "kind": st.just("zero"),
        "when": st.sampled_from(["before", "after"]),
        "site": st.sampled_from(["z", "attn_out", "mlp_out"]),
        "split": st.sampled_from(["uniform", "proportional"]),
        "of": st.sampled_from(["value", "circuit"]),
        **dict.fromkeys(("source", "target", "span"), SPANS),
    }
    required = {o.name.replace("-", "_"): by_name[o.name] for o in kind.options if not o.default}
    optional = {o.name.replace("-", "_"): by_name[o.name] for o in kind.options if o.default}
    return st.fixed_dictionaries(required, optional=optional)


@campaign(30, 5_000)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@given(data=st.data())
def test_the_key_of_a_probe_is_its_text(kind, data):
    try:
        probe = kind.make(data.draw(options_of(kind)))
    except InputError:
        reject()  # the options contradict each other
    assert probe.key.isprintable()
    assert parse(probe.key).probe().key == probe.key


OLD = {
    "knock-out:from=last,to=text:Rome, in=Italy,from=all": attention.knock_out(
        "last", "text:Rome, in=Italy,from=all"
    ),
    "patch:from=text:a, b,share=proportional,to=subject+text:c,share=uniform": attention.redirect(
        "text:a, b", "subject+text:c,share=uniform", split="proportional"
    ),
    "patch:from=last,share=proportional,to=bos": attention.redirect(
        "last", "bos", split="proportional"
    ),
}


@pytest.mark.parametrize("text", OLD)
def test_old_names_work_with_a_note(text):
    with pytest.warns(FutureWarning, match="from is now called source"):
        probe = parse(text).probe()
    assert probe.key == OLD[text].key


def test_old_names_work_in_python():
    for name in ("patch", "Patch"):
        with pytest.warns(FutureWarning, match=rf"attention\.{name} is now called (r|R)edirect"):
            getattr(attention, name)
    with pytest.warns(FutureWarning, match="share= is now called split="):
        probe = attention.redirect("last", "bos", share="proportional")
    assert probe.key == "redirect:source=last,target=bos,split=proportional"
    with pytest.raises(AttributeError, match="no attribute 'pach'"):
        _ = attention.pach


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_kind_makes_its_example(kind):
    model = load_model(tiny_model("gpt2", layers=1), tokenizer=tiny_tokenizer("gpt2"), device="cpu")
    probe = parse(kind.example).probe(model=model, facts=sample_facts())
    assert isinstance(probe, Probe)
    assert {option.default for option in kind.options} != {None}


def test_means_are_those_of_the_model_at_hand():
    model = load_model(tiny_model("llama"), tokenizer=tiny_tokenizer("llama"), device="cpu")
    read = parse("ablate:heads=0.1,kind=mean,span=last")
    assert read.needs_model
    facts = sample_facts()
    means = mean_outputs(model, facts, span="last")
    expected = ablate(heads=[(0, 1)], kind="mean", means=means, span="last")
    assert read.probe(model=model, facts=facts).key == expected.key
    with pytest.raises(InputError, match="kind=mean takes the means of a model"):
        read.probe()


WRONG = {
    "knock-ot:source=last,target=hijack": "unknown kind of probe 'knock-ot'; did you mean 'knock-",
    "": "unknown kind of probe ''. Allowed: ablate, .* `hijacklens probes`",
    "knock-out:layer=3,source=last,target=all": "unknown option of knock-out 'layer'; did you mean",
    "knock-out:source=last": r"lacks target \(a name, .*\); for example knock-out:source=last",
    "rescale:source=last,target=all": r"lacks factor \(a number\)",
    "knock-out:source=last,source=all,target=all": "source is given twice",
    "knock-out:last,target=all": "'last' is not an option; write option=value, with the options ",
    "knock-out:layers=1,2,source=last,target=all": "layers=1,2 cannot be read; allowed: .* joined",
    "knock-out:layers=11-8,source=last,target=all": "layers=11-8 cannot be read; allowed: a numb",
    "knock-out:layers=first,source=last,target=all": "layers=first cannot be read",
    "knock-out:layers=,source=last,target=all": "layers= cannot be read",
    "knock-out:heads=8.3+9,source=last,target=all": "heads=8.3.9 cannot be read; .* 8.3.9.1",
    "knock-out:source=at:x,target=all": "source=at:x cannot be read; allowed: a name, text:WORDS",
    "knock-out:when=during,source=last,target=all": "when=during cannot be read; allowed: before",
    "knock-out:renormalise=no,source=last,target=all": "renormalise=False needs when=",
    "rescale:factor=two,source=last,target=all": "factor=two cannot be read; allowed: a number",
    "rescale:factor=nan,source=last,target=all": "factor=nan cannot be read",
    "rescale:factor=-1,source=last,target=all": "--probe 'rescale.*': factor is -1.0; give",
    "low-rank-value:rank=2.5": "rank=2.5 cannot be read; allowed: a whole number from 1",
    "zero-value:source=last": "unknown option of zero-value 'source'",
    "ablate:site=mlp": "site=mlp cannot be read; allowed: z",
    "ablate:site=mlp_out,heads=0": "mlp_out is not split into heads",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_cannot_be_read(text):
    with pytest.raises(InputError, match=WRONG[text].replace("+", r"\+")):
        parse(text)


def test_pairs_and_layers_are_refused_when_put_on_a_model():
    model = load_model(tiny_model("gpt2"), tokenizer=tiny_tokenizer("gpt2"), device="cpu")
    probe = parse("knock-out:heads=1.3,layers=1,source=all,target=all").probe()
    with pytest.raises(InputError, match="leave layers out"):
        probe.hooks(model, Layout(torch.tensor([[7]]), {}))


def test_the_command_lists_kinds_and_options(capsys):
    main(["probes"])
    printed = capsys.readouterr().out
    for kind in KINDS.values():
        assert f"{kind.name}  " in printed
        assert f"--probe {kind.example}\n" in printed
    assert "source= target= [layers=] [heads=] [when=] [renormalise=]" in printed


def test_the_command_explains_a_kind(capsys):
    main(["probes", "rescale", "ablate"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "factor= (required) a number" in printed
    assert "site= z z, attn_out or mlp_out (z: heads)" in printed
    assert "knock-out" not in printed


def test_the_command_refuses_an_unknown_kind(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["probes", "rescal"])
    assert ended.value.code == 2
    assert "did you mean 'rescale'" in capsys.readouterr().err


class TestHijackCommand:
    @pytest.fixture
    def folder(self, tmp_path):
        model = tiny_model("llama")
        model.save_pretrained(tmp_path / "tiny")
        tiny_tokenizer("llama").save_pretrained(tmp_path / "tiny")
        return tmp_path

    def run(self, folder, *probes: str) -> None:
        """Four facts at doses 0 and 2 on the CPU, without the store."""
        words = ["--limit", "4", "--doses", "0,2", "--quiet", "--no-cache", "--device", "cpu"]
        places = ["--model", str(folder / "tiny"), "--out", str(folder / "out")]
        main(["hijack", *places, *words, *(w for p in probes for w in ("--probe", p))])

    def refused(self, folder, *probes: str) -> None:
        with pytest.raises(SystemExit) as ended:
            self.run(folder, *probes)
        assert ended.value.code == 2

    def test_probes_act_and_are_named(self, folder, capsys):
        texts = ("knock-out:source=last,target=hijack,layers=1", "ablate:heads=0.1,kind=mean")
        self.run(folder, *texts)
        printed = capsys.readouterr().out
        assert f"tiny with {texts[0]}, ablate:heads=0.1,kind=mean,means=all/" in printed
        loaded = load_result(folder / "out")
        model = load_model(str(folder / "tiny"), device="cpu")
        facts = atlas().limit(4, seed=0)
        probes = [parse(text).probe(model=model, facts=facts) for text in texts]
        want = hijack(model, facts, doses=[0, 2], probes=probes, quiet=True)
        assert loaded.settings.probes == want.settings.probes
        difference = loaded.items["first_true"] - want.items["first_true"]
        assert float(difference.abs().max()) < 1e-4
        bare = hijack(model, facts, doses=[0, 2], quiet=True)
        assert float((bare.items["first_true"] - want.items["first_true"]).abs().max()) > 1e-3
        assert loaded.plot().axes

    def test_a_probe_that_cannot_be_read_stops_before_the_model_is_loaded(self, folder, capsys):
        self.refused(folder, "knock-out:source=last")
        assert "lacks target" in capsys.readouterr().err
        assert not (folder / "out").exists()

    def test_a_span_that_prompts_lack(self, folder, capsys):
        self.refused(folder, "knock-out:source=last,target=hijak")
        assert "unknown span 'hijak'; did you mean 'hijack'" in capsys.readouterr().err

    def test_means_are_for_one_model(self, folder, capsys):
        with pytest.raises(SystemExit) as ended:
            main(["hijack", "--model", "a", "--model", "b", "--probe", "ablate:kind=mean"])
        assert ended.value.code == 2
        assert "is made for one model" in capsys.readouterr().err
