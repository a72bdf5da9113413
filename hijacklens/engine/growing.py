"""Prefixes that grow by a symbol at a time: answers while they are generated.

The keys and values of all symbols so far are kept, so that a further symbol costs one token and not
its complete prefix. Where keys and values cannot be kept, complete prefixes are read each time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from hijacklens.engine.batch_size import BatchSize
from hijacklens.engine.engine import read, reason_apart
from hijacklens.engine.forward import Pass
from hijacklens.engine.key_values import Pool
from hijacklens.engine.packs import Pack, cut
from hijacklens.engine.plan import Level
from hijacklens.engine.reading import Readings, ReadOptions, Requests, ignore
from hijacklens.engine.support import disagreement, support_of
from hijacklens.engine.trie import Trie
from hijacklens.engine.work import Work
from hijacklens.models.agreement import agreement_of
from hijacklens.models.hooked import HookedModel
from hijacklens.prompts.tokens import TokenIds


class Growing:
    """Readings after prefixes and after what is added to them.

    The model must not change while one is in use (`hijacklens.models.exclusive.exclusively`).
    """

    def __init__(
        self, model: HookedModel, prefixes: Collection[TokenIds], options: ReadOptions, *, more: int
    ) -> None:
        """Prepare for some prefixes.

        Args:
            model: A hooked causal model.
            prefixes: The prefixes that grow.
            options: As for `read`; with the sharing `plain` nothing is kept.
            more: How many symbols may be added to a prefix in all, on all its continuations.
        """
        self._options = options
        self._run = Pass.of(model, options.probes, options.spans, operation="generating")
        self._trie = Requests.of(dict.fromkeys(prefixes, ())).trie
        self._size = BatchSize(model, options.batch_tokens)
        self._pool: Pool | None = None
        self._room = more * len(prefixes)
        support, switch = support_of(model), agreement_of(model).switch
        longest = max(map(len, prefixes)) + more
        kept = options.sharing != "plain" and (switch is None or longest <= switch)
        kept = kept and not (reason_apart(self._run) or support.refused)
        self.kept = kept and not disagreement(self._run, self._trie, support, cached=True)
        """Whether keys and values are kept."""
        self._run = replace(self._run, windows=support.windows)

    def read(self, prefixes: Collection[TokenIds], *, draw: tuple[int, int] = (0, 0)) -> Readings:
        """Read the likeliest or drawn next token after prefixes.

        Args:
            prefixes: In the first call those of the constructor; then any of them, each with what
                was added, of which all but the last symbol has been read.
            draw: As in `ReadOptions`.
        """
        requests = Requests.of(dict.fromkeys(prefixes, ()))
        options = replace(self._options, draw=draw)
        if not self.kept:
            return read(self._run.model, requests, options)
        if self._pool is None:
            self._pool = Pool(self._trie, room=self._room)
            limits = self._size.limits(options.pack_tokens)
            level = Level(self._trie, cut(self._trie, self._size.costs, limits, cached=False))
        else:
            trie = Trie.apart(requests.prefixes)
            level = Level(
                trie, [Pack(i, i + 1, n - 1, 1) for i, n in enumerate(trie.lengths.tolist())]
            )
            for prefix in trie.leaves:
                self._pool.add(prefix)
        work = Work(
            self._run, Readings(requests), options, self._size, ignore, level.forward_tokens
        )
        work.do(level, self._pool, keep=True)
        work.fetch()
        return work.readings


def groups(
    model: HookedModel, prefixes: Collection[TokenIds], *, more: int
) -> Iterator[list[TokenIds]]:
    """Yield groups of prefixes whose keys and values fit into memory with `more` symbols each."""
    most = BatchSize(model).limits().trunk_tokens
    group: list[TokenIds] = []
    tokens = 0
    for prefix in sorted(set(prefixes)):
        tokens += len(prefix) + more
        if group and tokens > most:
            yield group
            group, tokens = [], len(prefix) + more
        group.append(prefix)
    if group:
        yield group
