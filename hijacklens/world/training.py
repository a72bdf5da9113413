"""Training an ordinary GPT-2 or LLaMA on documents of a pocket world, on one CPU core.

The folder of a world holds `world.json` (knobs, recipe, losses), `facts.jsonl` (a query per subject
and relation), the model in `model/`, and the models along the way in `checkpoints/step-000500/` and
so on: ordinary folders for `hijacklens.load_model`. The same call resumes after a kill and ends
with the same weights.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hijacklens.errors import InputError, one_of_type
from hijacklens.files import make_folder, write_json, write_text
from hijacklens.models.packaged import quiet_transformers
from hijacklens.one_layer.checkpoint import Checkpoint
from hijacklens.progress import bar
from hijacklens.world.distribution import Documents, Reader
from hijacklens.world.trained import (
    CHECKPOINTS,
    MODEL,
    RECORD,
    UNFINISHED,
    Recipe,
    TrainedWorld,
    check_world_folder,
    finished_world,
    load_world,
)
from hijacklens.world.world import World

INITIAL = 0.1
"""Standard deviation of initial weights; with the usual .02 so narrow a model starts to learn facts
several times later."""
UNSEEN = 2**40
"""The number of a batch that no training reaches."""


def tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Return a plain tokenizer with a token per word of the world and none besides."""
    core = Tokenizer(models.WordLevel(world.ids, unk_token=world.vocabulary[0]))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token=world.vocabulary[0])


def untrained(world: World, recipe: Recipe) -> PreTrainedModel:
    """Return the model that a training begins with, drawn by the seed of the recipe.

    Without MLPs, a model keeps MLPs of width 1 whose output is zero and is not trained, so that it
    remains a plain model of its family.
    """
    shape: dict[str, Any] = {"vocab_size": len(world.vocabulary), "initializer_range": INITIAL}
    shape |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    inner = 4 * recipe.d_model if recipe.mlps else 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        if recipe.family == "gpt2":
            dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
            model: Any = GPT2LMHeadModel(
                GPT2Config(
                    n_positions=world.length, n_embd=recipe.d_model, n_layer=recipe.layers,
                    n_head=recipe.heads, n_inner=inner,
                    activation_function="gelu_pytorch_tanh", **shape, **dropout,
                )
            )  # fmt: skip
            outputs = [block.mlp.c_proj for block in model.transformer.h]
        else:
            model = LlamaForCausalLM(
                LlamaConfig(
                    max_position_embeddings=world.length, hidden_size=recipe.d_model,
                    num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads,
                    intermediate_size=inner, tie_word_embeddings=True, **shape,
                )
            )  # fmt: skip
            outputs = [block.mlp.down_proj for block in model.model.layers]
    if not recipe.mlps:
        for parameter in (p for output in outputs for p in output.parameters()):
            torch.nn.init.zeros_(parameter)
            parameter.requires_grad_(False)
    return model


def train_world(
    world: World,
    recipe: Recipe | None = None,
    *,
    out: str | Path,
    overwrite: bool = False,
    quiet: bool = False,
) -> TrainedWorld:
    """Train a model on documents of a world, each seen once.

    The loss is the mean over all tokens. AdamW; the learning rate rises linearly in the first
    tenth of the steps and then falls to zero along a cosine.

    Args:
        world: The distribution of the documents.
        recipe: Shape of the model and how to train it.
        out: Folder for all files; during training also for its state, so that the same call
            resumes after a kill and ends with the same weights.
        overwrite: Replace what the folder holds of another world.
        quiet: Draw no progress bar.

    Raises:
        InputError: The folder holds a world or the state of another training.

    Note:
        The default takes about a minute on one CPU core. Weights are the same on every run with
        the same number of threads on the same machine.
    """
    one_of_type("world", world, World, "World(sharing=0)")
    recipe = one_of_type("recipe", recipe or Recipe(), Recipe, "Recipe(steps=1000)")
    folder = check_world_folder(out, world, recipe, overwrite=overwrite)
    make_folder(folder, out)
    if finished_world(folder, world, recipe) and not overwrite:
        return load_world(folder)
    checkpoint = Checkpoint(folder, {"world": world.record(), "recipe": asdict(recipe)})
    try:
        state = checkpoint.load()
    except InputError:
        if not overwrite:
            raise
        checkpoint.remove()
        state = None
    # A finished world stays until the new one is complete.
    part = TrainedWorld(folder / UNFINISHED, world, recipe, {}, {}, 0.0)
    if state is None:
        shutil.rmtree(part.folder, ignore_errors=True)
    part.folder.mkdir(exist_ok=True)
    run = _Run(world, recipe)
    run.restore(state)
    start = time.perf_counter()
    label = f"pocket world, {recipe.layers} layers, sharing {world.sharing:g}, seed {recipe.seed}"
    with bar(recipe.steps, unit="steps", label=label, quiet=quiet) as progress:
        progress.update(run.step)
        while run.step < recipe.steps:
            run.train_step()
            progress.update()
            if run.step in recipe.saved:
                run.save_model(part.checkpoints[run.step])
            if run.step % recipe.state_steps == 0:
                checkpoint.save(run.state())
    run.save_model(part.model)
    lines = [json.dumps(query, ensure_ascii=False) for query in world.queries()]
    write_text(part.facts, "\n".join(lines) + "\n")
    scores = evaluate(run.model, world, seed=recipe.seed)
    seconds = round(time.perf_counter() - start, 1)
    record = {"world": world.record(), "recipe": asdict(recipe), "losses": run.losses}
    write_json(part.folder / RECORD, {**record, "scores": scores, "seconds": seconds})
    _move_into_place(part, folder)
    checkpoint.remove()
    return load_world(folder)


def _move_into_place(part: TrainedWorld, folder: Path) -> None:
    """Put a complete world in the place of the one in a folder; the record is moved last."""
    if (folder / RECORD).exists():
        (folder / RECORD).unlink()
        for old in (MODEL, CHECKPOINTS):
            shutil.rmtree(folder / old, ignore_errors=True)
    for path in (*part.checkpoints.values(), part.facts, part.folder / RECORD):
        if path.exists():  # a kill may have come after it was moved
            target = folder / path.relative_to(part.folder)
            target.parent.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            path.replace(target)
    shutil.rmtree(part.folder)


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, world: World, *, documents: int = 256, seed: int = 0
) -> dict[str, float]:
    """Compare a model with the ideal reader of its world, on fresh documents.

    Returns:
        `loss` and `exact_loss`, the mean loss of the model and of a reader who knows all facts, in
        nats a token; and `recall_frequent` and `recall`, the fractions of the most frequent tenth
        of the queries, and of all, whose true object is the most likely next word.
    """
    model.eval()
    fresh = Documents(world, seed=seed).batch(UNSEEN, documents)
    batch, reader = torch.from_numpy(fresh), Reader(world)
    logits = model(batch).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    exact = [
        reader.document_log_probability(row) - reader.document_log_probability(row[:1])
        for row in fresh
    ]
    queries = list(world.queries())
    prompts = [world.tokens(query["template"].format(query["subject"])) for query in queries]
    right = np.zeros(len(queries))
    for length in {len(prompt) for prompt in prompts}:
        rows = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        for part in np.array_split(rows, -(-len(rows) // 512)):
            top = model(torch.tensor([prompts[i] for i in part])).logits[:, -1].argmax(-1)
            right[part] = [
                world.vocabulary[t] == queries[i]["target_true"]
                for t, i in zip(top, part, strict=True)
            ]
    return {
        "loss": round(float(loss), 5),
        "exact_loss": round(-float(np.mean(exact)) / (world.length - 1), 5),
        "recall_frequent": round(float(right[: -(-len(right) // 10)].mean()), 5),
        "recall": round(float(right.mean()), 5),
    }


class _Run:
    """The state of a training: model, optimiser, step and losses."""

    def __init__(self, world: World, recipe: Recipe) -> None:
        self.world, self.recipe, self.step = world, recipe, 0
        self.model = untrained(world, recipe).train()
        self.documents = Documents(world, seed=recipe.seed)
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        matrices = [p for p in self.trained.values() if p.dim() > 1]
        vectors = [p for p in self.trained.values() if p.dim() == 1]
        groups = [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.99), fused=True)
        self.losses: dict[int, float] = {}
        self._sum = torch.zeros(())

    def train_step(self) -> None:
        """Take one step on fresh documents."""
        recipe = self.recipe
        batch = torch.from_numpy(self.documents.batch(self.step, recipe.batch))
        warm = (self.step + 1) / max(recipe.steps // 10, 1)
        left = 0.5 * (1 + np.cos(np.pi * self.step / recipe.steps))
        for group in self.optimiser.param_groups:
            group["lr"] = recipe.lr * min(1.0, warm, left)
        logits = self.model(batch).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimiser.step()
        self.step += 1
        self._sum += loss.detach()
        if self.step % recipe.log_steps == 0 or self.step == recipe.steps:
            since = self.step - max(self.losses, default=0)
            self.losses[self.step] = round(float(self._sum) / since, 5)
            self._sum = torch.zeros(())

    def state(self) -> dict[str, Tensor]:
        """Return all that the next step depends on."""
        state = {f"model.{name}": p for name, p in self.trained.items()}
        for name, parameter in self.trained.items():
            for key, value in self.optimiser.state[parameter].items():
                state[f"{key}.{name}"] = value
        steps = torch.tensor([self.step, *self.losses], dtype=torch.int64)
        losses = torch.tensor([float(self._sum), *self.losses.values()], dtype=torch.float64)
        return state | {"steps": steps, "losses": losses}

    def restore(self, state: Mapping[str, Tensor] | None) -> None:
        """Return to a saved state; None leaves the start."""
        if state is None:
            return
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state[f"model.{name}"])
                self.optimiser.state[parameter] = {
                    key: state[f"{key}.{name}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")
                }
        self.step, *steps = state["steps"].tolist()
        total, *losses = state["losses"].tolist()
        self._sum = torch.tensor(total, dtype=torch.float32)
        self.losses.update(zip(steps, losses, strict=True))

    def save_model(self, folder: Path) -> None:
        """Write a folder that `load_model` reads, completely or not at all.

        Raises:
            OSError: There is no room or no permission.
        """
        folder.parent.mkdir(exist_ok=True)
        try:
            with (
                quiet_transformers(),
                tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as scratch,
            ):
                made = Path(scratch) / MODEL
                self.model.save_pretrained(made)
                tokenizer(self.world).save_pretrained(made)
                shutil.rmtree(folder, ignore_errors=True)
                made.rename(folder)
        except Exception as error:
            # safetensors and tokenizers name the error of the system in their text alone.
            number = re.search(r"os error (\d+)", str(error))
            if isinstance(error, OSError) or number is None:
                raise
            code = int(number[1])
            raise OSError(code, os.strerror(code), str(folder)) from error
