"""What the shell completes behind an option: names of models, schemes, relations, probes, analyses.

All of it is known without torch, so that a key press is answered at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from click import Context, Parameter
from click.shell_completion import CompletionItem

Completer = Callable[[Context, Parameter, str], list[CompletionItem]]


def names_of(known: Callable[[], Mapping[str, str]], *, kind: str = "plain") -> Completer:
    """Completes names from a mapping of names to what they are, looked up when a key is pressed.

    Args:
        known: Gives the names.
        kind: `dir` or `file` where a path may stand, too.
    """

    def complete(context: Context, parameter: Parameter, typed: str) -> list[CompletionItem]:
        # The shell adds paths by itself when it is told to, and forgets what it was told before.
        paths = [CompletionItem(typed, type=kind)] if kind != "plain" else []
        found = known().items()
        return paths + [CompletionItem(k, help=v) for k, v in found if k.startswith(typed)]

    return complete


def _models() -> dict[str, str]:
    from hijacklens.models.packaged import PACKAGED

    return {model.name: model.title for model in PACKAGED.values()}


def _schemes() -> dict[str, str]:
    from hijacklens.prompts.schemes import schemes

    return {scheme.name: scheme.summary for scheme in schemes().values()}


def _relations() -> dict[str, str]:
    from hijacklens.facts.relations import relations

    return {key: relation.label for key, relation in relations().items()}


def _probes() -> dict[str, str]:
    from probes.specification import KINDS

    return {kind.name: kind.summary for kind in KINDS.values()}


def _analyses() -> dict[str, str]:
    from analyses.reproduction.catalogue import CATALOGUE

    return {key: entry.title for key, entry in CATALOGUE.items()}


def _facts() -> dict[str, str]:
    return {"atlas": "embedded facts", "counterfact": "CounterFact, from the hub"}


SHELLS = {
    "bash": "~/.bashrc",
    "zsh": "~/.zshrc",
    "fish": "~/.config/fish/completions/hijacklens.fish",
}
"""Shell -> the file that it reads when it starts."""

models = names_of(_models, kind="dir")
schemes = names_of(_schemes)
relations = names_of(_relations)
kinds = names_of(_probes)
probes = names_of(lambda: {f"{name}:": summary for name, summary in _probes().items()})
analyses = names_of(lambda: {**_analyses(), "all": "all of them"})
facts = names_of(_facts, kind="file")
shells = names_of(lambda: {shell: f"read from {file}" for shell, file in SHELLS.items()})
