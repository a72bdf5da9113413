"""The part of Ray that `hijacklens.workers` uses, in this process: actors run when waited for."""

from __future__ import annotations

from types import SimpleNamespace


class Died(Exception):
    """Raised when the process of an actor has ended."""


class TaskError(Exception):
    def __init__(self, cause):
        super().__init__(str(cause))
        self.cause = cause


class PretendRay:
    """`fate(method, arguments)` is called before every task; it may raise `Died`."""

    def __init__(self, fate=lambda method, arguments: None):
        self.fate = fate
        self.made = 0
        self.killed = []
        names = ("WorkerCrashedError", "OutOfMemoryError", "NodeDiedError", "ObjectLostError")
        self.exceptions = SimpleNamespace(
            RayActorError=Died, RayTaskError=TaskError, **dict.fromkeys(names, Died)
        )

    def remote(self, kind):
        def make(*arguments):
            self.made += 1
            return Actor(kind(*arguments))

        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=make))

    def put(self, value):
        return value

    def wait(self, refs, *, num_returns=1, timeout=None):
        return refs[-1:], refs[:-1]

    def get(self, ref):
        method, arguments = ref
        try:
            self.fate(method.__name__, arguments)
            return method(*arguments)
        except Died:
            raise
        except Exception as error:
            raise TaskError(error) from error

    def kill(self, actor):
        self.killed.append(actor)


class Actor:
    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        method = getattr(self._inner, name)
        return SimpleNamespace(remote=lambda *arguments: Ref((method, arguments)))


class Ref(tuple):
    """A reference to the answer of one call."""

    __hash__ = object.__hash__

    def __eq__(self, other):
        return self is other
