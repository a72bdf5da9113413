"""The workbench: what an analysis may use, and the trained models that several of them share.

Models are trained once for a task and a recipe and kept in a folder of the workbench, with their
state while they train, so that a reproduction that was killed goes on where it was.
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
    """What runs of one reproduction share."""

    folder: Path | None = None
    """Where trained models are kept; None for a folder that goes when the workbench does."""
    models: tuple[str, ...] = DEFAULT_MODELS
    """Language models, as `hijacklens.load_model` takes them."""
    facts: FactSet | None = None
    """Facts for the analyses that score language models; None for the atlas."""
    device: str | None = None
    quiet: bool = False
    _loaded: dict[str, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def scored(self) -> FactSet:
        """The facts that language models are scored on: those given, or the atlas."""
        return atlas() if self.facts is None else self.facts

    @cached_property
    def _temporary(self) -> TemporaryDirectory[str]:
        return TemporaryDirectory(prefix="hijacklens-")

    @property
    def work(self) -> Path:
        """The folder of the trained models."""
        return Path(self._temporary.name) if self.folder is None else self.folder

    def trained(self, task: ConceptTask, recipe: Recipe) -> TrainingResult:
        """The models of a task and recipe: read if they are there, trained if not.

        Raises:
            InputError: The folder cannot be read or written, or holds something else.
        """
        asked = {"task": task.configuration(), "recipe": asdict(recipe)}
        text = json.dumps(asked, sort_keys=True, default=list)
        name = f"m{task.bits}-L{task.length}-d{recipe.d_model}"
        folder = self.work / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        if (folder / RECORD).exists():
            found = load_result(folder)
            assert isinstance(found, TrainingResult)
            return found
        return train(task, recipe, device=self.device, out=folder, quiet=self.quiet)

    def language_model(self, name: str) -> Any:
        """A loaded language model; the last one loaded is kept, and no other."""
        if name not in self._loaded:
            self._loaded.clear()
            self._loaded[name] = load_model(name, device=self.device)
        return self._loaded[name]
