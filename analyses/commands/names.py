"""Names that a shell completes: models, schemes, relations, probes, analyses.

None of them needs torch, so that completion answers at once.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from click import Context, Parameter
from click.shell_completion import CompletionItem

Completer = Callable[[Context, Parameter, str], list[CompletionItem]]

SHELLS = {
    "bash": "~/.bashrc",
    "zsh": "~/.zshrc",
    "fish": "~/.config/fish/completions/hijacklens.fish",
}
"""Shell -> the file that it reads when it starts."""


def completer(
    known: Mapping[str, str] | str,
    about: str = "",
    *,
    kind: str = "plain",
    ending: str = "",
    more: tuple[tuple[str, str], ...] = (),
) -> Completer:
    """Return what completes names.

    Args:
        known: Names with a description of each; or where they are, as `module:attribute`: a
            mapping, or a function that returns one. It is imported when a key is pressed.
        about: The attribute of a value of that mapping which describes it.
        kind: `dir` or `file` if a path is also allowed.
        ending: Appended to each name.
        more: More names, each with its description.
    """

    def described() -> Mapping[str, str]:
        if not isinstance(known, str):
            return known
        module, _, attribute = known.partition(":")
        values: Any = getattr(importlib.import_module(module), attribute)
        values = values() if callable(values) else values
        return {name: getattr(value, about) for name, value in values.items()}

    def complete(context: Context, parameter: Parameter, typed: str) -> list[CompletionItem]:
        # An item of the kind `dir` or `file` makes the shell add paths.
        paths = [CompletionItem(typed, type=kind)] if kind != "plain" else []
        names = [(f"{name}{ending}", text) for name, text in described().items()] + [*more]
        return paths + [CompletionItem(n, help=text) for n, text in names if n.startswith(typed)]

    return complete


models = completer("hijacklens.models.packaged:PACKAGED", "title", kind="dir")
schemes = completer("hijacklens.prompts.schemes:schemes", "summary")
relations = completer("hijacklens.facts.relations:relations", "label")
kinds = completer("probes.specification:KINDS", "summary")
probes = completer("probes.specification:KINDS", "summary", ending=":")
analyses = completer(
    "analyses.reproduction.catalogue:CATALOGUE", "title", more=(("all", "all of them"),)
)
methods = completer("analyses.defence.methods:METHODS", "source", kind="file")
facts = completer({"atlas": "embedded facts", "counterfact": "from the hub"}, kind="file")
shells = completer({shell: f"read from {file}" for shell, file in SHELLS.items()})
