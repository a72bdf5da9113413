"""The commands of `hijacklens`; each is a thin layer over the library."""

import signal


def main() -> None:
    """Run the command line; while it is imported, Ctrl-C ends the process without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from analyses.commands.group import main

    main()
