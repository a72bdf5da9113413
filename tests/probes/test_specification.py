"""Probes written as text: what is read, and what each error says."""

from __future__ import annotations

import pytest
import torch
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
from probes import attention
from probes.ablation import ablate, mean_outputs
from probes.specification import KINDS, parse

SAME = {
    "knock-out:layers=8-11,from=last,to=hijack": attention.knock_out(
        "last", "hijack", layers=range(8, 12)
    ),
    "knock-out:to=hijack+subject,from=last,renormalise=no,when=after": attention.knock_out(
        "last", "hijack+subject", when="after", renormalise=False
    ),
    "knock-out:layers=1+8-9+8,heads=0+2,from=all,to=at:-3..-1": attention.knock_out(
        "all", "at:-3..-1", layers=(1, 8, 9), heads=(0, 2)
    ),
    "rescale:factor=.5,heads=8.3+9.1,from=last,to=subject": attention.rescale(
        0.5, "last", "subject", heads=[(8, 3), (9, 1)]
    ),
    "rescale:factor=-2,when=before,from=last,to=bos": attention.rescale(
        -2, "last", "bos", when="before"
    ),
    "patch:from=last,to=text:Rome, in=Italy,from=all": attention.patch(
        "last", "text:Rome, in=Italy,from=all"
    ),
    "patch:from=text:a, b,share=proportional,to=subject+text:c,share=uniform": attention.patch(
        "text:a, b", "subject+text:c,share=uniform", share="proportional"
    ),
    "ablate:heads=8.3+9.1,kind=zero": ablate(heads=[(8, 3), (9, 1)]),
    "ablate:layers=2,site=mlp_out,span=last": ablate(layers=(2,), site="mlp_out", span="last"),
}


@pytest.mark.parametrize("text", SAME)
def test_the_same_as_the_call(text):
    read = parse(text)
    assert read.text == text
    assert not read.needs_model
    assert read.probe().key == SAME[text].key


@pytest.mark.parametrize("text", [key for key in SAME if not key.startswith("ablate")])
def test_the_key_of_an_attention_probe_can_be_read_back(text):
    key = SAME[text].key
    assert parse(key).probe().key == key


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_kind_makes_its_example(kind):
    model = load_model(tiny_model("gpt2", layers=1), tokenizer=tiny_tokenizer("gpt2"), device="cpu")
    probe = parse(kind.example).probe(model=model, facts=sample_facts())
    assert isinstance(probe, Probe)
    assert {option.default for option in kind.options} != {None}


VALUES = {
    "zero-value:layers=3,heads=0": "zero",
    "identity-value": "identity",
    "low-rank-value:rank=4,heads=1.0+2.1": "low_rank(4)",
    "scale-value:factor=.5,of=circuit": "scaled(0.5)",
    "random-value:seed=7,keep-bias=no": "random(seed=7)",
}


@pytest.mark.parametrize("text", VALUES)
def test_value_probes(text):
    key = parse(text).probe().key
    assert f"by={VALUES[text]}" in key
    assert key.startswith("replace-circuits:" if "circuit" in text else "replace-values:")
    assert ("keep_bias=False" in key) == ("keep-bias=no" in text)
    if "layers=3" in text:
        assert "layers=3,kv_heads=0" in key
    if "rank" in text:
        assert "kv_heads=1.0+2.1" in key


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
    "knock-ot:from=last,to=hijack": "unknown kind of probe 'knock-ot'; did you mean 'knock-out'",
    "": "unknown kind of probe ''. Allowed: ablate, .* `hijacklens probes`",
    "knock-out:layer=3,from=last,to=all": "unknown option of knock-out 'layer'; did you mean 'lay",
    "knock-out:from=last": r"lacks to \(a name, .*\); for example knock-out:layers=8-11,from=last",
    "rescale:from=last,to=all": r"lacks factor \(a number\)",
    "knock-out:from=last,from=all,to=all": "from is given twice",
    "knock-out:last,to=all": "'last' is no option; write option=value, with the options layers, h",
    "knock-out:layers=1,2,from=last,to=all": "layers=1,2 cannot be read; allowed: .* joined by +",
    "knock-out:layers=11-8,from=last,to=all": "layers=11-8 cannot be read; allowed: a number, a r",
    "knock-out:layers=first,from=last,to=all": "layers=first cannot be read",
    "knock-out:layers=,from=last,to=all": "layers= cannot be read",
    "knock-out:heads=8.3+9,from=last,to=all": "heads=8.3.9 cannot be read; .* 8.3.9.1",
    "knock-out:from=at:x,to=all": "from=at:x cannot be read; allowed: a name, text:WORDS, at:I",
    "knock-out:when=during,from=last,to=all": "when=during cannot be read; allowed: before or aft",
    "knock-out:renormalise=no,from=last,to=all": "renormalise=False goes with when=",
    "rescale:factor=two,from=last,to=all": "factor=two cannot be read; allowed: a number",
    "rescale:factor=nan,from=last,to=all": "factor=nan cannot be read",
    "rescale:factor=-1,from=last,to=all": "--probe 'rescale.*': factor is -1.0; give a finite",
    "low-rank-value:rank=2.5": "rank=2.5 cannot be read; allowed: a whole number from 1",
    "zero-value:from=last": "unknown option of zero-value 'from'",
    "ablate:site=mlp": "site=mlp cannot be read; allowed: z",
    "ablate:site=mlp_out,heads=0": "mlp_out is not split into heads",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_cannot_be_read(text):
    with pytest.raises(InputError, match=WRONG[text].replace("+", r"\+")):
        parse(text)


def test_pairs_and_layers_are_refused_when_put_on_a_model():
    model = load_model(tiny_model("gpt2"), tokenizer=tiny_tokenizer("gpt2"), device="cpu")
    probe = parse("knock-out:heads=1.3,layers=1,from=all,to=all").probe()
    with pytest.raises(InputError, match="leave layers out"):
        probe.hooks(model, Layout(torch.tensor([[7]]), {}))


def test_the_command_lists_kinds_and_options(capsys):
    main(["probes"])
    printed = capsys.readouterr().out
    for kind in KINDS.values():
        assert f"{kind.name}  " in printed
        assert f"--probe {kind.example}\n" in printed
    assert "[layers=] [heads=] [when=] [renormalise=] from= to=" in printed


def test_the_command_explains_a_kind(capsys):
    main(["probes", "rescale", "ablate"])
    printed = capsys.readouterr().out
    assert "factor=       (has to be given)  a number\n" in printed
    assert "site=    z         z (heads), attn_out or mlp_out" in printed
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
        texts = ("knock-out:layers=1,from=last,to=hijack", "ablate:heads=0.1,kind=mean")
        self.run(folder, *texts)
        printed = capsys.readouterr().out
        assert f"probe: {texts[0]}\n" in printed
        assert "probe: ablate:site=z,heads=0.1,kind=mean[" in printed
        loaded = load_result(folder / "out")
        model = load_model(str(folder / "tiny"), device="cpu")
        facts = atlas().limit(4, seed=0)
        probes = [parse(text).probe(model=model, facts=facts) for text in texts]
        want = hijack(model, facts, doses=[0, 2], probes=probes, quiet=True)
        assert loaded.settings["probes"] == want.settings["probes"]
        difference = loaded.items["first_true"] - want.items["first_true"]
        assert float(difference.abs().max()) < 1e-4
        bare = hijack(model, facts, doses=[0, 2], quiet=True)
        assert float((bare.items["first_true"] - want.items["first_true"]).abs().max()) > 1e-3
        assert loaded.plot().axes

    def test_a_probe_that_cannot_be_read_stops_before_the_model_is_loaded(self, folder, capsys):
        self.refused(folder, "knock-out:from=last")
        assert "lacks to" in capsys.readouterr().err
        assert not (folder / "out").exists()

    def test_a_span_that_prompts_lack(self, folder, capsys):
        self.refused(folder, "knock-out:from=last,to=hijak")
        assert "unknown span 'hijak'; did you mean 'hijack'" in capsys.readouterr().err

    def test_means_are_for_one_model(self, folder, capsys):
        with pytest.raises(SystemExit) as ended:
            main(["hijack", "--model", "a", "--model", "b", "--probe", "ablate:kind=mean"])
        assert ended.value.code == 2
        assert "is made for one model" in capsys.readouterr().err
