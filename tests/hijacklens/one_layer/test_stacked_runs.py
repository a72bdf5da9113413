"""Runs trained together: each as if alone, each as by torch.optim.AdamW, all resumable."""

from __future__ import annotations

import math

import pytest
import torch

from hijacklens.errors import InputError
from hijacklens.one_layer import stacked_runs
from hijacklens.one_layer.architecture import OneLayerConfig
from hijacklens.one_layer.checkpoint import Checkpoint
from hijacklens.one_layer.fast_path import loss_and_gradients
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.recipe import Run
from hijacklens.one_layer.stacked_runs import CYCLE, StackedRuns, Stream, generator_for
from hijacklens.one_layer.task import ConceptTask

TASK = ConceptTask(bits=3, length=24)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The hooked path on products this small waits for its threads on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_of(
    *,
    seed: int = 0,
    lr: float = 0.01,
    decay: float = 0.01,
    task: ConceptTask = TASK,
    **model: object,
) -> Run:
    shape: dict[str, object] = {"vocab": 8, "d_model": 6, "d_attn": 4, "dtype": "float64"}
    config = OneLayerConfig(**{**shape, "seed": seed, **model})  # type: ignore[arg-type]
    return Run(task=task, model=config, lr=lr, weight_decay=decay)


MIXED = [
    run_of(seed=0, lr=0.01),
    run_of(seed=1, lr=0.01, freeze=("W_V",), value_init="identity"),
    run_of(seed=0, lr=0.003, decay=0.1),
    run_of(seed=2, lr=0.01, freeze=("W_E", "W_QK")),
    run_of(seed=2, lr=0.01, task=ConceptTask(bits=3, length=40, omega=0.8)),
]
IDS = ["plain", "identity kept", "slower, more decay", "only W_V", "another task"]


def assert_same(one: OneLayerTransformer, other: OneLayerTransformer, *, atol: float) -> None:
    for name, weight in one.named_parameters():
        torch.testing.assert_close(weight, other.get_parameter(name), atol=atol, rtol=0)


@pytest.fixture(scope="module")
def together() -> StackedRuns:
    stacked = StackedRuns(MIXED, steps=100, batch=16, schedule="cosine")
    stacked.advance(100)
    return stacked


@pytest.mark.parametrize("i", range(len(MIXED)), ids=IDS)
def test_each_run_is_as_if_alone(together: StackedRuns, i: int) -> None:
    alone = StackedRuns([MIXED[i]], steps=100, batch=16, schedule="cosine")
    alone.advance(100)
    assert_same(alone.models()[0], together.models()[i], atol=1e-10)
    torch.testing.assert_close(alone.losses()[:, 0], together.losses()[:, i], atol=1e-10, rtol=0)


@pytest.mark.parametrize("i", range(len(MIXED)), ids=IDS)
def test_each_run_is_that_of_torch_adamw_on_the_hooked_model(together: StackedRuns, i: int) -> None:
    run = MIXED[i]
    model = OneLayerTransformer(run.model)
    free = [weight for weight in model.parameters() if weight.requires_grad]
    adamw = torch.optim.AdamW(free, lr=run.lr, weight_decay=run.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adamw, T_max=100)
    draw = generator_for(run.model.seed, "training", "cpu")
    # The stream draws several steps at a time, which is another order of the random numbers.
    device = torch.device("cpu")
    ahead = Stream(run.task, run.model.seed, batch=16, dtype="float64", device=device).ahead
    for start in range(0, 100, ahead):
        contexts = run.task.sample(16 * ahead, draw)
        for i_step in range(min(ahead, 100 - start)):
            rows = slice(16 * i_step, 16 * (i_step + 1))
            logits = model(contexts.tokens[rows])[:, -1]
            adamw.zero_grad()
            torch.nn.functional.cross_entropy(logits, contexts.labels[rows]).backward()
            adamw.step()
            schedule.step()
    assert_same(together.models()[i], model, atol=1e-10)


def test_frozen_parts_stay_bit_for_bit(together: StackedRuns) -> None:
    start = OneLayerTransformer(MIXED[1].model)
    trained = together.models()[1]
    assert torch.equal(trained.W_V, start.W_V)
    assert not torch.equal(trained.W_E, start.W_E)
    start, trained = OneLayerTransformer(MIXED[3].model), together.models()[3]
    for name in ("W_E", "W_Q", "W_K"):
        assert torch.equal(getattr(trained, name), getattr(start, name))
    assert not torch.equal(trained.W_V, start.W_V)


def test_one_seed_sees_the_same_contexts_at_every_rate() -> None:
    stacked = StackedRuns([run_of(lr=0.01), run_of(lr=0.001), run_of(lr=0.01, seed=1)], steps=1)
    stacked.advance(1)
    first, second, other = stacked.losses()[0].tolist()
    assert first == second != other  # same start, same contexts


def test_streams_of_seeds_and_purposes_differ() -> None:
    drawn = {
        tuple(TASK.sample(1, generator_for(seed, purpose, "cpu")).tokens[0].tolist())
        for seed in range(20)
        for purpose in ("training", "evaluation")
    }
    assert len(drawn) == 40


def test_the_loss_curve_has_the_mean_of_each_window() -> None:
    stacked = StackedRuns([run_of()], steps=450, batch=4)
    every = StackedRuns([run_of()], steps=100, batch=4)
    stacked.advance(7)
    every.advance(7)
    assert stacked.curve_steps() == [2, 4, 6]
    steps = every.losses()[:, 0]
    torch.testing.assert_close(stacked.losses()[:, 0], steps[:6].view(3, 2).mean(1))
    assert float(steps[0]) == pytest.approx(math.log(8), abs=0.5)  # it starts near chance
    stacked.advance(1000)
    assert (stacked.done, stacked.curve_steps()[-1], len(stacked.losses())) == (450, 450, 225)


def test_it_learns() -> None:
    stacked = StackedRuns(
        [run_of(task=ConceptTask(bits=3, length=128), d_model=8)], steps=600, batch=64
    )
    stacked.advance(600)
    assert float(stacked.losses()[-10:].mean()) < 0.3 < math.log(8)


def test_the_number_of_threads_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    stacked = StackedRuns([run_of()], steps=3)
    seen = []

    def counting(*args: object, **keywords: object) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return loss_and_gradients(*args, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(stacked_runs, "loss_and_gradients", counting)
    stacked.advance(1)
    assert (seen, torch.get_num_threads()) == ([1], 2)
    torch.set_num_threads(before)


class TestResuming:
    def test_a_state_resumes_bit_for_bit(self) -> None:
        unbroken = StackedRuns(MIXED, steps=3 * CYCLE + 5, batch=8)
        unbroken.advance(CYCLE)
        state = {name: value.clone() for name, value in unbroken.state().items()}
        unbroken.advance(3 * CYCLE)
        again = StackedRuns(MIXED, steps=3 * CYCLE + 5, batch=8)
        again.load_state(state)
        assert again.done == CYCLE
        again.advance(3 * CYCLE)
        for one, other in zip(unbroken.models(), again.models(), strict=True):
            assert_same(one, other, atol=0)
        assert torch.equal(unbroken.losses(), again.losses())

    def test_there_is_no_state_between_cycles(self) -> None:
        stacked = StackedRuns([run_of()], steps=CYCLE + 2)
        stacked.advance(CYCLE + 1)
        with pytest.raises(ValueError, match=f"not at step {CYCLE + 1}"):
            stacked.state()
        stacked.advance(1)
        assert int(stacked.state()["done"]) == CYCLE + 2

    def test_a_checkpoint_of_another_run_is_refused(self, tmp_path) -> None:
        Checkpoint(tmp_path, {"steps": 100, "rate": 0.1}).save({"done": torch.tensor(64)})
        with pytest.raises(InputError, match="steps is 200, there 100"):
            Checkpoint(tmp_path, {"steps": 200, "rate": 0.1}).load()

    @pytest.mark.parametrize(
        "content", [b"", b"not a checkpoint", b"\x08" + b"\0" * 7 + b"{}      "]
    )
    def test_a_spoilt_checkpoint_is_refused(self, tmp_path, content: bytes) -> None:
        checkpoint = Checkpoint(tmp_path, {})
        checkpoint.path.write_bytes(content)
        with pytest.raises(InputError, match="not a checkpoint that can be read"):
            checkpoint.load()

    def test_removing_clears_half_written_files(self, tmp_path) -> None:
        checkpoint = Checkpoint(tmp_path, {})
        checkpoint.save({"done": torch.tensor(1)})
        (tmp_path / ".part123-checkpoint.safetensors").write_bytes(b"half")
        checkpoint.remove()
        assert list(tmp_path.iterdir()) == []
        assert checkpoint.load() is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StackedRuns([], steps=1), "at least one run"),
        (lambda: StackedRuns([run_of()], steps=0), "steps is 0"),
        (lambda: StackedRuns([run_of()], steps=1, batch=0), "batch is 0"),
        (lambda: StackedRuns([run_of(), run_of(d_model=7)], steps=1), "each shape separately"),
        (lambda: StackedRuns([run_of(freeze=("W_E", "W_V", "W_QK"))], steps=1), "to train"),
        (lambda: run_of(vocab=9), "9 tokens cannot train on a task of 8"),
        (lambda: run_of(lr=0.0), "lr is 0.0"),
        (lambda: run_of(lr=math.nan), "lr is nan"),
        (lambda: run_of(decay=-1.0), "weight_decay is -1.0"),
    ],
)  # fmt: skip
def test_bad_runs(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
