"""Many one-layer models trained together in one batched program.

Runs whose shapes agree (vocabulary, widths, batch, steps, dtype) train together: their weights are
stacked along a leading axis, each step is one batched product for all (`fast_path`), and one
`torch.optim.AdamW` updates slices of the stack, with a learning rate and weight decay per run.
Seeds, learning rates, frozen parts, the start of W_V, and the task itself (omega, beta, support,
context length) may differ from run to run.

A run's result does not depend on the runs it is stacked with, up to rounding: products of several
runs add in another order than those of one. Its start and its contexts come from its seed alone.
Runs of one seed on one task therefore see the same contexts, also with different
learning rates or frozen parts. Their comparison is paired, and the contexts are drawn once.

    contexts of 1..64 steps --log_counts--> ContextBatch --loss_and_gradients--> AdamW on the stack
      (one stream per task and seed)          [run, batch, ...]                    [run, ...]
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from hijacklens.errors import InputError, choice, whole_number
from hijacklens.one_layer.architecture import DTYPES, NAMES, PART_OF, OneLayerWeights
from hijacklens.one_layer.checkpoint import Checkpoint
from hijacklens.one_layer.embeddings import seeded_generator
from hijacklens.one_layer.fast_path import ContextBatch, log_counts, loss_and_gradients
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.recipe import SCHEDULES, Run
from hijacklens.one_layer.task import ConceptTask
from hijacklens.progress import bar

CYCLE = 64
"""A stream draws at most this many steps ahead. All streams are empty after each multiple of it,
so that the state can be saved and resumed there."""

CURVE_POINTS = 200
"""A loss curve has about this many points, each the mean loss of the steps since the last."""

THREADED = 2**24
"""A step uses several CPU threads if its largest product has at least this many multiplications."""

START_AGAIN = (
    "Delete it or pass overwrite=True (--overwrite on the command line) to start from scratch."
)


def generator_for(seed: int, purpose: str, device: torch.device | str) -> torch.Generator:
    """Return the generator of a run's contexts for `"training"` or `"evaluation"`: never equal."""
    return seeded_generator(seed, {"training": 1, "evaluation": 2}[purpose], device=device)


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


class StackedRuns:
    """Runs in training: their stacked weights, their optimiser, their contexts.

    The runs agree in `model.vocab`, `d_model`, `d_a` and `dtype`. Each takes `steps` steps of
    `batch` contexts; `schedule` is a key of `SCHEDULES`.

    Raises:
        InputError: No runs, runs of different shapes, an unknown schedule, or fewer than one step
            or context.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        *,
        steps: int,
        batch: int = 128,
        schedule: str = "constant",
        device: torch.device | str = "cpu",
    ) -> None:
        if not runs:
            raise InputError("stacked training needs at least one run, and got none.")
        shapes = {(r.model.vocab, r.model.d_model, r.model.d_a, r.model.dtype) for r in runs}
        if len(shapes) > 1:
            raise InputError(
                "stacked runs must have the same (vocab, d_model, d_attn, dtype); got "
                f"{sorted(shapes)}; train each shape separately."
            )
        self.runs, self.done = tuple(runs), 0
        self.steps = whole_number("steps", steps, least=1)
        self.batch = whole_number("batch", batch, least=1)
        self._factor = SCHEDULES[choice("schedule", schedule, tuple(SCHEDULES))]
        self.device = torch.device(device)
        starts = [OneLayerTransformer(run.model).weights() for run in runs]
        self.weights = OneLayerWeights.stack(starts).map(lambda w: w.detach().to(device))
        self.gradients = self.weights.map(torch.zeros_like)
        dtype = runs[0].model.dtype
        keys = [(run.task, run.model.seed) for run in runs]
        once, same = list(dict.fromkeys(keys)), {"batch": self.batch, "device": self.device}
        self._streams = [Stream(*key, dtype=dtype, **same) for key in once]
        self._stream_of = [once.index(key) for key in keys]
        self._window = max(1, self.steps // CURVE_POINTS)
        self._losses = self.weights.W_E.new_zeros(math.ceil(self.steps / self._window), len(runs))
        self._slices: list[Tensor] = []
        self._optimizer = self._make_optimizer()
        # Threads that wait for each other after every small product cost more than they save:
        # almost nothing on an idle machine, a factor of 20 on a busy one.
        _, vocab, d_model = self.weights.W_E.shape
        largest = self.batch * d_model * max(vocab, d_model)
        self._thread_count = 1 if largest < THREADED else torch.get_num_threads()
        self._passes = list(self._split())

    def advance(self, steps: int) -> None:
        """Train all runs for some more steps, at most to the end."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._thread_count)
        try:
            for _ in range(min(steps, self.steps - self.done)):
                self._step()
        finally:
            torch.set_num_threads(before)

    def models(self) -> list[OneLayerTransformer]:
        """Return copies of the models as they are now, one per run, on the device of training."""
        models = [OneLayerTransformer(run.model).to(self.device) for run in self.runs]
        for i, model in enumerate(models):
            model.fill(self.weights[i])
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
        tensors = {f"weights.{name}": stack for name, stack in self.weights.items()}
        tensors |= {"losses": self._losses, "done": torch.tensor(self.done)}
        for i, stream in enumerate(self._streams):
            tensors[f"generator.{i}"] = stream.generator.get_state()
        for i, part in enumerate(self._slices):
            for name, value in self._optimizer.state[part].items():
                tensors[f"adamw.{i}.{name}"] = value
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Return to a state of the same runs.

        Raises:
            InputError: The tensors are not a state of these runs.
        """
        current = self.state()
        ours, theirs = (
            {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}
            for state in (current, tensors)
        )
        wrong = sorted(n for n in {*ours, *theirs} if ours.get(n) != theirs.get(n))
        done = -1 if wrong else int(tensors["done"])
        if not 0 <= done <= self.steps:
            fault = f"{wrong[0]} is missing or of another shape" if wrong else f"done is {done}"
            raise InputError(f"the saved state is not one of these runs ({fault}). {START_AGAIN}")
        for name, tensor in current.items():
            tensor.copy_(tensors[name])
        self.done = done
        for i, stream in enumerate(self._streams):
            try:
                stream.generator.set_state(tensors[f"generator.{i}"])
            except RuntimeError as error:
                raise InputError(
                    f"the saved state of generator {i} is invalid ({error}). {START_AGAIN}"
                ) from error

    def _step(self) -> None:
        batches = [stream.step() for stream in self._streams]
        losses = []
        for streams, weights, gradients, names in self._passes:
            batch = ContextBatch.stack([batches[i] for i in streams])
            losses.append(loss_and_gradients(batch, weights, gradients, names=names))
        factor = self._factor(self.done / self.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = factor * group["initial_lr"]
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
            settings = [
                None if PART_OF[name] in run.model.freeze else (run.lr, run.weight_decay)
                for run in self.runs
            ]
            for key, members in groupby(range(len(self.runs)), settings.__getitem__):
                if key is not None:
                    indices = list(members)
                    neighbours = slice(indices[0], indices[-1] + 1)
                    part = stack[neighbours]
                    part.grad = gradient[neighbours]
                    groups.setdefault(key, []).append(part)
                    self._slices.append(part)
        if not groups:
            raise InputError("every part of every run is frozen: leave something to train.")
        optimizer = torch.optim.AdamW(
            [
                {"params": parts, "lr": lr, "initial_lr": lr, "weight_decay": decay}
                for (lr, decay), parts in groups.items()
            ],
            fused=True,
        )
        for part in self._slices:  # before the first step, so that a state has the same tensors
            optimizer.state[part] = {
                "step": torch.zeros((), dtype=torch.float32, device=self.device),
                "exp_avg": torch.zeros_like(part),
                "exp_avg_sq": torch.zeros_like(part),
            }
        return optimizer

    def _split(self) -> Iterator[tuple[list[int], OneLayerWeights, OneLayerWeights, set[str]]]:
        """Choose which runs go through the products together.

        Yields the streams of these runs, views of their weights and gradients, and the matrices
        that at least one of them trains. On a CPU the buffers of one pass must stay in the cache of
        a core (128 KiB each in float32): stacking more runs saves nothing once the products are
        large, and costs a quarter of the time at vocab 256.
        """
        count = size = len(self.runs)
        if self.device.type == "cpu":
            budget = 2**15 * self._thread_count
            size = max(1, budget // (self.batch * self.runs[0].model.vocab))
        for start in range(0, count, size):
            part = slice(start, start + size)
            frozen = [run.model.freeze for run in self.runs[part]]
            names = {n for n in NAMES if any(PART_OF[n] not in parts for parts in frozen)}
            yield self._stream_of[part], self.weights[part], self.gradients[part], names


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

    At least `checkpoint_seconds` pass between two checkpoints.

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
