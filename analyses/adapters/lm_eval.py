"""lm-evaluation-harness on our engine: its tasks with shared prefixes and with probes.

    pip install "hijacklens[lm-eval]"
    python -m analyses.adapters.lm_eval run --model hijacklens \
        --model_args pretrained=smollm2-135m --tasks hijack_generic,hijack_relation

The command is `lm_eval` itself, to which this module adds the model `hijacklens` and our tasks. In
Python, importing the module registers the model, and `TASKS` is the folder for `include_path`.

The harness prepares texts and tokens as for its Hugging Face backend, and we compute what it reads.
So the numbers are those of that backend.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from analyses.adapters.requests import cutting, probes_of, require_spans, symbols_of
from hijacklens.engine.engine import read
from hijacklens.engine.reading import ReadOptions
from hijacklens.errors import InputError
from hijacklens.models.loading import load_model
from hijacklens.probe import spans_of
from hijacklens.prompts.tokens import TokenIds
from hijacklens.scoring.continuing import continued

TASKS = Path(__file__).with_name("tasks")
"""The folder of our tasks: `lm_eval --include_path`, `TaskManager(include_path=...)`."""
_Backend: Any = HFLM  # its attributes have no types


@register_model("hijacklens")
class HijacklensLM(_Backend):
    """A model of `hijacklens.load_model` that answers the requests of the harness.

    Args:
        pretrained: A model as `load_model` takes it, or a hooked one.
        probe: Probes as text, as `hijacklens hijack --probe` takes them, joined by `;`. They may
            use the spans `last`, `target`, `all` and `at:`.
        device: Device of the model; by default the GPU if there is one.
        dtype: `float32`, `bfloat16` or `float16`.
        batch_size: Windows of rolling tasks that are read together. Other requests are read in
            one go, in batches that the engine chooses.
        options: Further arguments of the harness's Hugging Face backend, such as `max_length`.

    Raises:
        InputError: As for `load_model`, or a probe has other spans.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        probe: str = "",
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int | str = 64,
        **options: Any,
    ) -> None:
        named = isinstance(pretrained, (str, Path))
        self.hooked = load_model(pretrained, device=device, dtype=dtype) if named else pretrained
        self.probes = probes_of(self.hooked, probe)
        self.spans = spans_of(self.probes)
        require_spans(self.spans)
        batch = 64 if str(batch_size).startswith("auto") else int(batch_size)
        options.pop("max_batch_size", None)
        super().__init__(
            pretrained=self.hooked.original_model,
            tokenizer=self.hooked.tokenizer,
            backend="causal",
            batch_size=batch,
            **options,
        )

    def _loglikelihood_tokens(
        self,
        requests: Iterable[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation in nats, and whether it is greedy."""
        steps: list[list[tuple[TokenIds, int]]] = []
        asked: dict[TokenIds, set[int]] = {}
        for _, context, continuation in requests:
            kept = self.max_length + 1 - len(continuation)
            if kept < 1:
                raise InputError(
                    f"a continuation has {len(continuation)} tokens, and the context window of the "
                    f"model has {self.max_length}."
                )
            symbols = symbols_of(context[-kept:], continuation, self.spans)
            first = len(symbols) - len(continuation)
            found = [(symbols[: first + i], token) for i, token in enumerate(continuation)]
            steps.append(found)
            for prefix, token in found:
                asked.setdefault(prefix, set()).add(token)
        readings = read(self.hooked, asked, ReadOptions(probes=self.probes, spans=self.spans))
        answers = []
        for found in steps:
            rows = [(readings[prefix], token) for prefix, token in found]
            greedy = all(reading.top_token == token for reading, token in rows)
            answers.append((sum(reading.logprobs[token] for reading, token in rows), greedy))
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return greedy continuations, each cut at its first stop sequence.

        Raises:
            InputError: A request asks for sampling.
        """
        texts: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        for members in groups.values():
            options: Any = normalize_gen_kwargs(requests[members[0]].args[1], self.max_gen_toks)
            if options.get("do_sample"):
                raise InputError(
                    "this task draws its answers; the model hijacklens generates greedy ones. Use "
                    "the model hf for it."
                )
            stops = handle_stop_sequences(options.get("until"), eos=end)
            longest = options["max_gen_toks"]
            encoded = (self.tok_encode(requests[i].args[0]) for i in members)
            start = longest - self.max_length
            contexts = [symbols_of(tokens[start:], (), self.spans) for tokens in encoded]

            written = continued(
                self.hooked, contexts, ReadOptions(probes=self.probes, spans=self.spans),
                tokens=longest, cut=cutting(stops), quiet=disable_tqdm,
            )  # fmt: skip
            texts |= {i: samples[0] for i, samples in zip(members, written, strict=True)}
        for i, text in texts.items():
            self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return [texts[i] for i in range(len(requests))]


def main() -> None:
    """Run `lm_eval` with our model and our tasks."""
    import sys

    from lm_eval.__main__ import cli_evaluate

    if "run" in sys.argv[1:2] and "--include_path" not in sys.argv:
        sys.argv += ["--include_path", str(TASKS)]
    cli_evaluate()


if __name__ == "__main__":
    main()
