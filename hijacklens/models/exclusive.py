"""Exclusive use of a model: while one thread runs it with probes, other threads wait.

Probes are hooks on the modules of a model, so two runs with different probes at the same time would
act on each other. Every run therefore holds its model (`exclusive`), and so does `hooked`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(slots=True)
class _Hold:
    lock: Any = field(default_factory=threading.RLock)
    made: dict[Any, Any] | None = None


_HOLDS: WeakKeyDictionary[Any, _Hold] = WeakKeyDictionary()
_CHANGING_HOLDS = threading.Lock()


@contextmanager
def held(model: Any) -> Iterator[None]:
    """Run the body while no other thread holds the model; the same thread may hold it again."""
    with _hold(model).lock:
        yield


@contextmanager
def exclusive(model: Any) -> Iterator[None]:
    """Run the body, a run over many batches, while no other thread holds the model.

    The weights must not change in the body: `made_for_run` keeps what was made from them.
    """
    hold = _hold(model)
    with hold.lock:
        outer = hold.made
        hold.made = {} if outer is None else outer
        try:
            yield
        finally:
            hold.made = outer


def exclusively(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function hold the model that is its first argument, as `exclusive` does."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with exclusive(args[0] if args else kwargs["model"]):
            return function(*args, **kwargs)

    return call


def made_for_run(model: Any) -> dict[Any, Any]:
    """Return what has been made from the weights of a model in this run.

    Outside of a run it is always empty, since the weights may have changed.
    """
    made = _hold(model).made
    return {} if made is None else made


def _hold(model: Any) -> _Hold:
    with _CHANGING_HOLDS:
        return _HOLDS.setdefault(model, _Hold())
