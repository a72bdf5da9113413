"""The prompts of a run: every fact in the words of every scheme, at every dose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import pandas as pd

from hijacklens.facts.fact import Fact, FactSet
from hijacklens.facts.joining import Joining, gap
from hijacklens.prompts.chat import prompt_of
from hijacklens.prompts.prompt import Prompt, pieces
from hijacklens.prompts.schemes import Scheme, Unusable
from hijacklens.prompts.tokens import Texts

PROMPT_COLUMNS = ("case_id", "scheme", "sentence", "query", "target_true", "target_false")


@dataclass(frozen=True, slots=True)
class Unscored:
    """A fact that could not be scored under a scheme, and the reason."""

    fact: Fact
    scheme: str
    reason: str


@dataclass(frozen=True, slots=True)
class Wording:
    """A fact with the sentence of a scheme: its prompts at all doses."""

    fact: Fact
    scheme: str
    sentence: str
    facts: FactSet
    """The set of the fact, with the opening, the joining and the chat."""
    tokenizer: Any
    """Has the template of a chat."""

    def texts(self, doses: Iterable[int]) -> Iterator[Texts]:
        """Yield the texts of the prompts in the order of the doses: alone, and with each target."""
        if self.facts.chat:
            yield from self.whole_texts(doses)
            return
        query, sentence, opening = self.fact.prompt, self.sentence, self.facts.opening
        in_pieces = (pieces(query, sentence, dose, opening) for dose in doses)
        for last, prompts in groupby(in_pieces, key=itemgetter(-1)):
            yield [prompt[:-1] for prompt in prompts], self._endings(last, self.facts.joining)

    def whole_texts(self, doses: Iterable[int]) -> Iterator[Texts]:
        """Yield the same as `texts`, with each prompt as one piece."""
        for prompt in map(self.prompt, doses):
            yield [[]], self._endings(prompt.text, prompt.joining)

    def _endings(self, last: str, joining: Joining) -> list[list[str]]:
        """Return the last piece of a prompt, alone and with each target."""
        targets = (self.fact.target_true, self.fact.target_false)
        return [[last]] + [
            [last, target] if gap(last, target, joining) else [last + target] for target in targets
        ]

    def prompt(self, dose: int) -> Prompt:
        """Return the prompt at a dose."""
        options = {"sentence": self.sentence, "scheme": self.scheme, "dose": dose}
        return prompt_of(self.fact, self.facts, self.tokenizer, **options)


@dataclass(frozen=True, slots=True)
class Prompts(Sequence[tuple[Fact, Prompt]]):
    """The prompts of wordings, with all doses of each; a `Prompt` is made when looked up."""

    wordings: Sequence[Wording]
    doses: Sequence[int]

    def __len__(self) -> int:
        return len(self.wordings) * len(self.doses)

    def __getitem__(self, index: int) -> tuple[Fact, Prompt]:  # type: ignore[override]
        wording, dose = divmod(range(len(self))[index], len(self.doses))
        return self.wordings[wording].fact, self.wordings[wording].prompt(self.doses[dose])


def make_prompts(
    facts: FactSet,
    schemes: Scheme | Sequence[Scheme],
    doses: Sequence[int],
    tokenizer: Any,
    *,
    seed: int,
) -> tuple[Prompts, list[Unscored]]:
    """Return the prompts of all facts at all doses, and the facts a scheme has no sentence for.

    The tokenizer has the template of a chat.
    """
    false_targets: dict[str, list[str]] = {}
    for fact in facts:
        false_targets.setdefault(fact.relation_id, []).append(fact.target_false)
    wordings: list[Wording] = []
    unscored: list[Unscored] = []
    for scheme in [schemes] if isinstance(schemes, Scheme) else schemes:
        for fact in facts:
            try:
                sentence = scheme.sentence(fact, pool=false_targets[fact.relation_id], seed=seed)
            except Unusable as reason:
                unscored.append(Unscored(fact, scheme.name, str(reason)))
                continue
            wordings.append(Wording(fact, scheme.name, sentence, facts, tokenizer))
    return Prompts(wordings, doses), unscored


def prompt_table(prompts: Prompts) -> pd.DataFrame:
    """Return the texts of prompts: one row per fact and scheme, with the hijacking sentence.

    The prompt at dose k is `" ".join([sentence] * k + [query])`, after the opening of the facts.
    The sentence is empty if only the bare query was scored.
    """
    rows = []
    for wording in prompts.wordings:
        fact, sentence = wording.fact, wording.sentence if any(prompts.doses) else ""
        texts = (sentence, fact.prompt, fact.target_true, fact.target_false)
        rows.append((fact.case_id, wording.scheme, *texts))
    return pd.DataFrame(rows, columns=list(PROMPT_COLUMNS))
