"""Many one-layer models trained together in one batched program.

Runs whose shapes agree (vocabulary, widths, batch, steps, dtype) train as one: their weights are
stacked along a leading axis, each step is one batched product for all (`gradients`), and one
`torch.optim.AdamW` takes the slices of the stack, with a learning rate and weight decay per run.
Seeds, learning rates, frozen parts, the start of W_V, and the task itself (omega, beta, support,
context length) may differ from run to run.

A run's result does not depend on its company. It starts from its own seed, and its contexts come
from a generator made of that seed alone. So runs of one seed on one task see the same contexts
whatever their learning rate and frozen parts (their comparison is paired, and the contexts are
drawn once), in one sweep or in two.

    contexts of 1..64 steps --log_counts--> Batch --loss_and_gradients--> AdamW on the stack
      (one stream per task and seed)          [run, batch, ...]            [run, ...]

>>> from hijacklens.one_layer.task import ConceptTask
>>> task = ConceptTask(bits=3, length=32)
>>> shape = {"vocab": 8, "d_model": 8, "length": 32}
>>> runs = [Run(task=task, model=OneLayerConfig(**shape, seed=s), lr=0.01) for s in (0, 1)]
>>> sweep = Sweep(runs, steps=64, batch=16, device="cpu")
>>> sweep.advance(64)
>>> len(sweep.models()), sweep.done
(2, 64)
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hijacklens.errors import InputError
from hijacklens.one_layer.architecture import DTYPES, OneLayerConfig, OneLayerWeights
from hijacklens.one_layer.checkpoint import Checkpoint
from hijacklens.one_layer.fast_path import NAMES, Batch, Weights, log_counts, loss_and_gradients
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.task import ConceptTask
from hijacklens.progress import bar

CYCLE = 64
"""Most steps that a stream draws ahead. All streams are empty after each multiple of it, so that a
sweep can be saved and continued there."""


def generator_for(seed: int, purpose: str, device: torch.device | str) -> torch.Generator:
    """The generator of a run's contexts, for `"training"` or `"evaluation"`: never the same."""
    branch = {"training": 1, "evaluation": 2}[purpose]
    state = int(np.random.SeedSequence([seed, branch]).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(state >> 1)


class Stream:
    """The training contexts of one task and seed, step after step."""

    def __init__(
        self, task: ConceptTask, seed: int, *, batch: int, dtype: str, device: torch.device
    ) -> None:
        self.task, self.batch = task, batch
        self.dtype = DTYPES[dtype]
        self.generator = generator_for(seed, "training", device)
        # Long enough that calls cost little beside their work, short enough to stay in the cache.
        budget = 2**16 if device.type == "cpu" else 2**19
        steps = max(1, min(CYCLE, budget // (batch * max(task.length, task.vocab))))
        self.ahead = 1 << (steps.bit_length() - 1)  # a power of two: it divides the cycle
        self._left: list[Batch] = []

    def step(self) -> Batch:
        """The next batch, without the axis `run`."""
        if not self._left:
            contexts = self.task.sample(self.ahead * self.batch, self.generator)
            counts = log_counts(contexts.tokens, self.task.vocab, dtype=self.dtype)
            last = contexts.tokens[:, -1]
            split = zip(
                counts.split(self.batch),
                last.split(self.batch),
                contexts.labels.split(self.batch),
                strict=True,
            )
            self._left = [Batch(*parts) for parts in split][::-1]
        return self._left.pop()


CURVE_POINTS = 200
"""A loss curve has about this many points, each the mean loss of the steps since the last."""

THREADED = 2**24
"""From this many multiplications in one product on, a step uses several CPU threads."""

PART_OF = {"W_E": "W_E", "W_V": "W_V", "W_Q": "W_QK", "W_K": "W_QK"}
"""Matrix -> the name it is frozen by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One model to train: its task, its start, its optimiser."""

    task: ConceptTask
    model: OneLayerConfig
    """Its `seed` gives the start and the contexts, its `freeze` what is not trained."""
    lr: float
    """Learning rate of AdamW."""
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        if self.model.vocab != self.task.vocab:
            raise InputError(
                f"a model over {self.model.vocab} tokens cannot train on a task of "
                f"{self.task.vocab}; give OneLayerConfig(vocab={self.task.vocab}, ...)."
            )
        for name, value in {"lr": self.lr, "weight_decay": self.weight_decay}.items():
            if not (math.isfinite(value) and value >= 0) or (name == "lr" and value == 0):
                kind = "above 0" if name == "lr" else "of at least 0"
                raise InputError(f"{name} is {value!r}; give a finite number {kind}.")


class Sweep:
    """Runs in training: their stacked weights, their optimiser, their contexts.

    Args:
        runs: The runs; they agree in `model.vocab`, `d_model`, `d_a` and `dtype`.
        steps: How many steps they will take.
        batch: Contexts per step and run.
        device: Where to train.

    Raises:
        InputError: No runs, runs of different shapes, or fewer than one step or context.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        *,
        steps: int,
        batch: int = 128,
        device: torch.device | str = "cpu",
    ) -> None:
        _check(runs, steps, batch)
        self.runs, self.steps, self.batch = tuple(runs), steps, batch
        self.device, self.done = torch.device(device), 0
        starts = [OneLayerTransformer(run.model).weights() for run in runs]
        self.weights = Weights(
            **{n: torch.stack([getattr(w, n).detach() for w in starts]).to(device) for n in NAMES}
        )
        self.gradients = Weights(**{n: torch.zeros_like(w) for n, w in self.weights.items()})
        streams: dict[tuple[ConceptTask, int], Stream] = {}
        for run in runs:
            key = (run.task, run.model.seed)
            if key not in streams:
                streams[key] = Stream(*key, batch=batch, dtype=run.model.dtype, device=self.device)
        self._streams = list(streams.values())
        self._stream_of = [list(streams).index((run.task, run.model.seed)) for run in runs]
        self._window = max(1, steps // CURVE_POINTS)
        self._losses = self.weights.W_E.new_zeros(math.ceil(steps / self._window), len(runs))
        self._slices: list[Tensor] = []
        self._optimizer = self._make_optimizer()
        self._thread_count = self._choose_threads()
        self._passes = self._make_passes()

    def advance(self, steps: int) -> None:
        """Train all runs for some steps more, at most to the end."""
        with _threads(self._thread_count):
            for _ in range(min(steps, self.steps - self.done)):
                self._step()

    def models(self) -> list[OneLayerTransformer]:
        """The models as they are now, one per run, on the sweep's device; copies."""
        models = []
        for i, run in enumerate(self.runs):
            model = OneLayerTransformer(run.model).to(self.device)
            model.fill(OneLayerWeights(**{name: stack[i] for name, stack in self.weights.items()}))
            models.append(model)
        return models

    def curve_steps(self) -> list[int]:
        """The steps at which `losses` has its points, those already taken."""
        ends = range(self._window, self.steps + self._window, self._window)
        return [step for end in ends if (step := min(end, self.steps)) <= self.done]

    def losses(self) -> Float[Tensor, "point run"]:
        """Training loss in nats: at each curve step the mean over the steps since the last."""
        return self._losses[: len(self.curve_steps())].cpu()

    def state(self) -> dict[str, Tensor]:
        """All that is needed to go on, as named tensors; not copies.

        Only at the end and at multiples of `CYCLE`, where no context is drawn ahead.
        """
        if self.done % CYCLE and self.done < self.steps:
            raise ValueError(f"a sweep has a state every {CYCLE} steps, not at step {self.done}")
        tensors = {f"weights.{name}": stack for name, stack in self.weights.items()}
        tensors |= {"losses": self._losses, "done": torch.tensor(self.done)}
        for i, stream in enumerate(self._streams):
            tensors[f"generator.{i}"] = stream.generator.get_state()
        for i, part in enumerate(self._slices):
            for name, value in self._optimizer.state[part].items():
                tensors[f"adamw.{i}.{name}"] = value
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to a state of a sweep of the same runs.

        Raises:
            InputError: The tensors are not those of such a state.
        """
        self._check_state(tensors)
        for name, stack in self.weights.items():
            stack.copy_(tensors[f"weights.{name}"])
        self._losses.copy_(tensors["losses"])
        self.done = int(tensors["done"])
        for i, stream in enumerate(self._streams):
            try:
                stream.generator.set_state(tensors[f"generator.{i}"])
            except RuntimeError as error:
                raise InputError(
                    f"the saved state of generator {i} is none ({error}). Delete it or say "
                    "overwrite (--overwrite on the command line) to start anew."
                ) from error
        for i, part in enumerate(self._slices):
            prefix = f"adamw.{i}."
            self._optimizer.state[part] = {
                name.removeprefix(prefix): value.to(self.device, copy=True)
                for name, value in tensors.items()
                if name.startswith(prefix)
            }

    def _check_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse a state that cannot be gone on from, before anything is changed."""
        wanted = {
            **{f"weights.{name}": stack for name, stack in self.weights.items()},
            "losses": self._losses,
            "done": torch.tensor(self.done),
            **{
                f"generator.{i}": stream.generator.get_state()
                for i, stream in enumerate(self._streams)
            },
        }
        if "adamw.0.step" in tensors:  # there is none before the first step
            for i, part in enumerate(self._slices):
                wanted |= {f"adamw.{i}.{name}": part for name in ("exp_avg", "exp_avg_sq")}
                wanted[f"adamw.{i}.step"] = torch.tensor(0.0)
        kinds, found = (
            {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in given.items()}
            for given in (wanted, tensors)
        )
        wrong = sorted(n for n in {*kinds, *found} if kinds.get(n) != found.get(n))
        done = -1 if wrong else int(tensors["done"])
        if wrong or not 0 <= done <= self.steps:
            what = f"{wrong[0]} is missing or of another shape" if wrong else f"done is {done}"
            raise InputError(
                f"the saved state is none of this run ({what}). Delete it or say overwrite "
                "(--overwrite on the command line) to start anew."
            )

    def _step(self) -> None:
        batches = [stream.step() for stream in self._streams]
        losses = []
        for runs, wanted in self._passes:
            batch = Batch.stack([batches[i] for i in self._stream_of[runs]])
            weights, gradients = self.weights.runs(runs), self.gradients.runs(runs)
            losses.append(loss_and_gradients(batch, weights, gradients, wanted=wanted))
        self._optimizer.step()
        point = self.done // self._window
        length = min(self._window, self.steps - point * self._window)
        self._losses[point] += torch.cat(losses) / length
        self.done += 1

    def _make_optimizer(self) -> torch.optim.AdamW:
        """AdamW over views of the stack: neighbouring runs with the same settings are one slice."""
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, stack in self.weights.items():
            gradient = getattr(self.gradients, name)

            def setting(i: int, part: str = PART_OF[name]) -> tuple[float, float] | None:
                run = self.runs[i]
                return None if part in run.model.freeze else (run.lr, run.weight_decay)

            for key, members in groupby(range(len(self.runs)), setting):
                if key is not None:
                    span = list(members)
                    chosen = slice(span[0], span[-1] + 1)
                    part = stack[chosen]
                    part.grad = gradient[chosen]
                    groups.setdefault(key, []).append(part)
                    self._slices.append(part)
        settings = [
            {"params": parts, "lr": lr, "weight_decay": decay}
            for (lr, decay), parts in groups.items()
        ]
        if not settings:
            raise InputError("every part of every run is frozen: leave something to train.")
        return torch.optim.AdamW(settings, fused=True)

    def _choose_threads(self) -> int:
        """One thread where the products are small.

        Threads that wait for each other after every small product cost more than they bring: next
        to nothing on an idle machine, a factor of 20 on a busy one.
        """
        model = self.runs[0].model
        largest = self.batch * model.d_model * max(model.vocab, model.d_model)
        return 1 if largest < THREADED else torch.get_num_threads()

    def _make_passes(self) -> list[tuple[slice, frozenset[str]]]:
        """Which runs go through the products together, with the gradients they need.

        On a CPU the buffers of one pass shall stay in the cache of a core (128 KiB each in
        float32): stacking more runs saves nothing once the products are large, and costs a
        quarter of the time at vocab 256.
        """
        count = len(self.runs)
        size = count
        if self.device.type == "cpu":
            budget = 2**15 * self._thread_count
            size = max(1, budget // (self.batch * self.runs[0].model.vocab))
        passes = []
        for start in range(0, count, size):
            runs = slice(start, min(start + size, count))
            wanted = {
                name
                for name in NAMES
                if any(PART_OF[name] not in run.model.freeze for run in self.runs[runs])
            }
            passes.append((runs, frozenset(wanted)))
        return passes


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Run the body with this many CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check(runs: Sequence[Run], steps: int, batch: int) -> None:
    if not runs:
        raise InputError("a sweep needs at least one run, and got none.")
    for name, value in {"steps": steps, "batch": batch}.items():
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name} is {value!r}; give a whole number of at least 1.")
    shapes = {(r.model.vocab, r.model.d_model, r.model.d_a, r.model.dtype) for r in runs}
    if len(shapes) > 1:
        raise InputError(
            "runs of one sweep have the same (vocab, d_model, d_attn, dtype), these have "
            f"{sorted(shapes)}; train each shape in a sweep of its own."
        )


def train_runs(
    runs: Sequence[Run],
    *,
    steps: int,
    batch: int = 128,
    device: torch.device | str = "cpu",
    checkpoint: Checkpoint | None = None,
    checkpoint_seconds: float = 30.0,
    label: str = "training",
    quiet: bool = False,
) -> Sweep:
    """Train runs to their end, with a progress bar, and go on from a checkpoint if there is one.

    A run that was killed and is started again ends as if it had never stopped: the state holds
    the weights, the optimiser and the generators. On a CPU that is bit for bit; a GPU adds up
    the gradients of equal last tokens in no fixed order, so there it is up to rounding.

    Args:
        runs: The runs; see `Sweep`.
        steps: Steps of each run.
        batch: Contexts per step and run.
        device: Where to train.
        checkpoint: Where the state is kept; None keeps none.
        checkpoint_seconds: Least time between two checkpoints, in seconds.
        label: What the progress bar says.
        quiet: Draw no bar.

    Raises:
        InputError: Bad runs (see `Sweep`), or a checkpoint of another run.
    """
    sweep = Sweep(runs, steps=steps, batch=batch, device=device)
    state = checkpoint.load() if checkpoint else None
    if state is not None:
        sweep.load_state(state)
    saved = time.monotonic()
    with bar(steps, unit="steps", label=label, quiet=quiet) as progress:
        progress.update(sweep.done)
        while sweep.done < steps:
            sweep.advance(1)
            progress.update(1)
            due = sweep.done % CYCLE == 0 and time.monotonic() - saved >= checkpoint_seconds
            if checkpoint and (due or sweep.done == steps):
                checkpoint.save(sweep.state())
                saved = time.monotonic()
    return sweep
