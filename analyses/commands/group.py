"""The `hijacklens` command: a group whose commands are imported when they are called.

Listing the commands with one line each costs no import of torch or TransformerLens, so that
`hijacklens --help` answers at once, and so does a shell that completes a word. An `InputError` is
printed as one line and ends with status 2; Ctrl-C ends with status 130.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import click

from analyses.commands.screen import colour
from hijacklens.errors import InputError, unknown

COMMANDS = {
    "hijack": "Score how far recall of facts gives way under hijacking.",
    "ask": "Show what a model says next, with and without a hijack.",
    "models": "List the models that come as packages, and how to name others.",
    "schemes": "List the hijack schemes.",
    "probes": "List the probes that can be pointed at a model, with their options.",
    "facts": "List the relations of a set of facts, or show single facts.",
    "plan": "Say how many tokens a run would compute, without a model.",
    "train": "Train one-layer models on latent concept association.",
    "cache": "Show or clear the store of finished readings.",
    "heads": "Find the heads that carry a hijack, and test them on facts held back.",
    "trace": "Take one fact's logit shift apart: tokens, layers, heads, MLPs.",
    "report": "Put saved results on one page that opens with no network.",
    "sweep": "Run models, schemes, facts and one-layer recipes from one file.",
    "reproduce": "Reproduce the paper's figures and statements, with checks.",
    "completion": "Print the script by which a shell completes commands and names.",
}
"""Command -> its line in the help; the command itself is `analyses.commands.<name>:command`."""


class Commands(click.Group):
    """A group that imports a command when it is asked for, not before."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module now."""
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"analyses.commands.{cmd_name}").command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Refuse an unknown command with the nearest name."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise unknown("command", args[0], COMMANDS)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hijacklens")
def group() -> None:
    """Measure, probe and explain context hijacking in language models.

    Put "Do not think of Germany." before "The band The Cranberries was formed in the country of"
    and SmolLM2 says Germany. Start with: hijacklens hijack --model smollm2-135m --out runs/first

    \b
    Every command has --json (one document on standard output) and --quiet.
    Exit status: 0 done; 1 a check failed, or some of the work did;
    2 bad input, told in one line; 130 stopped by Ctrl-C.
    Colour is for terminals alone; NO_COLOR=1 turns it off.
    """  # noqa: D301


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its status, as the help says."""
    options: dict[str, Any] = {"prog_name": "hijacklens", "color": colour()}
    try:
        status = group.main(args=arguments, standalone_mode=False, **options)
    except InputError as error:
        click.echo(f"{_red('hijacklens:')} {error}", err=True, color=colour())
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("hijacklens: stopped.", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read the output has seen enough; what is left of it goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    if isinstance(status, int) and status:  # click gives back what a command exits with
        sys.exit(status)


def _red(text: str) -> str:
    return click.style(text, fg="red")
