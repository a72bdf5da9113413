"""The command `hijacklens`, a group that imports each command only when it is called.

Listing the commands with one line each costs no import of torch or TransformerLens, so that
`hijacklens --help` answers at once, and so does a shell that completes a word. An `InputError` is
printed as one line and ends with status 2; a full disk, a file without permission or too little
memory as one line with status 1; Ctrl-C ends with status 130.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from analyses.commands.declarations import RenamedOption
from analyses.commands.screen import (
    colour_for_click,
    printable_streams,
    say,
    warnings_as_notes,
)
from hijacklens.errors import InputError, unknown, utf8

COMMANDS = {
    "hijack": "Score how often recall of facts fails under hijacking.",
    "ask": "Show what a model says next, with and without a hijack.",
    "models": "List the models that come as packages, and how to name others.",
    "schemes": "List the hijack schemes.",
    "probes": "List the kinds of probes and their options.",
    "facts": "List the relations of a set of facts, or show single facts.",
    "plan": "Count the tokens that a run would compute, without a model.",
    "train": "Train one-layer models on latent concept association.",
    "world": "Train a small language model on a world that is known exactly.",
    "cache": "Show or clear the store of finished readings.",
    "heads": "Find the heads that carry a hijack, and test them on held-out facts.",
    "law": "Predict which facts give way, by laws that are compared on new relations.",
    "defend": "Compare methods that bring recall back under a hijack, with all their costs.",
    "trace": "Split the logit shift of one fact by token, layer, head and MLP.",
    "compare": "Compare two runs, or two schemes, doses, rules or models of one, fact by fact.",
    "report": "Put saved results on one page that needs no network.",
    "show": "Print the tables of saved results again.",
    "export": "Write a saved run for lm-evaluation-harness, Every Eval Ever or the hub.",
    "sweep": "Run models, schemes, facts and one-layer recipes from one file.",
    "reproduce": "Reproduce the paper's figures and statements, with checks.",
    "completion": "Print the script by which a shell completes commands and names.",
}
"""Command -> its line in the help; the command itself is `analyses.commands.<name>:command`, or
`analyses.commands.<module>:<name>` for those of `SHARED`."""
SHARED: dict[str, str] = {
    **dict.fromkeys(("models", "schemes", "probes", "facts", "completion"), "listing"),
    **dict.fromkeys(("compare", "report", "show", "export", "cache"), "saved"),
    **dict.fromkeys(("ask", "trace"), "one_fact"),
    **dict.fromkeys(("train", "world"), "training"),
}
"""Command -> the module that it shares with others."""


class Commands(click.Group):
    """A group that imports a command when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"analyses.commands.{SHARED.get(cmd_name, cmd_name)}")
        return getattr(module, cmd_name if cmd_name in SHARED else "command")

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Refuse an unknown command with the nearest name; replace old names of options."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise unknown("command", args[0], COMMANDS)
        name, command, rest = super().resolve_command(ctx, args)
        for option in command.params if command else ():
            if isinstance(option, RenamedOption):
                rest = [_renamed(option.formerly, option.opts[0], word) for word in rest]
        return name, command, rest

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; where an error begins with the name of a parameter, name its option."""
        try:
            return super().invoke(ctx)
        except InputError as error:
            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            for option in command.params if command else ():
                if option.opts[0].startswith("--") and str(error).startswith(f"{option.name} is "):
                    text = str(error).removeprefix(option.name or "")
                    raise InputError(f"{option.opts[0]}{text}") from error
            raise

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
    Exit status: 0 done; 1 a check failed, or some of the work did (no room);
    2 bad input, reported in one line; 3 a gate is inconclusive; 130 stopped by Ctrl-C.
    Colour is for terminals only; NO_COLOR=1 turns it off.
    """  # noqa: D301


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its status, as the help says."""
    with _interruptible(), printable_streams():
        status = _status(arguments)
    if status:
        sys.exit(status)


def _status(arguments: list[str] | None) -> int:
    """Run the command line, print errors as lines, and return the exit status."""
    options: dict[str, Any] = {"prog_name": "hijacklens", "color": colour_for_click()}
    try:
        for word in sys.argv[1:] if arguments is None else arguments:
            utf8("an argument of the command line", word, "'Zürich'")
        with warnings_as_notes():
            status = group.main(args=arguments, standalone_mode=False, **options)
        if sys.stdout is not None:
            sys.stdout.flush()
    except InputError as error:
        say(str(error), name="hijacklens:")
        return 2
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        say("hijacklens: stopped.")
        return 130
    except BrokenPipeError:
        _discard_output()  # the reader of the pipe has closed it
        return 1
    except (OSError, MemoryError) as error:
        say(_failure(error), name="hijacklens:")
        _discard_output()
        return 1
    except Exception:
        # Code of a library that Ctrl-C interrupts, such as an import, may end in any error.
        if not _STOPPED.is_set():
            raise
        say("hijacklens: stopped.")
        return 130
    return status if isinstance(status, int) else 0  # click returns the status of a command


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk, a quota and a limit on the size of files."""


def _failure(error: OSError | MemoryError) -> str:
    """Say which file could not be used, why, and what to do."""
    if isinstance(error, MemoryError):
        return (
            "there is not enough memory. Use fewer facts (--limit), smaller batches "
            "(--batch-tokens) or a machine with more memory; what was finished is kept."
        )
    name = repr(error.filename) if error.filename else "a file"
    room = error.errno in NO_ROOM
    cure = "Make room there, or name another place" if room else "Check it, or name another place"
    return (
        f"cannot use {name}: {error.strerror or error}. {cure} (--out for results, "
        "HIJACKLENS_CACHE for models and the store, TMPDIR for temporary files), and give the same "
        "command again."
    )


def _discard_output() -> None:
    """Discard what is left of standard output, so that nothing fails when Python ends."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_STOPPED = threading.Event()
"""Set by Ctrl-C."""


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let a second Ctrl-C end the process at once; it could otherwise interrupt the last words."""
    ours = (signal.default_int_handler, signal.SIG_DFL)
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or (before := signal.getsignal(signal.SIGINT)) not in ours:
        yield
        return

    def stop(*_: object) -> None:
        _STOPPED.set()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise KeyboardInterrupt

    _STOPPED.clear()
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _renamed(old: str, new: str, word: str) -> str:
    """Return a word of the command line with the new name of an option, and print a note."""
    if word != old and not word.startswith(f"{old}="):
        return word
    say(f"note: {old} is now called {new}; the next release drops the old name.")
    return word.replace(old, new, 1)
