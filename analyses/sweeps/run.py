"""Run a sweep: models x schemes x facts x seeds, and one-layer tasks x recipes, cell by cell.

Each finished cell is saved in a separate folder, named by its labels and a hash of everything its
result depends on. So the same sweep resumes after an interruption, and a changed sweep runs only
new cells. A cell that fails is listed with the reason, and the others are run.

    out/scoring/tiny-gpt2_atlas_do-not-think_seed0-1f0c9e2a/    a HijackResult
    out/training/m5-L64_d16-0b7d11c3/                           a TrainingResult
    out/sweep.csv                                               all of them
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import count, groupby, product
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pandas as pd
from matplotlib.figure import Figure

from analyses.reproduction.check import mean
from analyses.sweeps.file import ModelEntry, ScoringPlan, SweepPlan, TrainingPlan
from hijacklens import plots
from hijacklens.errors import InputError
from hijacklens.facts.loading import load_facts
from hijacklens.files import RECORD
from hijacklens.models.naming import content_of
from hijacklens.one_layer.task import ConceptTask
from hijacklens.one_layer.trained import TrainingResult
from hijacklens.one_layer.training import train
from hijacklens.prompts.schemes import Scheme, get_scheme
from hijacklens.renamed import renamed
from hijacklens.results.glance import Glance, Grid
from hijacklens.results.result import Provenance, Result, load_result, read_record
from hijacklens.results.stored import Stored
from hijacklens.scoring.curves import say_probes
from hijacklens.scoring.execution import Execution
from hijacklens.scoring.hijack import hijack
from hijacklens.scoring.result import HijackResult
from hijacklens.workers.cluster import allocate, connected
from hijacklens.workers.replica import ModelLoader
from hijacklens.workers.workers import RayEngine
from probes.specification import parse

LINES = {"scoring": ["model", "scheme"], "training": ["bits", "length", "dim", "freeze"]}
"""Kind -> columns of the table that a line of its panel is for."""

_WHOLE = ("seed", "dose", "n", "ties", "bits", "length", "dim", "d_attn", "steps", "batch", "seeds")
"""Columns of whole numbers, which some rows lack."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepSettings:
    """The sweep file, and the names of its cells."""

    sweep: Mapping[str, Any]
    cells: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class SweepResult(Result):
    """The table of all cells of a sweep; each cell has its own result in a separate folder."""

    table: Annotated[pd.DataFrame, Stored("sweep.csv", dtypes=dict.fromkeys(_WHOLE, "Int64"))]
    """A row per scoring cell and dose (efficacy and retention as in `HijackResult.summary`) and
    per training cell and learning rate (means over its seeds, with 95% Student intervals)."""
    failed: Annotated[pd.DataFrame, Stored("failed.csv", dtypes={"cell": str, "reason": str})]
    """Cells that failed, with the reason."""
    settings: SweepSettings
    provenance: Provenance
    figures: ClassVar = {"sweep": {}}

    def to_dataframe(self) -> pd.DataFrame:
        """Return the table."""
        return self.table.copy()

    def plot(self) -> Figure:
        """Plot efficacy by dose, and accuracy by learning rate: means over facts and seeds."""
        kinds = list(self.table["kind"].unique())
        styles = map(plots.line, count())
        with plots.canvas(1, max(1, len(kinds)), width=5.4, height=3.8) as (figure, axes):
            for ax, kind in zip(axes, kinds, strict=False):
                scoring = kind == "scoring"
                x, y = ("dose", "efficacy") if scoring else ("lr", "accuracy")
                rows = self.table[self.table["kind"] == kind]
                for key, group in rows.groupby(LINES[kind], dropna=False):
                    values = group.groupby(x)[y].agg(["mean", "min", "max"])
                    style = next(styles)
                    ax.plot(values.index, values["mean"], label=plots.escape(_label(key)), **style)
                    fill = {"color": style["color"], "alpha": 0.15, "lw": 0}
                    ax.fill_between(values.index, values["min"], values["max"], **fill)
                ax.set(xlabel="dose (hijacking sentences)" if scoring else "learning rate")
                ax.set(ylabel=f"{y} (mean and range of cells)", ylim=(-0.02, 1.02))
                if scoring:
                    ax.set_xticks(sorted(set(rows[x])))
                else:
                    ax.set_xscale("log")
            plots.legend_below(figure, axes)
            say_probes(figure, self._probes)
        return figure

    @property
    def _probes(self) -> Sequence[str]:
        """The probes of the scoring cells, as in the sweep file."""
        return (self.settings.sweep.get("scoring") or {}).get("probes") or ()

    def glance(self) -> Glance:
        """The number of cells, and the range of the main measure of each kind."""
        rows = []
        for kind, cells in self.table.groupby("kind"):
            measure = "efficacy" if kind == "scoring" else "accuracy"
            ends = {"low": cells[measure].min(), "high": cells[measure].max()}
            rows.append({"kind": kind, "n": cells["cell"].nunique(), "of": measure, **ends})
        changed = f" · scored with {', '.join(self._probes)}" if self._probes else ""
        columns = {
            "kind": "{kind}",
            "cells": "{n:d}",
            "measure": "{of}",
            "from ... to": "{low:fraction} to {high:fraction}",
        }
        return Glance(
            f"{len(self.settings.cells)} cells, {len(self.failed)} of them failed{changed}",
            (Grid.of(rows, columns),) if rows else (),
            steps=("to_dataframe()", "failed", "plot()"),
        )

    def findings(self) -> dict[str, Any]:
        """Return the number of cells that failed."""
        return {"failed": len(self.failed)}


def _label(values: Any) -> str:
    if isinstance(values[0], str):
        return " · ".join(map(str, values))
    bits, length, d_model, freeze = values
    frozen = f", {freeze} frozen" if isinstance(freeze, str) and freeze else ""
    return f"m = {bits:g}, L = {length:g}, d = {d_model:g}{frozen}"


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a sweep."""

    kind: str
    """`scoring` or `training`."""
    labels: Mapping[str, Any]
    """Columns of its rows in the table."""
    key: Mapping[str, Any]
    """Everything that its result depends on, ready for JSON."""
    title: str
    inputs: tuple[Any, Any]
    """Facts and scheme, or task and recipe."""

    @property
    def name(self) -> str:
        """Its folder, relative to that of the sweep."""
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()
        return f"{self.kind}/{re.sub(r'[^A-Za-z0-9_.-]+', '-', self.title)}-{digest[:8]}"


@dataclass(slots=True)
class _Sweep:
    """A sweep that is running."""

    plan: SweepPlan
    out: Path
    execution: Execution
    quiet: bool
    tell: Callable[[str], object]
    failed: dict[str, str] = field(default_factory=dict)

    def finished(self, cell: Cell) -> Result | None:
        """Return the saved result of a cell, or None if it has to be run."""
        try:
            return load_result(self.out / cell.name)
        except InputError:  # missing or damaged
            return None

    def save(self, cell: Cell, result: Result) -> None:
        result.save(self.out / cell.name, overwrite=True)
        self.tell(f"done: {cell.name}")

    @contextmanager
    def listing(self, cells: Sequence[Cell]) -> Iterator[None]:
        """Run the body; if it fails, list the cells with the reason."""
        try:
            yield
        except (InputError, OSError) as error:
            for cell in cells:
                self.failed.setdefault(cell.name, str(error))
                self.tell(f"failed: {cell.name}: {error}")


@renamed(engine="execution.engine", store="execution.store")
def run_sweep(
    plan: SweepPlan,
    out: Path,
    *,
    execution: Execution = Execution(),
    quiet: bool = False,
    tell: Callable[[str], object] = lambda line: None,
) -> SweepResult:
    """Run all cells of a sweep that are not finished, and make the table of all cells.

    Cells are keyed by the entries of the file, the content of the facts, and the files of the model
    (its commit on the hub), so that a folder with new weights, another configuration or another
    tokenizer has new cells.

    Args:
        plan: The file, read by `analyses.sweeps.file.load_sweep`.
        out: The folder of the sweep; cells that are finished there are not run again.
        execution: As for `hijacklens.hijack`, but the file sets `batch_tokens`. The workers of a
            `RayEngine` share every scoring cell, and each takes one training cell at a time.
        quiet: Draw no progress bars.
        tell: Called with a line when a cell is finished or fails.

    Raises:
        InputError: Facts cannot be read, there is no room for the workers, or `out` is a file or
            holds a result that is no sweep.
    """
    before = read_record(out / RECORD)
    if before and not before["type"].endswith(f":{SweepResult.__name__}"):
        raise InputError(f"{str(out)!r} contains a result that is no sweep. Choose another folder.")
    cells = [*_scoring_cells(plan.scoring), *_training_cells(plan.training)]
    sweep = _Sweep(plan, out, execution, quiet, tell)
    unfinished = [cell for cell in cells if sweep.finished(cell) is None]
    if len(unfinished) < len(cells):
        tell(f"{len(cells) - len(unfinished)} of {len(cells)} cells were finished before")
    cluster = nullcontext()
    if isinstance(execution.engine, RayEngine) and unfinished:
        cluster = connected(execution.engine.address)  # one for all cells
    with cluster:
        scoring = [cell for cell in unfinished if cell.kind == "scoring"]
        for _, group in groupby(scoring, key=lambda cell: cell.key["model"]):
            _score(sweep, list(group))
        _train(sweep, [cell for cell in unfinished if cell.kind == "training"])
    rows: list[dict[str, Any]] = []
    missing: list[tuple[str, str]] = []
    for cell in cells:
        result = sweep.finished(cell)
        if result is not None:
            shared = {"kind": cell.kind, "cell": cell.name, **cell.labels}
            rows.extend({**shared, **row} for row in _rows(plan, result))
        else:
            missing.append((cell.name, sweep.failed.get(cell.name, "its result cannot be read")))
    table = pd.DataFrame(rows if rows else {"kind": []})
    result = SweepResult(
        table.astype({name: "Int64" for name in _WHOLE if name in table}),
        pd.DataFrame(missing, columns=["cell", "reason"]),
        SweepSettings(sweep=plan.model_dump(mode="json"), cells=tuple(cell.name for cell in cells)),
        Provenance.now(),
    )
    result.save(out, overwrite=True)
    return result


def _scoring_cells(plan: ScoringPlan | None) -> list[Cell]:
    if plan is None:
        return []
    templates = {name: Scheme(name=name, template=text) for name, text in plan.templates.items()}
    facts_of = {
        (i, seed): replace(
            load_facts(entry.source, joining=entry.joining, seed=seed)
            .where(relation=entry.relations or None, case_ids=entry.cases or None)
            .limit(entry.limit, seed=seed),
            opening=entry.opening,
            chat=entry.chat,
        )
        for i, entry in enumerate(plan.facts)
        for seed in plan.seeds
    }
    contents = {model: _content(model) for model in plan.models}
    names = dict(zip(plan.models, model_labels(plan.models), strict=True))
    cells = []
    for model, (i, entry), name, seed in product(
        plan.models, enumerate(plan.facts), plan.schemes, plan.seeds
    ):
        facts, scheme = facts_of[i, seed], templates.get(name) or get_scheme(name)
        texts = scheme.template if scheme.template is not None else dict(scheme.templates or {})
        labels = {
            "model": names[model],
            "dtype": model.dtype,
            "facts": entry.name or Path(entry.source).stem,
            "scheme": name,
            "seed": seed,
        }
        key = {
            "model": model.model_dump(),
            "content": contents[model],
            "facts": facts.content_hash(),
            **({} if facts.joining == "auto" else {"joining": facts.joining}),
            **({"opening": facts.opening} if facts.opening else {}),
            **({"chat": asdict(facts.chat)} if facts.chat else {}),
            "scheme": [name, texts],
            "seed": seed,
            "doses": list(plan.doses),
            "probes": list(plan.probes),
        }
        title = f"{labels['model']}_{labels['facts']}_{name}_seed{seed}"
        cells.append(Cell("scoring", labels, key, title, (facts, scheme)))
    return cells


def _content(model: ModelEntry) -> str:
    try:
        return content_of(model.source, model.revision)
    except (InputError, OSError):  # loading it fails, too, and the cell is listed with the reason
        return ""


def model_labels(models: Sequence[ModelEntry]) -> list[str]:
    """Return a different label for each model: the end of its path, and what else differs.

    >>> twins = [ModelEntry(source="a/last"), ModelEntry(source="b/last")]
    >>> model_labels([*twins, ModelEntry(source="gpt2"), ModelEntry(source="gpt2", revision="v1")])
    ['a/last', 'b/last', 'gpt2', 'gpt2@v1']
    """
    labels = [""] * len(models)
    groups: dict[str, set[tuple[str, ...]]] = {}
    for model in models:
        path = Path(model.source)
        groups.setdefault(path.name, set()).add(path.parts)
    for i, model in enumerate(models):
        path = Path(model.source)
        depth, paths = 1, groups[path.name]
        while len({parts[-depth:] for parts in paths}) < len(paths):
            depth += 1
        labels[i] = "/".join(path.parts[-depth:])
    for name in ("revision", "dtype", "device", "devices", "trust_remote_code"):
        counts = Counter(labels)
        for i, model in enumerate(models):
            if counts[labels[i]] > 1 and (value := getattr(model, name)) is not None:
                labels[i] += f"@{value}" if name == "revision" else f", {name} {value}"
    return labels


def _training_cells(plan: TrainingPlan | None) -> list[Cell]:
    if plan is None:
        return []
    names = ("d_attn", "freeze", "value_init", "init_scale", "steps", "batch", "dtype")
    cells = []
    for task, recipe in product(plan.tasks, plan.recipes):
        labels = {**task, "dim": recipe["d_model"], **{name: recipe[name] for name in names}}
        labels |= {"freeze": " ".join(recipe["freeze"]), "seeds": len(recipe["seeds"])}
        key = json.loads(json.dumps({"task": task, "recipe": recipe}))
        title = f"m{task['bits']}-L{task['length']}_d{recipe['d_model']}"
        cells.append(Cell("training", labels, key, title, (task, recipe)))
    return cells


def _score(sweep: _Sweep, cells: Sequence[Cell]) -> None:
    """Run the scoring cells of one model."""
    plan = sweep.plan.scoring
    assert plan is not None
    loader = ModelLoader(**cells[0].key["model"])
    with sweep.listing(cells):
        if isinstance(sweep.execution.engine, RayEngine):
            model, running = loader, sweep.execution.engine.replicas(loader)
        else:
            model, running = loader.load(), nullcontext(sweep.execution.engine)
        with running as engine:
            execution = replace(sweep.execution, engine=engine, batch_tokens=plan.batch_tokens)
            for cell in cells:
                facts, scheme = cell.inputs
                with sweep.listing([cell]):
                    result = hijack(
                        model,
                        facts,
                        schemes=[scheme],
                        doses=plan.doses,
                        probes=[parse(text).probe() for text in plan.probes],
                        seed=cell.labels["seed"],
                        execution=execution,
                        quiet=sweep.quiet,
                    )
                    sweep.save(cell, result)


def train_cell(task: Mapping[str, Any], recipe: Mapping[str, Any], **options: Any) -> Any:
    """Train the models of a cell, here or on a worker."""
    return train(ConceptTask.from_configuration(task), **recipe, **options)


def _train(sweep: _Sweep, cells: Sequence[Cell]) -> None:
    """Run the training cells, one after another or one on each worker."""
    if isinstance(sweep.execution.engine, RayEngine) and cells:
        _train_on_workers(sweep, cells, sweep.execution.engine)
        return
    for cell in cells:
        with sweep.listing([cell]):
            # `overwrite` does not discard an unfinished run of the same cell; that one resumes.
            options = {"out": sweep.out / cell.name, "overwrite": True, "quiet": sweep.quiet}
            train_cell(*cell.inputs, **options)
            sweep.tell(f"done: {cell.name}")


def _train_on_workers(sweep: _Sweep, cells: Sequence[Cell], engine: RayEngine) -> None:
    with connected(engine.address) as ray:
        allocation = allocate(
            ray.nodes(),
            workers=engine.workers,
            cpus=engine.cpus_per_worker,
            gpus=engine.gpus_per_worker,
        )
        task = ray.remote(train_cell).options(
            num_cpus=allocation.cpus, num_gpus=allocation.gpus, max_retries=engine.attempts - 1
        )
        device = None if allocation.gpus else "cpu"
        waiting, running = list(reversed(cells)), {}
        while waiting or running:
            while waiting and len(running) < allocation.workers:
                cell = waiting.pop()
                running[task.remote(*cell.inputs, device=device, quiet=True)] = cell
            (ready, *_), _ = ray.wait(list(running), num_returns=1)
            cell = running.pop(ready)
            with sweep.listing([cell]):
                sweep.save(cell, _answer(ray, ready))


def _answer(ray: Any, ready: Any) -> Any:
    """Return the answer of a worker, or raise its error."""
    try:
        return ray.get(ready)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"its workers died one after another; the last: {reason}") from error


def _rows(plan: SweepPlan, result: Result) -> Iterator[dict[str, Any]]:
    """Yield the rows of a cell in the table, without its labels."""
    if isinstance(result, HijackResult) and plan.scoring is not None:
        rule: Any = plan.scoring.rule
        summary = result.summary(rule=rule).drop(columns=["model", "scheme"])
        row: Any
        for row in summary.to_dict("records"):
            yield {"rule": rule, **row}
    elif isinstance(result, TrainingResult):
        for lr, group in result.summary().groupby("lr", sort=False):
            interval = mean(group["accuracy"])
            alone = len(group) == 1
            yield {
                "lr": lr,
                "accuracy": interval.value,
                "accuracy_low": None if alone else interval.low,
                "accuracy_high": None if alone else interval.high,
                **group[["bayes_accuracy", "constructed_accuracy", "loss"]].mean(),
            }
