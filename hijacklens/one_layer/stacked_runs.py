"""Many one-layer models trained together in one batched program.

Runs whose shapes agree (vocabulary, widths, batch, steps, dtype) train together: their weights are
stacked along a leading axis, each step is one batched product for all (`fast_path`), and one
`torch.optim.AdamW` updates slices of the stack, with a learning rate and weight decay per run.
Seeds, learning rates, frozen parts, the start of W_V, and the task itself (omega, beta, support,
context length) may differ from run to run.

A run's result does not depend on the runs it is stacked with. Its start and its contexts come from
its seed alone. Runs of one seed on one task therefore see the same contexts, also with different
learning rates or frozen parts. Their comparison is paired, and the contexts are drawn once.

    contexts of 1..64 steps --log_counts--> ContextBatch --loss_and_gradients--> AdamW on the stack
      (one stream per task and seed)          [run, batch, ...]                    [run, ...]

>>> from hijacklens.one_layer.architecture import OneLayerConfig
>>> task = ConceptTask(bits=3, length=32)
>>> shape = {"vocab": 8, "d_model": 8, "length": 32}
>>> runs = [Run(task=task, model=OneLayerConfig(**shape, seed=s), lr=0.01) for s in (0, 1)]
>>> stacked = StackedRuns(runs, steps=64, batch=16)
>>> stacked.advance(64)
>>> len(stacked.models()), stacked.done
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

from hijacklens.errors import InputError, whole_number
from hijacklens.one_layer.architecture import DTYPES, NAMES, OneLayerWeights
from hijacklens.one_layer.checkpoint import Checkpoint
from hijacklens.one_layer.fast_path import ContextBatch, log_counts, loss_and_gradients
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.recipe import Run
from hijacklens.one_layer.task import ConceptTask
from hijacklens.progress import bar

CYCLE = 64
"""A stream draws at most this many steps ahead. All streams are empty after each multiple of it,
so that the state can be saved and resumed there."""

CURVE_POINTS = 200
"""A loss curve has about this many points, each the mean loss of the steps since the last."""

THREADED = 2**24
"""A step uses several CPU threads if its largest product has at least this many multiplications."""

PART_OF = {"W_E": "W_E", "W_V": "W_V", "W_Q": "W_QK", "W_K": "W_QK"}
"""Matrix -> the name that freezes it."""

START_AGAIN = "Delete it or say overwrite (--overwrite on the command line) to start from scratch."


def generator_for(seed: int, purpose: str, device: torch.device | str) -> torch.Generator:
    """Return the generator of a run's contexts for `"training"` or `"evaluation"`: never equal."""
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
        # Long enough that the calls themselves cost little, short enough to stay in the cache.
        budget = 2**16 if device.type == "cpu" else 2**19
        steps = max(1, min(CYCLE, budget // (batch * max(task.length, task.vocab))))
        self.ahead = 1 << (steps.bit_length() - 1)  # a power of two: it divides the cycle
        self._drawn: list[ContextBatch] = []

    def step(self) -> ContextBatch:
        """Return the next batch, without the axis `run`."""
        if not self._drawn:
            contexts = self.task.sample(self.ahead * self.batch, self.generator)
            counts = log_counts(contexts.tokens, self.task.vocab, dtype=self.dtype)
            tensors = (counts, contexts.tokens[:, -1], contexts.labels)
            batches = zip(*(tensor.split(self.batch) for tensor in tensors), strict=True)
            self._drawn = [ContextBatch(*parts) for parts in batches][::-1]
        return self._drawn.pop()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """Runs that go through the products together: views of the stack."""

    streams: list[int]
    """For each run the index of its stream."""
    weights: OneLayerWeights
    gradients: OneLayerWeights
    trained: frozenset[str]
    """Matrices that at least one of the runs trains."""


class StackedRuns:
    """Runs in training: their stacked weights, their optimiser, their contexts.

    Args:
        runs: The runs; they agree in `model.vocab`, `d_model`, `d_a` and `dtype`.
        steps: How many steps each of them takes in all.
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
        _check_shapes(runs)
        self.runs, self.done = tuple(runs), 0
        self.steps = whole_number("steps", steps, least=1)
        self.batch = whole_number("batch", batch, least=1)
        self.device = torch.device(device)
        starts = [OneLayerTransformer(run.model).weights() for run in runs]
        self.weights = OneLayerWeights.stack(starts).map(lambda w: w.detach().to(device))
        self.gradients = self.weights.map(torch.zeros_like)
        dtype = runs[0].model.dtype
        keys = [(run.task, run.model.seed) for run in runs]
        streams = {
            key: Stream(*key, batch=self.batch, dtype=dtype, device=self.device)
            for key in dict.fromkeys(keys)
        }
        self._streams = list(streams.values())
        self._stream_of = [list(streams).index(key) for key in keys]
        self._window = max(1, self.steps // CURVE_POINTS)
        self._losses = self.weights.W_E.new_zeros(math.ceil(self.steps / self._window), len(runs))
        self._slices: list[Tensor] = []
        self._optimizer = self._make_optimizer()
        self._thread_count = self._choose_threads()
        self._passes = self._make_passes()

    def advance(self, steps: int) -> None:
        """Train all runs for some more steps, at most to the end."""
        with _threads(self._thread_count):
            for _ in range(min(steps, self.steps - self.done)):
                self._step()

    def models(self) -> list[OneLayerTransformer]:
        """Return copies of the models as they are now, one per run, on the device of training."""
        models = []
        for i, run in enumerate(self.runs):
            model = OneLayerTransformer(run.model).to(self.device)
            model.fill(self.weights[i])
            models.append(model)
        return models

    def curve_steps(self) -> list[int]:
        """Return the steps already taken at which `losses` has its points."""
        ends = range(self._window, self.steps + self._window, self._window)
        return [step for end in ends if (step := min(end, self.steps)) <= self.done]

    def losses(self) -> Float[Tensor, "point run"]:
        """Return the training loss in nats: at each curve step the mean since the last one."""
        return self._losses[: len(self.curve_steps())].cpu()

    def state(self) -> dict[str, Tensor]:
        """Return named tensors that suffice to resume; not copies.

        A state exists only at the end and at multiples of `CYCLE`, where no context is drawn ahead.
        """
        if self.done % CYCLE and self.done < self.steps:
            raise ValueError(f"runs have a state every {CYCLE} steps, not at step {self.done}")
        tensors = self._tensors()
        for i, part in enumerate(self._slices):
            for name, value in self._optimizer.state[part].items():
                tensors[f"adamw.{i}.{name}"] = value
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Return to a state of the same runs.

        Raises:
            InputError: The tensors are not a state of these runs.
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
                    f"the saved state of generator {i} is invalid ({error}). {START_AGAIN}"
                ) from error
        for i, part in enumerate(self._slices):
            prefix = f"adamw.{i}."
            self._optimizer.state[part] = {
                name.removeprefix(prefix): value.to(self.device, copy=True)
                for name, value in tensors.items()
                if name.startswith(prefix)
            }

    def _tensors(self) -> dict[str, Tensor]:
        """Return the named tensors of a state except those of the optimiser."""
        return {
            **{f"weights.{name}": stack for name, stack in self.weights.items()},
            "losses": self._losses,
            "done": torch.tensor(self.done),
            **{f"generator.{i}": s.generator.get_state() for i, s in enumerate(self._streams)},
        }

    def _check_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse a state that does not fit these runs, before anything is changed."""
        expected = self._tensors()
        if "adamw.0.step" in tensors:  # the optimiser has no state before the first step
            for i, part in enumerate(self._slices):
                expected |= {f"adamw.{i}.{name}": part for name in ("exp_avg", "exp_avg_sq")}
                expected[f"adamw.{i}.step"] = torch.tensor(0.0)
        ours, theirs = (
            {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
            for state in (expected, tensors)
        )
        wrong = sorted(n for n in {*ours, *theirs} if ours.get(n) != theirs.get(n))
        done = -1 if wrong else int(tensors["done"])
        if not 0 <= done <= self.steps:
            fault = f"{wrong[0]} is missing or of another shape" if wrong else f"done is {done}"
            raise InputError(f"the saved state is not one of these runs ({fault}). {START_AGAIN}")

    def _step(self) -> None:
        batches = [stream.step() for stream in self._streams]
        losses = []
        for one in self._passes:
            batch = ContextBatch.stack([batches[i] for i in one.streams])
            losses.append(loss_and_gradients(batch, one.weights, one.gradients, names=one.trained))
        self._optimizer.step()
        point = self.done // self._window
        length = min(self._window, self.steps - point * self._window)
        self._losses[point] += torch.cat(losses) / length
        self.done += 1

    def _make_optimizer(self) -> torch.optim.AdamW:
        """Make an AdamW over views of the stack; neighbours with equal settings share a view."""
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, stack in self.weights.items():
            gradient = getattr(self.gradients, name)

            def setting(i: int, part: str = PART_OF[name]) -> tuple[float, float] | None:
                run = self.runs[i]
                return None if part in run.model.freeze else (run.lr, run.weight_decay)

            for key, members in groupby(range(len(self.runs)), setting):
                if key is not None:
                    indices = list(members)
                    neighbours = slice(indices[0], indices[-1] + 1)
                    part = stack[neighbours]
                    part.grad = gradient[neighbours]
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
        """Choose one thread where the products are small.

        Threads that wait for each other after every small product cost more than they save: almost
        nothing on an idle machine, a factor of 20 on a busy one.
        """
        model = self.runs[0].model
        largest = self.batch * model.d_model * max(model.vocab, model.d_model)
        return 1 if largest < THREADED else torch.get_num_threads()

    def _make_passes(self) -> list[_Pass]:
        """Choose which runs go through the products together.

        On a CPU the buffers of one pass must stay in the cache of a core (128 KiB each in
        float32): stacking more runs saves nothing once the products are large, and costs a
        quarter of the time at vocab 256.
        """
        count = size = len(self.runs)
        if self.device.type == "cpu":
            budget = 2**15 * self._thread_count
            size = max(1, budget // (self.batch * self.runs[0].model.vocab))
        passes = []
        for start in range(0, count, size):
            part = slice(start, start + size)
            frozen = [run.model.freeze for run in self.runs[part]]
            trained = {n for n in NAMES if any(PART_OF[n] not in names for names in frozen)}
            passes.append(
                _Pass(
                    streams=self._stream_of[part],
                    weights=self.weights[part],
                    gradients=self.gradients[part],
                    trained=frozenset(trained),
                )
            )
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


def _check_shapes(runs: Sequence[Run]) -> None:
    if not runs:
        raise InputError("stacked training needs at least one run, and got none.")
    shapes = {(r.model.vocab, r.model.d_model, r.model.d_a, r.model.dtype) for r in runs}
    if len(shapes) > 1:
        raise InputError(
            "stacked runs must have the same (vocab, d_model, d_attn, dtype); got "
            f"{sorted(shapes)}; train each shape separately."
        )


def train_runs(
    stacked: StackedRuns,
    *,
    checkpoint: Checkpoint | None = None,
    checkpoint_seconds: float = 30.0,
    label: str = "training",
    quiet: bool = False,
) -> StackedRuns:
    """Train runs to their end, with a progress bar, resuming from a checkpoint if there is one.

    A run that was killed and is started again ends as if it had never stopped: the state holds
    the weights, the optimiser and the generators. On a CPU the results are equal bit for bit; on a
    GPU they are equal up to rounding, since it adds gradients of equal last tokens in any order.

    Args:
        stacked: The runs.
        checkpoint: Where to save the state; None saves none.
        checkpoint_seconds: Least time between two checkpoints, in seconds.
        label: Text of the progress bar.
        quiet: Draw no bar.

    Raises:
        InputError: The checkpoint is one of other runs.
    """
    state = checkpoint.load() if checkpoint else None
    if state is not None:
        stacked.load_state(state)
    saved = time.monotonic()
    with bar(stacked.steps, unit="steps", label=label, quiet=quiet) as progress:
        progress.update(stacked.done)
        while stacked.done < stacked.steps:
            stacked.advance(1)
            progress.update(1)
            due = stacked.done % CYCLE == 0 and time.monotonic() - saved >= checkpoint_seconds
            if checkpoint and (due or stacked.done == stacked.steps):
                checkpoint.save(stacked.state())
                saved = time.monotonic()
    return stacked
