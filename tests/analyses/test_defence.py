"""Defences: each method by hand, what it costs, how it is tuned, and the comparison as a whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from command_calls import run as run_command
from matplotlib.text import Text
from model_state import left_as_it_was
from planted_head import PLANTED, planted_facts, planted_model
from scipy.spatial.distance import jensenshannon
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer

import hijacklens as hl
from analyses import defence
from analyses.defence import decoding, evaluation
from analyses.defence.evaluation import chosen, split, texts
from analyses.defence.interventions import Learned, Twice, scaled_heads, stream_change
from analyses.defence.measures import measures, verdicts
from analyses.defence.methods import METHODS, insert, load_method
from analyses.defence.result import DefenceSettings
from hijacklens.prompts.prompt import compose
from hijacklens.prompts.schemes import SchemeRecord
from hijacklens.results.result import Provenance
from hijacklens.scoring.items import skipped_table
from probes.ablation import ablate

P, Q = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.6, 0.3])


def rows(*distributions):
    return torch.tensor(np.log(np.array(distributions)))


def probabilities(logprobs):
    return logprobs.exp().numpy()


def test_decoding_rules_have_the_formulas_of_their_papers():
    p, q = rows(P, P), rows(Q, P)
    powers = P**0.25 * Q**0.75  # CAD with alpha = -3/4
    found = probabilities(decoding.against_context(p, q, alpha=-0.75))
    assert found[0] == pytest.approx(powers / powers.sum())
    assert found[1] == pytest.approx(P)
    for alpha, only in ((0, P), (-1, Q)):
        assert probabilities(decoding.against_context(p, q, alpha=alpha))[0] == pytest.approx(only)
    bits = jensenshannon(P, Q, base=2) ** 2
    assert decoding.divergence(p, q).tolist() == pytest.approx([bits, 0])
    powers = P ** (1 - bits) * Q**bits  # AdaCAD with the opposite sign
    found = probabilities(decoding.adaptive(p, q))
    assert found[0] == pytest.approx(powers / powers.sum())
    assert found[1] == pytest.approx(P)
    assert torch.equal(decoding.gate(p, q, threshold=0.65), rows(P, P))
    assert torch.equal(decoding.gate(p, q, threshold=0.6 - 1e-9), rows(Q, P))


def test_a_text_is_inserted_and_spans_follow():
    prompt = compose("Rome is in", sentence="Not Oslo.", dose=2, subject=(0, 4), named=["Oslo"])
    written = {
        ("Hm.", "before"): "Hm. Not Oslo. Not Oslo. Rome is in",
        ("Hm.", "between"): "Not Oslo. Not Oslo. Hm. Rome is in",
        ("\n\n", "between"): "Not Oslo. Not Oslo.\n\nRome is in",
    }
    for (text, place), expected in written.items():
        found = insert(prompt, text, place=place)
        assert found.text == expected
        words = {name: [found.text[a:b] for a, b in at] for name, at in found.spans.items()}
        assert words["mention"] == ["Oslo", "Oslo"]
        assert (words["query"], words["subject"]) == (["Rome is in"], ["Rome"])


def changed(name, setting, prompt):
    alone = compose("Rome is in")
    return METHODS[name].make(None, **setting)(prompt, alone).text


def test_prompt_methods_by_hand():
    prompt = compose("Rome is in", sentence="Not Oslo.", dose=1)
    assert changed("nothing", {}, prompt) == "Not Oslo. Rome is in"
    assert changed("oracle", {}, prompt) == "Rome is in"
    assert changed("repeat", {"text": "{}?"}, prompt) == "Rome is in? Not Oslo. Rome is in"
    setting = {"text": "Think.", "place": "between"}
    assert changed("instruction", setting, prompt) == "Not Oslo. Think. Rome is in"
    assert changed("separator", {"text": "---"}, prompt) == "Not Oslo. --- Rome is in"
    for name in ("separator", "repeat"):
        assert changed(name, {"text": "{}?"}, compose("Rome is in")) == "Rome is in"


@pytest.fixture(scope="module")
def llama():
    return hl.load_model(tiny_model("llama", layers=3), tokenizer=tiny_tokenizer("llama"))


def logits(model, ids, probe=None):
    """The logits of a row with a probe on, by the hooks of TransformerLens alone."""
    from hijacklens.probe import probed
    from hijacklens.prompts.layout import Layout

    with torch.no_grad(), probed(model, [probe] if probe else [], Layout(ids, {})):
        return model(ids)


def test_changes_of_heads_and_streams_by_hand(llama):
    ids = torch.tensor([[5, 9, 40, 77, 12]])
    heads = {(0, 1): 0.5, (2, 3): -1.0}
    v = torch.linspace(-1, 1, 32)
    with left_as_it_was(llama, ids):
        plain, cache = llama.run_with_cache(ids)
        zero = logits(llama, ids, scaled_heads(llama, {(0, 1): 0.0}))
        assert torch.allclose(zero, logits(llama, ids, ablate(heads=[(0, 1)])), atol=1e-5)
        same = logits(llama, ids, scaled_heads(llama, {(0, 1): 1.0}))
        assert torch.allclose(same, plain, atol=1e-5)

        hooks = []
        for (at, head), alpha in heads.items():

            def twice(z, hook, at=at, head=head, alpha=alpha):  # adds what the first run had
                z = z.clone()
                z[:, :, head] += alpha * cache[f"blocks.{at}.attn.hook_z"][:, :, head]
                return z

            hooks.append((f"blocks.{at}.attn.hook_z", twice))
        expected = llama.run_with_hooks(ids, fwd_hooks=hooks)
        assert torch.allclose(logits(llama, ids, Twice(heads)), expected, atol=1e-4)

        for remove in (False, True):

            def change(x, hook, remove=remove):
                return x - (x @ v)[..., None] * v / (v @ v) if remove else x + v

            expected = llama.run_with_hooks(ids, fwd_hooks=[("blocks.1.hook_resid_post", change)])
            found = logits(llama, ids, stream_change(llama, [1], v, remove=remove))
            assert torch.allclose(found, expected, atol=1e-4)
            assert not torch.allclose(found, plain, atol=1e-2)
    keys = {scaled_heads(llama, heads).key, Twice(heads).key, stream_change(llama, [1], v).key}
    keys |= {stream_change(llama, [1], v, remove=True).key, stream_change(llama, [1], 2 * v).key}
    assert len(keys) == 5


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A model with a planted head in a folder, and its facts."""
    folder = tmp_path_factory.mktemp("planted")
    planted_model().save_pretrained(folder)
    tiny_tokenizer("llama").save_pretrained(folder)
    table = planted_facts().to_dataframe().drop(columns="prompt")
    table.to_json(folder / "facts.jsonl", orient="records", lines=True)
    return hl.load_model(str(folder)), planted_facts(), folder


def test_what_is_learned_is_in_the_model(planted):
    model, facts, _ = planted
    pairs = hl.pairs(model, facts, scheme="think")
    learned = Learned(model, pairs, hl.Execution(store=False))
    last = []
    for pair in pairs:
        for prompt in (pair.bare, pair.hijacked):
            _, cache = model.run_with_cache(torch.tensor([prompt.ids]))
            last.append(cache["blocks.1.hook_resid_post"][0, -1])
    expected = torch.stack(last[::2]).mean(0) - torch.stack(last[1::2]).mean(0)
    assert torch.allclose(learned.difference(1), expected, atol=1e-4)
    assert learned.heads("writers", 1) == (PLANTED,)  # PH3 prunes the head that writes the shift
    (probe,) = METHODS["ph3"].make(learned, fraction=0.01)
    assert probe.key == "scale-heads:1.2=0.0"
    drawn = [learned.placebo(seed).low_rank(2) for seed in (0, 0, 1)]
    (same, again, other) = [replacement.key for replacement in drawn]
    assert same == again != other
    placebo = learned.placebo(0)
    assert PLANTED not in placebo.heads("writers", 1)
    assert placebo.difference(1).norm() == pytest.approx(float(expected.norm()))
    assert not torch.allclose(placebo.difference(1), learned.difference(1), atol=0.1)


@pytest.mark.parametrize("opening", ["", "Well, now."])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_placebo_of_knock_out_hides_an_attended_token_outside_the_sentences(family, opening):
    model = hl.load_model(tiny_model(family), tokenizer=tiny_tokenizer(family))
    facts = planted_facts().with_opening(opening) if opening else planted_facts()
    for scheme in ("think", "mention", "do-not-think"):
        pairs = hl.pairs(model, facts, scheme=scheme)
        learned = Learned(model, pairs, hl.Execution(store=False))
        (probe,) = METHODS["knock-out"].placebo_of(learned, {"target": "hijack"}, 0)
        assert probe.target == ("at:1" if opening else "last")
        for pair in pairs:
            hidden = set(pair.hijacked.positions(probe.target))
            assert len(hidden) == 1
            assert not hidden & {0, *pair.hijacked.positions("hijack")}
            assert min(hidden) <= max(pair.hijacked.positions("query"))


def scores(method, bare, dosed, *, scheme="s", tokens=1):
    """Items of four facts with these margins, each four times, of 16 relations."""
    table = [
        (method, scheme, dose, case, f"P{case}", "x", 0.0, margin, tokens)
        for dose, margins in ((0, bare), (1, dosed))
        for case, margin in enumerate(4 * margins)
    ]
    names = ["method", "scheme", "dose", "case_id", "relation_id", "subject"]
    return pd.DataFrame(table, columns=[*names, "first_true", "first_false", "tokens"])


def test_measures_by_hand():
    bare, dosed = [-1.0, -1, -1, 1], [1.0, 1, 1, 1]
    items = [
        scores("nothing", bare, dosed),
        scores("mine", [-1.0, 1, -1, 1], [-1.0, -1, 1, 1], tokens=3),
        scores("placebo of mine", bare, dosed),
    ]
    for method, helped in (("nothing", -1.0), ("mine", -1.0), ("placebo of mine", -1.0)):
        for scheme in ("do-not-think-true", "relation-true"):
            last = 1.0 if (method, scheme) == ("mine", "relation-true") else helped
            own = [-1.0, 1, -1, 1] if method == "mine" else bare
            items.append(scores(method, own, [-1.0, helped, helped, last], scheme=scheme))
    table = measures(pd.concat(items), ["s"]).set_index("method")
    mine = table.loc["mine"]
    assert table.loc["nothing", ["undone", "undone_low", "undone_high"]].tolist() == [0, 0, 0]
    assert mine["undone"] == pytest.approx(2 / 3)
    assert mine["bare_retention_change"] == mine["bare"] == -0.25
    assert mine["bare_retention"] == 0.5
    assert mine["reverse"] == -0.125  # one of eight prompts
    assert (mine["answers"], mine["answers_n"]) == (-1, 4)  # the facts that are not known
    assert (mine["helpful_change"], mine["tokens_ratio"], mine["n"]) == (-1, 3, 16)
    assert np.isnan(table.loc["nothing", "p"]) and 0 < mine["p"] == mine["p_corrected"] <= 1
    verdict = verdicts(table.reset_index().assign(model="m", p_corrected=0.01))
    assert verdict[["method", "undone", "loss", "helps"]].values.tolist() == [
        ["mine", pytest.approx(2 / 3), 1, False]
    ]
    better = table.assign(bare_retention_change=-0.02, reverse=0.0, answers=0.0, p_corrected=0.01)
    assert verdicts(better.reset_index().assign(model="m"))["helps"].tolist() == [True]
    better["placebo"] = 0.7
    found = verdicts(better.reset_index().assign(model="m"))
    assert found[["fails", "helps"]].values.tolist() == [["placebo", False]]


def comparison(methods, *, known, facts):
    """A comparison of methods on hijacked facts, of which each undoes this number."""
    bare = [-1.0] * known + [1.0] * (facts - known)
    parts = []
    for method, undone in {"nothing": 0, "oracle": facts, **methods}.items():
        dosed = [-1.0] * undone + [1.0] * (facts - undone)
        parts.append(scores(method, bare, dosed))
        for scheme in ("do-not-think-true", "relation-true"):
            parts.append(scores(method, bare, [-1.0] * facts, scheme=scheme))
    items = pd.concat(parts).assign(model="m")
    names = items["method"].unique()
    neutral = pd.DataFrame({"model": "m", "method": names, "passage": 0, "tokens": 1, "nats": -1.0})
    tuning = pd.DataFrame({"model": ["m"], "answers": [np.nan], "answers_n": [0]})
    settings = DefenceSettings(
        models=(),
        facts=hl.atlas().record(),
        schemes=(SchemeRecord(name="s"),),
        tune_scheme=SchemeRecord(name="think"),
        dose=1,
        seed=0,
        relations={"held_out": ("P1",)},
        methods={},
    )
    return defence.DefenceResult(
        items=items,
        neutral=neutral,
        tuning=tuning,
        skipped=skipped_table([], "m"),
        settings=settings,
        provenance=Provenance.now(seed=0),
    )


def legend(result):
    return " ".join(str(each) for each in result.plot().findobj(Text))


def test_a_verdict_says_what_fails_and_what_was_not_measured():
    methods = {"a": 3, "placebo of a": 0, "b": 3, "placebo of b": 0, "c": 1, "placebo of c": 0}
    goal = "at least half at a loss of at most 0.02 under every scheme"
    shown = str(comparison(methods, known=3, facts=4))
    assert f"m: a and b undo {goal}\n" in shown and "4 facts" not in shown
    assert "defences on 1 relation new to them" in shown
    assert "m: no setting was chosen by answers, as too few facts validate them" in shown
    # All facts are known, so that no stated answer can be lost.
    result = comparison(methods, known=4, facts=4)
    assert result.defences["helpful_change"].isna().all()
    assert result.verdict[["method", "fails", "unmeasured", "helps"]].values.tolist() == [
        ["a", "", "answers (0 facts)", False],
        ["b", "", "answers (0 facts)", False],
        ["c", "half, placebo", "answers (0 facts)", False],
    ]
    assert result.verdict["loss"].isna().all() and result.findings() == {"helps": {}}
    shown = str(result)
    assert "m: whether a and b help cannot be judged\n" in shown
    assert "too few facts, or no rise, to measure answers (0 facts)\n" in shown
    assert "answers need facts that the model does not know" in shown
    (panel,) = result.plot().axes
    assert [text.get_text() for text in panel.texts] == ["loss not measured"]
    assert "95% intervals, relations like these" in legend(result)
    # Facts that do not give way: there is nothing to undo.
    shown = str(comparison({"a": 1, "placebo of a": 0}, known=0, facts=1))
    assert "m: whether a helps cannot be judged\n" in shown
    assert "to measure undone under s (4 facts)\n" in shown
    equal = {"a": 3, "placebo of a": 3, "c": 3}
    shown = str(comparison(equal, known=3, facts=4))
    assert f"a and c undo {goal}, but none undoes significantly more than a placebo" in shown
    shown = str(comparison({"c": 1, "placebo of c": 0}, known=3, facts=4))
    nearest = "nearest is c: over the schemes it undoes 0.33 at worst and loses at most 0.00"
    assert f"m: no method undoes {goal}; {nearest}" in shown


def test_one_relation_of_few_facts_judges_nothing():
    result = comparison({"a": 3, "placebo of a": 0}, known=3, facts=4)
    items = result.items[result.items["case_id"] < 3].assign(relation_id="P1")
    few = replace(result, items=items)
    assert "95% intervals, these facts (one relation)" in legend(few)
    assert few.verdict["helps"].tolist() == [False]
    assert few.verdict["unmeasured"].tolist() == ["answers (0 facts)"]
    one = replace(result, items=items[items["case_id"] < 1])
    assert one.verdict["undone"].isna().all()
    unmeasured = "undone under s (1 facts), reverse (1 facts), answers (0 facts)"
    assert one.verdict["unmeasured"].tolist() == [unmeasured]


def test_settings_are_chosen_within_the_limit_and_on_other_models():
    columns = ["model", "method", "setting", "undone", "bare_retention_change", "answers"]
    table = [
        ("a", "steering", 0, 0.3, 0.0, -0.02), ("a", "steering", 1, 0.9, -0.1, 0.0),
        ("b", "steering", 0, 0.3, -0.2, 0.0), ("b", "steering", 1, 0.9, 0.0, -0.1),
        ("a", "gate", 0, 0.8, 0.0, 0.0), ("a", "gate", 1, 0.2, 0.0, 0.0),
        ("b", "gate", 0, 0.1, 0.0, 0.0), ("b", "gate", 1, 0.2, 0.0, 0.0),
    ]  # fmt: skip
    methods = [METHODS["steering"], METHODS["gate"]]
    scored = pd.DataFrame(table, columns=columns).assign(reverse=0.0, answers_n=50)
    found = chosen(scored, methods)
    of = found[found["chosen"]].set_index(["model", "method"])["setting"].to_dict()
    assert of == {
        ("a", "steering"): 0,  # 1 loses too much
        ("b", "steering"): 1,  # both lose too much; 1 loses less
        ("a", "gate"): 1,  # it learns nothing, so the other model chooses
        ("b", "gate"): 0,
    }
    # Without a known fact, the other losses choose; one of 50 facts is within the limit.
    own = scored[(scored["model"] == "a") & (scored["method"] == "steering")]
    for changes, best in (([-0.5, 0.0], 1), ([0.0, 49 / 50 - 1.0], 1), ([0.0, -0.03], 0)):
        found = chosen(own.assign(answers=np.nan, bare_retention_change=changes), methods)
        assert found.loc[found["chosen"], "setting"].tolist() == [best]


def test_relations_are_not_shared():
    parts = split(hl.atlas(), most=60, seed=1)
    sets = [set(part.relations()) for part in parts.values()]
    assert set.union(*sets) == set(hl.atlas().relations()) and sum(map(len, sets)) == 20
    assert len(parts["tuning"]) == len(parts["validation"]) == 60
    assert len(texts()) == 40
    with pytest.raises(hl.InputError, match="at least three"):
        split(hl.atlas().where(relation=["P36", "P103"]), most=60, seed=1)


MINE = """
from analyses.defence import Method as Kind
def Method():
    return Kind(name="mine", source="mine", changes="prompt",
                make=lambda learned: lambda prompt, alone: alone if prompt.dose else prompt)
"""


def test_the_comparison_of_defences(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "texts", lambda: ["The Colosseum is in the city of Rome."])
    model, facts, _ = planted
    (tmp_path / "mine.py").write_text(MINE)
    methods = [load_method(f"{tmp_path / 'mine.py'}:Method"), "gate", "ph3"]
    options = {"schemes": ["do-not-think"], "methods": methods}
    run = {"execution": hl.Execution(store=False), "quiet": True}
    with left_as_it_was(model, torch.tensor([[5, 9, 40]])):
        result = hl.defend(model, facts, **options, **run)
    table = result.defences.set_index("method")
    assert list(result.defences) == [
        *("model", "scheme", "method", "undone", "undone_low", "undone_high", "bare_retention"),
        *("bare_retention_change", "helpful_change", "neutral_nats", "tokens_ratio", "p"),
        *("p_corrected", "n", "relations"),
    ]
    assert table.loc[["nothing", "oracle", "mine"], "undone"].tolist() == [0, 1, 1]
    free = ["bare_retention_change", "neutral_nats"]
    assert (table.loc[["nothing", "oracle", "gate"], free] == 0).all().all()
    assert table.loc["oracle", "helpful_change"] < 0
    assert result.to_dataframe().equals(result.defences)
    assert {relation for part in result.settings.relations.values() for relation in part} == {
        "P131", "P36", "P103",
    }  # fmt: skip
    # Six held-out facts do not show a rise in efficacy.
    assert "to measure undone under do-not-think (6 facts)" in str(result)
    assert not result.verdict["helps"].any()
    assert result.settings.tuning == 60
    result.save(tmp_path / "out")
    loaded = hl.load_result(tmp_path / "out")
    pd.testing.assert_frame_equal(loaded.defences, result.defences)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"defences.csv", "items.parquet", "pareto.svg", "result.json"}
    assert [exhibit.heading for exhibit in loaded.exhibits()][:2] == [
        "Undone against harm", "Verdict",
    ]  # fmt: skip


REFUSED = {
    "tuned on": {"schemes": ["think"]},
    "measure of costs, so methods cannot be tested": {"schemes": ["relation-true"]},
    "measure of costs, so methods cannot be tuned": {
        "protocol": defence.Protocol(tune_scheme="do-not-think-true")
    },
    "name at least one scheme, and each once": {"schemes": ["do-not-think", "do-not-think"]},
    "unknown method 'gait'; did you mean 'gate'": {"methods": ["gait"]},
    "there is no file": {"methods": ["nowhere.py:Method"]},
    "engine 'local'": {"execution": hl.Execution(engine=hl.RayEngine())},
    "called 'gate'": {
        "methods": [defence.Method(name="gate", source="", changes="probes", make=list), "gate"]
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_comparison_that_cannot_be_made_is_refused(planted, message):
    with pytest.raises(hl.InputError, match=message):
        hl.defend(planted[0], planted[1], **REFUSED[message])


def test_methods_are_registered_once_and_read_from_files(tmp_path):
    mine = defence.Method(name="mine", source="mine", changes="probes", make=lambda learned: [])
    try:
        assert defence.add_method(mine) is load_method("mine") is defence.add_method(mine)
        with pytest.raises(hl.InputError, match="'mine' exists already"):
            defence.add_method(defence.Method(name="mine", source="", changes="probes", make=list))
    finally:
        del METHODS["mine"]
    (tmp_path / "mine.py").write_text("Method = 1 / 0")
    with pytest.raises(hl.InputError, match="ZeroDivisionError"):
        load_method(f"{tmp_path}/mine.py:Method")
    with pytest.raises(hl.InputError, match="at least one setting"):
        defence.Method(name="x", source="", changes="probes", make=list, settings=())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_all_methods_on_five_families(family, monkeypatch):
    monkeypatch.setattr(evaluation, "texts", lambda: ["The Colosseum is in the city of Rome."])
    model = hl.load_model(tiny_model(family), tokenizer=tiny_tokenizer(family))
    facts, ids = planted_facts(), torch.tensor([[5, 9, 40]])
    options = {"schemes": ["do-not-think"], "quiet": True}
    with left_as_it_was(model, ids):
        shared = hl.defend(model, facts, execution=hl.Execution(store=False), **options)
    single = hl.Execution(store=False, sharing="plain", batch_tokens=1)
    alone = hl.defend(model, facts, execution=single, **options)
    names = ["method", "scheme", "dose", "case_id"]
    both = [x.items.set_index(names)[["first_true", "first_false"]] for x in (shared, alone)]
    pd.testing.assert_frame_equal(*both, atol=1e-4, rtol=0)
    table = shared.defences.set_index("method")
    assert len(table) == 28
    assert (table.loc[["nothing", "oracle"], "undone"].isin([0, 1, np.nan])).all()


@pytest.mark.slow
def test_the_command_writes_its_files(planted, tmp_path, capsys):
    _, _, folder = planted
    words = [
        "defend",
        "--model",
        folder,
        "--facts",
        folder / "facts.jsonl",
        "--method",
        "separator",
    ]
    words += ["--out", tmp_path / "out", "--quiet"]
    assert run_command(*words) == 0
    assert "separator" in capsys.readouterr().out
    written = pd.read_csv(tmp_path / "out" / "defences.csv")
    assert set(written["method"]) == {"nothing", "oracle", "separator", "placebo of separator"}
    assert run_command(*words[:-1], "--dose", "0-2", "--overwrite") == 2
    assert "one dose above 0" in capsys.readouterr().err
