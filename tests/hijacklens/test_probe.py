"""The contract of probes: what a run needs of them, and that a model is left as it was."""

from __future__ import annotations

import pytest
import torch
from model_state import left_as_it_was
from sample_facts import sample_facts
from tiny_models import tiny_model, tiny_tokenizer
from torch.testing import assert_close
from type_checks import unchecked

from hijacklens.errors import InputError
from hijacklens.models.loading import load_model
from hijacklens.probe import HookProbe, Probe, check_probes, logits_at, probed, spans_of
from hijacklens.prompts.layout import Layout
from hijacklens.prompts.tokens import encode
from hijacklens.scoring.hijack import hijack

IDS = torch.tensor([[5, 9, 300, 42, 7], [5, 8, 11, 60, 70]])
LAYOUT = Layout(IDS, {})
OUT, MLP = "blocks.0.hook_attn_out", "blocks.1.hook_mlp_out"


@pytest.fixture(scope="module", params=["gpt2", "gemma3"])
def model(request):
    tokenizer = tiny_tokenizer(request.param)
    return load_model(tiny_model(request.param), tokenizer=tokenizer, device="cpu")


@pytest.fixture(scope="module")
def gpt2():
    return load_model(tiny_model("gpt2"), tokenizer=tiny_tokenizer("gpt2"), device="cpu")


def scaled(factor: float, name: str = OUT) -> HookProbe:
    return HookProbe(f"times {factor}", [(name, lambda value, hook: factor * value)])


def plus(amount: float, name: str = OUT) -> HookProbe:
    return HookProbe(f"plus {amount}", [(name, lambda value, hook: value + amount)])


def test_a_hook_probe_is_a_probe():
    probe = scaled(2)
    assert isinstance(probe, Probe)
    assert (probe.key, tuple(probe.spans), probe.packs) == ("times 2", (), False)
    assert check_probes([probe]) == (probe,)
    assert check_probes(iter([probe])) == (probe,)
    assert check_probes(()) == ()
    with unchecked():  # one probe alone is taken for a list of one
        assert check_probes(probe) == (probe,)


@pytest.mark.parametrize("given", [["knock-out"], "knock-out", [lambda: None], [None], 5])
def test_what_is_no_probe(given):
    with unchecked(), pytest.raises(InputError, match=r"probes takes a list of probes, .* got"):
        check_probes(given)


def test_spans_of_several_probes():
    probes = [
        HookProbe("a", [], spans=["last+hijack", "token:3"]),
        HookProbe("b", [], spans=["all", "at:-1+last", "text:a+b"]),
    ]
    assert spans_of(probes) == ("at:-1", "hijack", "last", "text:a+b")
    assert spans_of([]) == ()


def test_probes_act_in_their_order(model):
    seen: list[torch.Tensor] = []
    watch = HookProbe("watch", [(OUT, lambda value, hook: seen.append(value.clone()))])
    with torch.no_grad(), probed(model, [watch, scaled(3), plus(1), watch], LAYOUT):
        model(IDS)
    assert_close(seen[1], 3 * seen[0] + 1)
    with torch.no_grad(), probed(model, [plus(1), watch, scaled(3), watch], LAYOUT):
        model(IDS)
    assert_close(seen[2], seen[0] + 1)
    assert_close(seen[3], 3 * (seen[0] + 1))


@pytest.fixture
def untouched(model):
    with left_as_it_was(model, IDS):
        yield


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["in a hook", "in the body"])
def test_nothing_is_left_behind(model, untouched, error, where):
    def fail(value, hook):
        raise error("stop")

    probes = [scaled(2), *([HookProbe("fail", [(MLP, fail)])] if where == "in a hook" else [])]
    with pytest.raises(error), probed(model, probes, LAYOUT), torch.no_grad():
        model(IDS)
        raise error("stop")


def test_nothing_is_put_on_if_a_probe_does_not_fit(model, untouched):
    with (
        pytest.raises(InputError, match=r"unknown hook 'blocks\.9"),
        probed(model, [scaled(2), scaled(2, "blocks.9.hook_attn_out")], LAYOUT),
    ):
        pytest.fail("the body must not run")


def test_hooks_of_others_stay(gpt2):
    point = gpt2.hook_dict[OUT]
    with torch.no_grad():
        bare = gpt2(IDS)
        point.add_hook(lambda value, hook: 2 * value)
        try:
            own = gpt2(IDS)
            with probed(gpt2, [scaled(0.5)], LAYOUT):
                assert_close(gpt2(IDS), bare, atol=1e-5, rtol=0)
            assert torch.equal(gpt2(IDS), own)
            assert len(point.fwd_hooks) == 1
        finally:
            gpt2.reset_hooks()
        assert torch.equal(gpt2(IDS), bare)


def test_logits_at_chosen_places(model):
    row, place = torch.tensor([0, 1, 0, 0]), torch.tensor([4, 2, 0, 4])
    with torch.no_grad():
        whole = model(IDS)
        with probed(model, [scaled(2)], LAYOUT):
            doubled = model(IDS)
    found = logits_at(model, LAYOUT, row, place)
    assert found.shape == (4, whole.shape[-1])
    assert not found.requires_grad
    assert_close(found, whole[row, place], atol=1e-5, rtol=0)
    found = logits_at(model, LAYOUT, row, place, probes=[scaled(2)])
    assert_close(found, doubled[row, place], atol=1e-5, rtol=0)


class Recorder:
    """A user's own probe: it remembers what it is given and adds to the subject."""

    key = "recorder"
    spans = ("subject",)

    def __init__(self, *, packs: bool) -> None:
        self.packs = packs
        self.layouts: list[Layout] = []
        self.shapes: list[tuple[int, ...]] = []

    def hooks(self, model, layout):
        def add(value, hook):
            self.shapes.append(tuple(value.shape[:2]))
            ramp = torch.linspace(-1, 1, value.shape[-1])
            return value + layout.query("subject")[:, :, None] * ramp

        self.layouts.append(layout)
        return [("blocks.0.hook_resid_post", add)]


def test_a_probe_that_does_not_pack_sees_prompts_of_one_length_and_no_padding(gpt2):
    probe = Recorder(packs=False)
    facts = sample_facts()
    hijack(gpt2, facts, doses=[0, 1], probes=[probe], quiet=True)
    prompts = {tuple(row) for layout in probe.layouts for row in layout.tokens.tolist()}
    texts = {fact.prompt for fact in facts}
    assert set(encode(gpt2.tokenizer, sorted(texts))) <= prompts
    assert sum(len(layout.tokens) for layout in probe.layouts) == len(prompts)
    assert probe.shapes == [tuple(layout.tokens.shape) for layout in probe.layouts]
    assert max(shape[0] for shape in probe.shapes) > 1


def test_positions_in_hooks_are_positions_of_the_prompt(gpt2):
    """The last token but one, which padding or shared rows would shift."""

    def wipe(value, hook):
        value = value.clone()
        value[:, -2] = 0
        return value

    probe = HookProbe("wipe", [("blocks.0.hook_resid_post", wipe)])
    facts = sample_facts()
    together = hijack(gpt2, facts, doses=[0, 2], probes=[probe], quiet=True)
    for fact in facts[:4]:
        for target, side in ((fact.target_true, "true"), (fact.target_false, "false")):
            before, after = encode(gpt2.tokenizer, [fact.prompt, f"{fact.prompt} {target}"])
            with torch.no_grad(), probed(gpt2, [probe], Layout(torch.tensor([before]), {})):
                logits = gpt2(torch.tensor([before]))[0, -1].log_softmax(-1)
            items = together.items
            (item,) = items[(items["case_id"] == fact.case_id) & (items["dose"] == 0)].to_dict(
                "records"
            )
            assert item[f"first_{side}"] == pytest.approx(
                float(logits[after[len(before)]]), abs=1e-4
            )


def test_a_packing_and_a_lone_run_of_the_same_probe_agree(gpt2):
    runs = [
        hijack(gpt2, sample_facts(), doses=[0, 2], probes=[Recorder(packs=packs)], quiet=True)
        for packs in (True, False)
    ]
    first, second = (run.items[["sum_true", "sum_false"]].to_numpy() for run in runs)
    assert abs(first - second).max() < 1e-4
    bare = hijack(gpt2, sample_facts(), doses=[0, 2], quiet=True).items
    assert abs(first - bare[["sum_true", "sum_false"]].to_numpy()).max() > 0.1


def test_a_hook_that_does_nothing_changes_nothing(model):
    idle = HookProbe("idle", [(OUT, lambda value, hook: None)])
    facts = sample_facts()[:3]
    with_it = hijack(model, facts, doses=[1], probes=[idle], quiet=True).items
    without = hijack(model, facts, doses=[1], quiet=True).items
    columns = ["first_true", "sum_true", "sum_false", "top_logprob"]
    assert abs(with_it[columns] - without[columns]).to_numpy().max() < 1e-4
