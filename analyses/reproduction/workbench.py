"""The workbench: the language models, facts and trained models that analyses share.

Each pair of a task and a recipe is trained once and saved in the workbench's folder. The state of
training is saved there too, so that a reproduction that was killed resumes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hijacklens.facts.atlas import atlas
from hijacklens.facts.fact import FactSet
from hijacklens.files import RECORD
from hijacklens.models.loading import load_model
from hijacklens.one_layer.recipe import Recipe
from hijacklens.one_layer.task import ConceptTask
from hijacklens.one_layer.trained import TrainingResult
from hijacklens.one_layer.training import train
from hijacklens.results.result import load_result

DEFAULT_MODELS = ("smollm2-135m", "gemma3-270m")


@dataclass(frozen=True, kw_only=True, eq=False)
class Workbench:
    """The resources of one reproduction."""

    folder: Path | None = None
    """The folder of trained models; None for a temporary one, deleted with the workbench."""
    models: tuple[str, ...] = DEFAULT_MODELS
    """Language models, as `hijacklens.load_model` takes them."""
    facts: FactSet | None = None
    """The facts on which language models are scored; None for the atlas."""
    device: str | None = None
    quiet: bool = False
    _loaded: dict[str, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def scored(self) -> FactSet:
        """The facts on which language models are scored: `facts`, or else the atlas."""
        return atlas() if self.facts is None else self.facts

    @cached_property
    def _temporary(self) -> TemporaryDirectory[str]:
        return TemporaryDirectory(prefix="hijacklens-")

    @property
    def work(self) -> Path:
        """The folder of trained models."""
        return Path(self._temporary.name) if self.folder is None else self.folder

    def trained(self, task: ConceptTask, recipe: Recipe) -> TrainingResult:
        """Return the models of a task and recipe, trained on first use and read from disk after.

        Raises:
            InputError: The folder cannot be read or written, or holds something else.
        """
        settings = {"task": task.configuration(), "recipe": asdict(recipe)}
        text = json.dumps(settings, sort_keys=True, default=list)
        name = f"m{task.bits}-L{task.length}-d{recipe.d_model}"
        folder = self.work / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        if (folder / RECORD).exists():
            result = load_result(folder)
            assert isinstance(result, TrainingResult)
            return result
        return train(task, recipe, device=self.device, out=folder, quiet=self.quiet)

    def language_model(self, name: str) -> Any:
        """Load a language model. Only the model loaded last is kept in memory."""
        if name not in self._loaded:
            self._loaded.clear()
            self._loaded[name] = load_model(name, device=self.device)
        return self._loaded[name]
