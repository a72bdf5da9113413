"""Inspect on our engine: a model provider, and hijacking as a task scored by log-probabilities.

    pip install "hijacklens[inspect]"
    inspect eval hijacklens/hijack --model hijacklens/smollm2-135m -T limit=20

An entry point makes Inspect import this module, which registers the model, the task, its solver and
its scorer. The solver reads the log-probabilities of both targets, the scorer decides. Samples that
wait at the same time are computed together, so that they share prefixes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import count
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import pandas as pd
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    Logprob,
    Logprobs,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    get_model,
    modelapi,
)
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import Generate, Solver, TaskState, solver

from analyses.adapters.requests import cutting, probes_of, require_spans, symbols_of
from hijacklens.engine.reading import ReadOptions
from hijacklens.errors import InputError
from hijacklens.exports.run import MEASURES
from hijacklens.facts.chat import Chat
from hijacklens.facts.loading import load_facts
from hijacklens.models.loading import load_model
from hijacklens.probe import spans_of
from hijacklens.prompts.chat import prompt_of
from hijacklens.prompts.schemes import get_scheme
from hijacklens.prompts.tokens import TokenIds, encode
from hijacklens.prompts.wordings import Prompts, Wording, make_prompts
from hijacklens.scoring import efficacy
from hijacklens.scoring.continuing import Draft, drafted
from hijacklens.scoring.execution import Execution, read_stored
from hijacklens.scoring.items import make_items

T = TypeVar("T")
LONGEST = 256
"""Tokens of an answer, if `--max-tokens` does not say."""
UNSUPPORTED = (
    *("top_p", "top_k", "frequency_penalty", "presence_penalty", "logit_bias", "best_of"),
    *("top_logprobs", "prompt_logprobs", "response_schema"),
)
"""Settings of generation that would change answers and that we do not have."""


def _ours(registered: T) -> T:
    """Let Inspect register a function under `hijacklens/`, as it does for our module."""
    registered.__module__ = "hijacklens"
    return registered


class Together:
    """Computes the keys that wait while earlier ones are computed in one go, each once."""

    def __init__(self, compute: Callable[[list[Any]], Mapping[Any, Any]]) -> None:
        """Take a function from keys to their values; it runs in a thread."""
        self._compute, self._lock = compute, anyio.Lock()
        self._waiting: dict[Any, None] = {}
        self._done: dict[Any, Any] = {}

    async def get(self, key: Any) -> Any:
        """Return the value of a key."""
        if key not in self._done:
            self._waiting[key] = None
        async with self._lock:
            if key not in self._done:
                keys, self._waiting = [*self._waiting | {key: None}], {}
                self._done |= await anyio.to_thread.run_sync(self._compute, keys)
        return self._done[key]


class HijacklensAPI(ModelAPI):
    """A model of `hijacklens.load_model` in Inspect.

    `--model hijacklens/NAME` names a model as `load_model` takes it. `-M probe=...` has probes as
    `hijacklens hijack --probe` takes them, joined by `;`; `-M chat=false` writes messages without
    the chat template. Other arguments are those of `load_model`, and so are its errors.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008
        probe: str | list[str] = "",
        chat: bool | None = None,
        **model_args: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        self.hooked = load_model(model_name, **model_args)
        # The command line splits a text at its commas.
        text = probe if isinstance(probe, str) else ",".join(probe)
        self.probes = probes_of(self.hooked, text)
        self.spans = spans_of(self.probes)
        self.chat = bool(self.hooked.tokenizer.chat_template) if chat is None else chat
        self._batches: dict[Any, Together] = {}
        self._draws = count()

    def together(self, key: Any, compute: Callable[[list[Any]], Mapping[Any, Any]]) -> Together:
        """Return the batches of a kind of computation, which the key identifies."""
        return self._batches.setdefault(key, Together(compute))

    def max_tokens(self) -> int | None:
        """Return the usual length of an answer."""
        return LONGEST

    def max_connections(self) -> int:
        """Return how many requests may wait to be computed together."""
        return 1000

    async def generate(
        self, input: list[ChatMessage], tools: list[Any], tool_choice: Any, config: GenerateConfig
    ) -> ModelOutput:
        """Generate answers, greedily unless there is a temperature.

        Raises:
            InputError: There are tools, settings, spans or messages that this model cannot take.
        """
        require_spans(self.spans)
        names = [name for name in UNSUPPORTED if getattr(config, name) is not None]
        if tools or names:
            raise InputError(f"the model hijacklens has no {', '.join(names) or 'tools'}.")
        prompt, heat = self._symbols(input), config.temperature or 0.0
        window = int(self.hooked.cfg.n_ctx)
        if len(prompt) > window:
            raise InputError(f"{len(prompt)} tokens exceed the context window of {window}.")
        drawn = next(self._draws) if heat and config.seed is None else config.seed or 0
        longest, stops = config.max_tokens or LONGEST, tuple(config.stop_seqs or ())
        samples = (config.num_choices or 1) if heat else 1

        def compute(prompts: list[TokenIds]) -> dict[TokenIds, list[Draft]]:
            options = ReadOptions(probes=self.probes, spans=self.spans, temperature=heat)
            how = {"tokens": longest, "cut": cutting(stops), "samples": samples, "seed": drawn}
            return dict(zip(prompts, drafted(self.hooked, prompts, options, **how), strict=True))

        batches = self.together((longest, stops, heat, samples, drawn), compute)
        drafts: list[Draft] = await batches.get(prompt)
        written = sum(len(draft.logprobs) for draft in drafts)
        usage = ModelUsage(
            input_tokens=len(prompt), output_tokens=written, total_tokens=len(prompt) + written
        )
        choices = []
        for draft in drafts:
            said = [self.hooked.tokenizer.decode([token]) for token in draft.tokens]
            pairs = zip(said, draft.logprobs, strict=True)
            content = [Logprob(token=token, logprob=value) for token, value in pairs]
            ended = "stop" if draft.done else "max_tokens"
            choice = ChatCompletionChoice(
                message=ChatMessageAssistant(content=draft.text, source="generate"),
                stop_reason="model_length" if len(draft.prefix) > window else ended,
                logprobs=Logprobs(content=content) if config.logprobs else None,
            )
            choices.append(choice)
        return ModelOutput(model=self.model_name, choices=choices, usage=usage)

    def _symbols(self, messages: Sequence[ChatMessage]) -> TokenIds:
        turns = [{"role": message.role, "content": message.text} for message in messages]
        text = turns[0]["content"]
        if self.chat:
            open_end = turns[-1]["role"] == "assistant"
            form = {"add_generation_prompt": not open_end, "continue_final_message": open_end}
            text = self.hooked.tokenizer.apply_chat_template(turns, tokenize=False, **form)
        elif [turn["role"] for turn in turns] != ["user"]:
            raise InputError(
                f"{self.model_name} has no chat template, or it is off (-M chat=false), so it "
                "takes one message of the user and no others."
            )
        (ids,) = encode(self.hooked.tokenizer, [text], templated=self.chat)
        return symbols_of(ids, (), self.spans)


@modelapi(name="hijacklens")
def hijacklens() -> type[ModelAPI]:
    """Return the provider of `--model hijacklens/NAME`."""
    return HijacklensAPI


@cache
def _wordings(
    facts: str, scheme: str, limit: int | None, seed: int, chat: str | None
) -> dict[int, Wording]:
    """Return the facts of a task by case id, as `hijacklens hijack` chooses and words them."""
    form: Any = None if chat is None else Chat(hijack=chat)  # type: ignore[arg-type]
    chosen = load_facts(facts, seed=seed).limit(limit, seed=seed).in_chat(form)
    prompts, _unscored = make_prompts(chosen, get_scheme(scheme), [0], None, seed=seed)
    return {wording.fact.case_id: wording for wording in prompts.wordings}


@task
@_ours
def hijack(
    scheme: str = "do-not-think",
    dose: int = 1,
    facts: str = "atlas",
    rule: efficacy.Rule = "first",
    limit: int | None = None,
    seed: int = 0,
    chat: str | None = None,
) -> Task:
    """Score facts after hijacking sentences: the arguments are options of `hijacklens hijack`.

    `limit` draws facts, where `inspect eval --limit` takes the first ones. Facts for which the
    scheme has no sentence are left out.
    """
    asked = {"facts": facts, "scheme": scheme, "limit": limit, "seed": seed, "chat": chat}
    samples = []
    for case_id, wording in _wordings(**asked).items():
        fact, plain = wording.fact, replace(wording.facts, chat=None)
        prompt = prompt_of(fact, plain, None, sentence=wording.sentence, dose=dose, scheme=scheme)
        choices = [fact.target_true, fact.target_false]
        about = {"relation_id": fact.relation_id, "subject": fact.subject}
        samples.append(Sample(prompt.text, choices, fact.target_true, id=case_id, metadata=about))
    data = MemoryDataset(samples, name=f"{facts}, {scheme}, dose {dose}")
    return Task(dataset=data, solver=read_targets(dose=dose, **asked), scorer=verdict(rule))


@solver
@_ours
def read_targets(
    dose: int, facts: str, scheme: str, limit: int | None, seed: int, chat: str | None
) -> Solver:
    """Read the log-probabilities of both targets of a fact, bare and hijacked."""
    asked = (facts, scheme, limit, seed, chat)

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        api = get_model().api
        if not isinstance(api, HijacklensAPI):
            raise InputError(
                "the task hijack reads the log-probabilities of targets, which other providers do "
                f"not give; use --model hijacklens/NAME instead of {get_model()}."
            )
        batches = api.together((dose, *asked), partial(_read, api, dose, _wordings(*asked)))
        found = await batches.get(int(state.sample_id))
        state.metadata["hijack"] = found
        said = found[-1]["top_token"] if isinstance(found, list) else ""
        state.output = ModelOutput.from_content(api.model_name, said)
        return state

    return solve


def _read(
    api: HijacklensAPI, dose: int, wordings: Mapping[int, Wording], case_ids: list[int]
) -> dict[int, list[dict[str, Any]] | str]:
    """Return the items of each fact, bare and hijacked, or the reason why it has no score."""
    tokenizer = api.hooked.tokenizer
    chosen = [replace(wordings[case_id], tokenizer=tokenizer) for case_id in case_ids]
    with Execution().running(api.hooked) as run:
        identity = run.identity
        items, too_long = make_items(
            Prompts(chosen, sorted({0, dose})),
            tokenizer,
            context_length=identity.context_length,
            vocabulary=identity.vocabulary,
            spans=api.spans,
        )
        options = ReadOptions(probes=api.probes, spans=api.spans)
        readings, _, _ = read_stored(run, items.requests, options, True)
    table, not_finite = items.score(readings, model=identity.name, tokenizer=tokenizer)
    groups: Any = table.groupby("case_id")
    found = {case_id: rows.to_dict("records") for case_id, rows in groups}
    return found | {one.fact.case_id: one.reason for one in (*too_long, *not_finite)}


@scorer(metrics={"*": [mean(), stderr()]})
@_ours
def verdict(rule: efficacy.Rule = "first") -> Scorer:
    """Decide which target wins: retention, efficacy and shift in nats, as in the summary."""

    async def score(state: TaskState, target: Target) -> Score:
        found = state.metadata["hijack"]
        if isinstance(found, str):
            return Score.unscored(reason=found)
        last = efficacy.margins(pd.DataFrame(found), rule).iloc[-1]
        value = {measure: float(last[column]) for measure, column in MEASURES.items()}
        wins = "true" if last["true_wins"] else "false" if last["false_wins"] else "neither"
        explanation = f"margin {last['margin']:+.3f} nats: {wins} target wins under rule {rule}"
        return Score(value=value, answer=found[-1]["top_token"], explanation=explanation)

    return score
