"""The result of training: models, their accuracies next to the Bayes rule's, loss curves, files.

All accuracies of a seed are on the same fresh contexts, drawn from a generator of that seed that
training does not use; so the comparison of two columns of a row, or two value matrices, is paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from hijacklens import plots
from hijacklens.errors import InputError
from hijacklens.one_layer import memory
from hijacklens.one_layer.evaluation import BayesRule, Score, answers, evaluate
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.recipe import OUR_DEFAULTS, Recipe
from hijacklens.one_layer.stacked_runs import generator_for
from hijacklens.one_layer.task import ConceptTask, TaskRecord
from hijacklens.probe import Probe
from hijacklens.results.glance import Glance, Grid, named
from hijacklens.results.result import Provenance, Result
from hijacklens.results.stored import NOT_STORED, Stored

MODELS = "models"
"""Folder of the models in the folder of a result."""

NewValue: TypeAlias = Tensor | Callable[[OneLayerTransformer], Tensor]
"""A value matrix [d_model, d_model], or a function from a trained model to one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingResult(Result):
    """Trained one-layer models with their accuracies and loss curves."""

    task: TaskRecord
    recipe: Recipe
    models: Annotated[tuple[OneLayerTransformer, ...], NOT_STORED] = ()
    """One per row of the summary, in its order; a folder each."""
    table: Annotated[pd.DataFrame, Stored("summary.csv")]
    """The summary: see `summary`."""
    curves: Annotated[pd.DataFrame, Stored("curves.csv")]
    """Training loss: `seed, lr, step, loss` (nats, mean over the steps since the last point)."""
    bayes_loss: float
    """Cross-entropy of the exact posterior on the evaluation contexts, in nats."""
    device: str
    """Where they were trained."""
    provenance: Provenance

    def summary(self) -> pd.DataFrame:
        """Return one row per learning rate and seed, all on fresh contexts, ties split evenly.

        `seed, lr`; `accuracy` with its 95% Wilson interval `accuracy_low, accuracy_high`;
        `bayes_accuracy`, the accuracy of the exact posterior on the same contexts;
        `constructed_accuracy`, the accuracy with the memory of equation 5.1, made from its W_E
        and scaled to the norm of W_V, in place of W_V (NaN if that memory is zero, as without
        Hamming-1 neighbours in the support); `loss`, the model's cross-entropy in nats.
        """
        return self.table.copy()

    @property
    def best_learning_rate(self) -> float:
        """The learning rate with the highest mean accuracy over seeds; the first of equals."""
        means: Any = self.table.groupby("lr", sort=False)["accuracy"].mean()
        return float(means.idxmax())

    def best(self) -> tuple[OneLayerTransformer, ...]:
        """Return the models of the best learning rate, one per seed."""
        best, rates = self.best_learning_rate, self.table["lr"]
        return tuple(model for model, lr in zip(self.models, rates, strict=True) if lr == best)

    def accuracy(
        self, value: NewValue | None = None, *, probes: Sequence[Probe] = ()
    ) -> pd.DataFrame:
        """Measure accuracy on the evaluation contexts, possibly with another W_V or with probes.

        Args:
            value: None for the models as trained; a matrix that replaces W_V in all models, acting
                on row vectors; or a function from a model to its new matrix, such as
                `lambda model: memory.constructed(model.W_E, task)`.
            probes: Probes that act on every model, in this order, as on a language model. The
                models then run with hooks, 10 to 100 times slower than without.

        Returns:
            A row per model: `seed, lr, accuracy, accuracy_low, accuracy_high, loss`.
        """
        if isinstance(value, Probe):
            raise InputError(
                f"{value.key} is a probe, not a value matrix; write accuracy(probes=[...])."
            )
        answerers = {}
        for key, model in zip(self._keys(), self.models, strict=True):
            if value is not None:
                with torch.no_grad():
                    model = model.with_value(value(model) if callable(value) else value)
            answerers[key] = answers(model, self.task, probes=probes)
        scores = _on_fresh_contexts(answerers, self.task, self.recipe)
        return _table(self._keys(), scores)

    @classmethod
    def evaluated(
        cls,
        task: ConceptTask,
        recipe: Recipe,
        models: Sequence[OneLayerTransformer],
        *,
        curves: pd.DataFrame,
        device: str,
    ) -> TrainingResult:
        """Evaluate trained models, which are in the order of `recipe.runs`."""
        keys = [(run.model.seed, run.lr) for run in recipe.runs(task)]
        rule = BayesRule(task)
        answerers: dict[Any, Any] = {(seed, "bayes"): rule for seed in recipe.seeds}
        for key, model in zip(keys, models, strict=True):
            answerers[key] = answers(model, task)
            if (built := _with_memory(model, task)) is not None:
                answerers[(*key, "memory")] = answers(built, task)
        scores = _on_fresh_contexts(answerers, task, recipe)
        table = _table(keys, scores)
        columns = {
            "bayes_accuracy": [scores[seed, "bayes"] for seed, _ in keys],
            "constructed_accuracy": [scores.get((*key, "memory")) for key in keys],
        }
        for name, column in columns.items():
            values = [score.accuracy.value if score else math.nan for score in column]
            table.insert(len(table.columns) - 1, name, values)
        return cls(
            task=task,
            recipe=recipe,
            models=tuple(models),
            table=table,
            curves=curves,
            bayes_loss=sum(scores[s, "bayes"].loss for s in recipe.seeds) / len(recipe.seeds),
            device=device,
            provenance=Provenance.now(seed=recipe.seeds[0]),
        )

    def glance(self) -> Glance:
        """Accuracy by learning rate and seed, compared with the Bayes rule and equation 5.1."""
        columns = {
            "lr": "{lr:g}",
            "seed": "{seed:d}",
            "accuracy": "{accuracy:fraction} [{accuracy_low:fraction}, {accuracy_high:fraction}]",
            "Bayes": "{bayes_accuracy:fraction}",
            "eq. 5.1": "{constructed_accuracy:fraction}",
            "loss (nats)": "{loss:.3f}",
        }
        seeds = named([str(seed) for seed in self.recipe.seeds], most=5)
        failed = int(self.table["loss"].isna().sum())
        diverged = (
            f"{failed} of {len(self.table)} runs diverged (no loss): use a lower learning rate"
        )
        return Glance(
            f"{self._title()} · seeds {seeds}, {self.recipe.steps} steps",
            (Grid.of(self.table, columns),),
            (
                "Bayes: the best rule on the same contexts; eq. 5.1: the model with that memory "
                "as its W_V",
                f"best learning rate, by mean accuracy over the seeds: {self.best_learning_rate:g}",
                *([diverged] if failed else []),
            ),
            ("summary()", "best()", "accuracy(probes=[...])", "plot()", "save(folder)"),
        )

    to_dataframe = summary

    def findings(self) -> dict[str, Any]:
        """Return our defaults, and the means at the best learning rate."""
        best = self.table[self.table["lr"] == self.best_learning_rate]
        means = best[["accuracy", "bayes_accuracy", "constructed_accuracy", "loss"]].mean()
        return {
            "our_defaults": OUR_DEFAULTS,
            "best_learning_rate": self.best_learning_rate,
            "means_at_best_learning_rate": {str(k): float(v) for k, v in means.items()},
        }

    def files(self) -> dict[str, Callable[[Path], None]]:
        """Return the tables, and the weights and configuration of each model in its folder."""
        files = super().files()
        for folder, model in zip(self._folders(), self.models, strict=True):
            files |= {f"{folder}/{name}": write for name, write in model.files().items()}
        return files

    @classmethod
    def read(cls, folder: Path, record: Mapping[str, Any]) -> TrainingResult:
        """Return the result in a folder, with its models on the CPU."""
        result = super().read(folder, record)
        models = tuple(OneLayerTransformer.load(folder / name) for name in result._folders())
        return replace(result, models=models)

    def plot(self) -> Figure:
        """Draw loss curves by learning rate with the range of seeds; accuracies next to Bayes'."""
        with plots.canvas(1, 2, width=4.6, height=3.4) as (figure, axes):
            self._draw_loss(axes[0])
            self._draw_accuracy(axes[1])
            plots.legend_below(figure, axes, columns=4)
            figure.suptitle(self._title(), fontsize=11)
        return figure

    def _title(self) -> str:
        task, recipe = self.task, self.recipe
        frozen = f", {' and '.join(recipe.freeze)} frozen" if recipe.freeze else ""
        return (
            f"m = {task.bits}, L = {task.length}, d = {recipe.d_model}, ω = {task.omega:g}, "
            f"β = {task.beta:g}, support {task.support_name}{frozen}"
        )

    def _draw_loss(self, axes: Axes) -> None:
        for i, (lr, of_lr) in enumerate(self.curves.groupby("lr", sort=False)):
            colour, _ = plots.series(i)
            loss = of_lr.pivot(index="step", columns="seed", values="loss")
            mark = "o" if len(loss) == 1 else None  # a line of one point is not seen
            axes.plot(loss.index, loss.mean(axis=1), marker=mark, color=colour, label=f"lr {lr:g}")
            axes.fill_between(
                loss.index, loss.min(axis=1), loss.max(axis=1), color=colour, alpha=0.2, lw=0
            )
        axes.set(xlabel="step", ylabel="training loss (nats)\nmean, range of seeds", yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        lowest = self.curves["loss"].min() / 2
        if self.bayes_loss > lowest:
            axes.axhline(self.bayes_loss, color="black", ls="--", lw=1, label="Bayes")
        else:  # a line that low would compress the curves
            label = f"Bayes: {self.bayes_loss:.1g} (below)"
            axes.plot([], [], color="black", ls="--", lw=1, label=label)

    def _draw_accuracy(self, axes: Axes) -> None:
        rates = self.recipe.learning_rates
        for i, lr in enumerate(rates):
            rows: Any = self.table[self.table["lr"] == lr]
            offset = (np.arange(len(rows)) - (len(rows) - 1) / 2) * 0.3 / max(len(rows), 4)
            names = ["accuracy", "accuracy_low", "accuracy_high", "constructed_accuracy"]
            accuracy, low, high, built = rows[names].to_numpy().T
            ends = [accuracy - low, high - accuracy]
            colour, _ = plots.series(i)
            axes.errorbar(i - 0.2 + offset, accuracy, yerr=ends, fmt="o", ms=4, lw=1, color=colour)
            axes.plot(i + 0.2 + offset, built, "s", ms=5, mfc="none", color=colour)
        bayes = self.table["bayes_accuracy"].mean()
        axes.axhline(bayes, color="black", ls="--", lw=1, label="Bayes")
        axes.plot([], [], "o", ms=4, color="black", label="as trained (95%)")
        axes.plot([], [], "s", ms=5, mfc="none", color="black", label="W_V by eq. 5.1")
        axes.set_xticks(range(len(rates)), [f"{lr:g}" for lr in rates])
        axes.set(xlabel="learning rate", ylabel="accuracy", xlim=(-0.6, len(rates) - 0.4))
        axes.grid(visible=False, axis="x")

    def _keys(self) -> list[tuple[int, float]]:
        return list(zip(self.table["seed"], self.table["lr"], strict=True))

    def _folders(self) -> list[str]:
        return [f"{MODELS}/seed{seed}-lr{lr!r}" for seed, lr in self._keys()]


def _on_fresh_contexts(
    answerers: Mapping[Any, Callable[[Tensor], Tensor]], task: ConceptTask, recipe: Recipe
) -> dict[Any, Score]:
    """Score answerers, whose keys start with a seed, on that seed's contexts, made on the CPU."""
    scores = {}
    for seed in recipe.seeds:
        of_seed = {key: answerer for key, answerer in answerers.items() if key[0] == seed}
        draw = generator_for(seed, "evaluation", "cpu")
        scores |= evaluate(of_seed, task, draw, count=recipe.evaluation)
    return scores


def _with_memory(model: OneLayerTransformer, task: ConceptTask) -> OneLayerTransformer | None:
    """Return the model with equation 5.1 as W_V, at the norm of W_V; None if 5.1 is zero."""
    weights = model.weights()
    with torch.no_grad():
        try:
            value = memory.matched(memory.constructed(weights.W_E, task), weights.W_V)
        except InputError:  # no token has a neighbour at Hamming distance 1, or embeddings are 0
            return None
        return model.with_value(value)


def _table(keys: Sequence[tuple[int, float]], scores: Mapping[Any, Score]) -> pd.DataFrame:
    columns = ["seed", "lr", "accuracy", "accuracy_low", "accuracy_high", "loss"]
    rows = [(*key, *astuple(scores[key].accuracy), scores[key].loss) for key in keys]
    return pd.DataFrame(rows, columns=columns)
