"""A call of every command on a tiny model and a few facts, for tests of what all have in common."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from click import Context
from sample_facts import sample_facts
from tiny_models import tiny_model, tiny_tokenizer

from analyses.commands.group import COMMANDS, group, main

CALLS = {
    "hijack": "hijack --model {m} --facts {f} --limit 3 --doses 1 --out {o}",
    "ask": "ask Rome --model {m} --true Italy --tokens 2 --probe knock-out:source=last,target=at:0",
    "models": "models",
    "schemes": "schemes",
    "probes": "probes",
    "facts": "facts --facts {f} --show",
    "plan": "plan --tokenizer {m} --facts {f} --doses 0-2",
    "train": "train --bits 3 --d-model 4 --length 8 --seeds 1 --lr 0.01 --steps 2 --evaluation 8 "
    "--out {o}",
    "world": "world --bits 1 --subjects 2 --d-model 8 --steps 2 --batch 2 --length 8 --out {o}",
    "cache info": "cache info",
    "cache clear": "cache clear --yes",
    "heads": "heads --model {m} --facts {f} --size 1 --candidates 2 --random-sets 1 --out {o}",
    "law": "law --model {m} --facts {f} --doses 0-1 --folds 2 --out {o}",
    "defend": "defend --model {m} --facts {f} --method separator --out {o}",
    "trace": "trace --model {m} --facts {f} --case 0 --out {o}",
    "compare": "compare {h} {h}",
    "export": "export {h} --to dataset --out {o}",
    "report": "report {h} --out {o}.html",
    "show": "show {h}",
    "sweep": "sweep {s} --out {o}",
    "reproduce": "reproduce lemma5 --out {o}",
    "completion": "completion bash",
}
"""Command -> its call; `places` gives the paths in braces."""
WRITING = tuple(name for name, call in CALLS.items() if "--out" in call)


def commands() -> Iterator[tuple[str, Any]]:
    """Name -> command, those of groups too."""
    context = Context(group)
    for name in COMMANDS:
        found = group.get_command(context, name)
        for inner, command in getattr(found, "commands", {name: found}).items():
            yield (name if inner == name else f"{name} {inner}"), command


def make_places(root: Path, *, model: str = "tiny-llama", subject: str = "") -> dict[str, Path]:
    """Make a model folder, a file of facts and one of a sweep; return the paths of the calls.

    Args:
        root: Where they are made.
        model: The name of the model's folder.
        subject: Replaces the subject of the first fact.
    """
    tiny_model("llama").save_pretrained(root / model)
    tiny_tokenizer("llama").save_pretrained(root / model)
    table = sample_facts().to_dataframe().drop(columns="prompt")
    if subject:
        table["subject"] = [subject, *table["subject"][1:]]
    table.to_json(root / "facts.jsonl", orient="records", lines=True)
    models, facts = json.dumps(str(root / model)), json.dumps(str(root / "facts.jsonl"))
    (root / "sweep.toml").write_text(
        f'[scoring]\nmodels = [{models}]\nfacts = [{facts}]\nschemes = ["think"]\ndoses = "0-1"\n'
    )
    names = {"m": root / model, "f": root / "facts.jsonl", "s": root / "sweep.toml"}
    return {**names, "o": root / "out", "h": root / "hijack"}


def words_of(name: str, places: Mapping[str, Path]) -> list[str]:
    """The words of a call, whose paths may have spaces in them."""
    return [word.format(**places) for word in CALLS[name].split()]


def run(*arguments: object) -> int:
    """The exit status of a command line."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code
    return 0
