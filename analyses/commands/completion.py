"""`hijacklens completion`: print the script that makes a shell complete commands and names."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from analyses.commands import names
from analyses.commands.screen import Output, output_options
from hijacklens.errors import unknown


@click.command("completion")
@click.argument("shell", metavar="bash|zsh|fish", shell_complete=names.shells)
@output_options("shell", "file", "script")
def command(shell: str, output: Output) -> None:
    """Print the script with which a shell completes commands, options and names.

    Names of models, schemes, relations, probes and analyses are completed.

    \b
    Set it up once:
      echo 'eval "$(hijacklens completion bash)"' >> ~/.bashrc
      echo 'eval "$(hijacklens completion zsh)"' >> ~/.zshrc
      hijacklens completion fish > ~/.config/fish/completions/hijacklens.fish
    """  # noqa: D301
    if shell not in names.SHELLS:
        raise unknown("shell", shell, names.SHELLS)
    maker = get_completion_class(shell)
    assert maker is not None  # click has all of SHELLS
    root = click.get_current_context().find_root().command
    script = maker(root, {}, "hijacklens", "_HIJACKLENS_COMPLETE").source()
    if not output.as_json:
        click.echo(script)
    output.show(shell=shell, file=names.SHELLS[shell], script=script)
