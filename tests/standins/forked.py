"""Child processes that need no import of torch: forks of the test process, started in a moment."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable

FORK = multiprocessing.get_context("fork")


def start(work: Callable[[], object]):
    """A child that does some work and then ends at once, without pytest's own clean-up."""

    def run() -> None:
        work()
        os._exit(0)

    child = FORK.Process(target=run)
    child.start()
    return child


def finish(child) -> int:
    """Wait for the child; its exit status (minus the signal that killed it)."""
    child.join(120)
    assert child.exitcode is not None, "the child hangs"
    return child.exitcode


def kill(child, after: float) -> bool:
    """SIGKILL after some seconds; whether it was still at work."""
    time.sleep(after)
    if child.is_alive():
        os.kill(child.pid, signal.SIGKILL)
    return finish(child) == -signal.SIGKILL
