"""The cells of the matrix: what is compared with the plain model, and the outcome of each.

A cell is `equal` (with the worst difference), `refused` (an `InputError`, with its message),
`unbalanced` (an account whose parts do not sum to the difference, with the residual), `wrong`
(another number than the plain model's), `obscure` (any other exception) or `unchecked` (the plain
model has no place where the reference could make the change).
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from analyses.conformance.reference import Reference
from hijacklens.errors import InputError
from hijacklens.facts.fact import Fact, FactSet
from hijacklens.models.loading import load_model
from hijacklens.models.packaged import quiet_transformers
from hijacklens.probe import Probe
from hijacklens.scoring.execution import Execution
from hijacklens.scoring.hijack import hijack
from hijacklens.scoring.pairs import pairs
from probes import ablation, activations, attention, logit_shift, values
from probes.anatomy.matrices import kv_head_of

State: TypeAlias = Literal["equal", "refused", "unbalanced", "wrong", "obscure", "unchecked"]
CELLS = {
    "load": "the model loads and scores",
    "parity": "scores, with every sharing and several batch sizes",
    "store": "scores, computed and then read from a store",
    "knock-out": "scores without attention from the last token to five others",
    "W_V": "scores with the value matrix of a head zero or scaled",
    "head": "scores with the output of a head zero",
    "patch": "scores with the residual stream of another prompt",
    "account": "logit differences, and whether their parts sum to them",
    "state": "weights, hooks, modes and settings after all this",
    "bfloat16": "scores in bfloat16, up to its rounding",
    "folder": "scores after saving and loading the model",
}
"""Cell -> what is compared with the plain model."""
OF_NAMED = tuple(CELLS)[:-2]
"""The cells for a model that has a name: it is loaded in one dtype, from its own place."""
EQUAL = 1e-4
"""Nats up to which a float32 score is the plain model's (contract 1)."""
MOVED = 1e-3
"""Nats by which a change has to move the plain model's scores so that the comparison counts."""
FACTOR = -1.5
"""What W_V is multiplied by."""
SETTINGS: Sequence[dict[str, Any]] = (
    *({"sharing": sharing} for sharing in ("plain", "packed", "cached", "auto")),
    {"sharing": "plain", "batch_tokens": 1},
    {"sharing": "packed", "batch_tokens": 64},
)
"""How the scores of the cell `parity` are computed."""
SCHEME = "do-not-think"
DOSES = (0, 1, 4)
FACTS = FactSet(
    (
        Fact(
            case_id=1,
            relation_id="P17",
            subject="Lyon",
            template="{} is located in the country of",
            target_true="France",
            target_false="Turkey",
        ),
        Fact(
            case_id=2,
            relation_id="P20",
            subject="Victor Hugo",
            template="{} died in the city of",
            target_true="Paris",
            target_false="Rome",
        ),
    ),
    name="the two facts of the check",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a cell."""

    state: State
    nats: float = 0.0
    """The worst difference from the plain model, or the residual of the account."""
    moved: float | None = None
    """How far the change moved the plain model's scores."""
    detail: str = ""
    """The message of an error."""

    @property
    def text(self) -> str:
        """The state in words, with the number that it depends on."""
        if self.state == "unbalanced":
            return f"unbalanced by {self.nats:.2g}"
        if self.state == "wrong" and self.nats:
            return f"WRONG by {self.nats:.2g}"
        return self.state.upper() if self.state in ("wrong", "obscure") else self.state


@dataclass(frozen=True)
class Subject:
    """A model that is checked."""

    make: Callable[[], Any]
    """Makes the plain model; it is called again for every copy that is needed."""
    tokenizer: Any
    load: Callable[..., Any]
    """Loads the hooked model; takes `dtype`."""
    facts: FactSet = FACTS
    doses: Sequence[int] = DOSES

    @classmethod
    def in_memory(cls, make: Callable[[], Any], tokenizer: Any) -> Subject:
        """Return the subject that loads what `make` returns."""

        def load(dtype: str = "float32") -> Any:
            return load_model(make(), tokenizer=tokenizer, dtype=dtype, device="cpu")

        return cls(make, tokenizer, load)

    @classmethod
    def named(cls, name: str, **options: Any) -> Subject:
        """Return the subject of a packaged model, a folder or a hub id.

        `options` are those of `load_model`.

        Raises:
            InputError: The model cannot be loaded.
        """
        model = load_model(name, **options)
        plain: Any = model.original_model
        place = plain.config.name_or_path
        origin = {key: options[key] for key in ("revision", "trust_remote_code") if key in options}

        def make() -> Any:
            made = type(plain).from_pretrained(place, dtype=torch.float32, **origin)
            return made.to(plain.device)

        tokenizer = AutoTokenizer.from_pretrained(place, **origin)
        return cls(make, tokenizer, lambda dtype="float32": model)


@dataclass
class Check:
    """The cells of one model; each method returns its worst difference and what was moved."""

    subject: Subject
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def run(self, cells: Iterable[str] = tuple(CELLS)) -> Mapping[str, Outcome]:
        """Run the cells in order; if the model cannot be loaded, there is only that cell."""
        for cell in cells:
            method = getattr(self, "_" + cell.replace("-", "_").lower())
            with quiet_transformers():
                self.outcomes[cell] = _outcome(method)
            if cell == "load" and self.outcomes[cell].state != "equal":
                break
        return self.outcomes

    # ------------------------------------------------------------ the two models

    @cached_property
    def plain(self) -> Reference:
        """The plain model."""
        return Reference(self.subject.make(), self.subject.tokenizer)

    @cached_property
    def model(self) -> Any:
        """The hooked model."""
        return self.subject.load()

    @cached_property
    def state_before(self) -> dict[str, Any]:
        """The state of the hooked model after its first run."""
        return _state_of(self.model)

    @cached_property
    def prompts(self) -> dict[tuple[int, int], str]:
        """Case id and dose -> prompt."""
        sentence = "Do not think of {}."
        return {
            (fact.case_id, dose): " ".join([sentence.format(fact.target_false)] * dose)
            + " " * bool(dose)
            + fact.prompt
            for fact in self.subject.facts
            for dose in self.subject.doses
        }

    @cached_property
    def expected(self) -> dict[tuple[int, int], tuple[float, float, float]]:
        """What the plain model gives, by case id and dose."""
        return {key: self._read(key) for key in self.prompts}

    def _read(self, key: tuple[int, int], plain: Reference | None = None) -> Any:
        """Return the log-probabilities of both targets and of the top token."""
        plain = plain or self.plain
        fact = next(fact for fact in self.subject.facts if fact.case_id == key[0])
        prompt = self.prompts[key]
        ids = plain.ids(prompt)
        reads = [
            plain.first_token(prompt, target) for target in (fact.target_true, fact.target_false)
        ]
        # A target rarely merges with the end of the prompt, so this is one forward pass.
        prefixes = {tuple(ids), *(tuple(before) for before, _ in reads)}
        known = {prefix: plain.logprobs(prefix) for prefix in prefixes}
        scores = (float(known[tuple(before)][token]) for before, token in reads)
        return (*scores, float(known[tuple(ids)].max()))

    def _scores(self, model: Any, *probes: Probe, **execution: Any) -> dict[Any, Any]:
        """Return the same from the hooked model."""
        result = hijack(
            model,
            self.subject.facts,
            schemes=SCHEME,
            doses=self.subject.doses,
            probes=probes,
            execution=Execution(**{"store": False, **execution}),
            quiet=True,
        )
        rows = result.items[["first_true", "first_false", "top_logprob"]].to_numpy(dtype=float)
        keys = zip(result.items["case_id"], result.items["dose"], strict=True)
        return dict(zip(keys, map(tuple, rows), strict=True))

    @property
    def layer(self) -> int:
        """The last layer with attention patterns; its effect on the output is the largest."""
        return self.attending[-1]

    @property
    def heads(self) -> tuple[int, int]:
        """The number of query heads, and the one that is changed."""
        count = int(self.model.cfg.n_heads)
        return count, min(1, count - 1)

    @cached_property
    def attending(self) -> list[int]:
        """The layers with attention patterns, or all layers if there is none."""
        layers = range(int(self.model.cfg.n_layers))
        names = self.model.hook_dict
        return [i for i in layers if f"blocks.{i}.attn.hook_pattern" in names] or list(layers)

    # ------------------------------------------------------------ the cells

    def _load(self) -> Outcome:
        _ = self._scores(self.model)
        _ = self.state_before, self.expected
        return Outcome("equal")

    def _parity(self) -> Outcome:
        worst = 0.0
        for setting in SETTINGS:
            worst = max(worst, _distance(self._scores(self.model, **setting), self.expected))
        return _judged(worst)

    def _store(self) -> Outcome:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "store.sqlite"
            both = [self._scores(self.model, store=path) for _ in range(2)]
        return _judged(max(_distance(scores, self.expected) for scores in both))

    def _knock_out(self) -> Outcome:
        probe = attention.knock_out("last", "at:1+at:-6..-4", layers=self.attending)
        got = self._scores(self.model, probe)
        # Where a target merges with the end of the prompt, `last` is another token.
        keys = [key for key in self.prompts if self._starts_after(key)]
        expected = {}
        for key in keys:
            n = len(self.plain.ids(self.prompts[key]))
            with self.plain.hidden(n, [n - 1], [1, n - 6, n - 5, n - 4]):
                expected[key] = self._read(key)
        return self._changed(got, expected)

    def _w_v(self) -> Outcome:
        outcomes = []
        heads, head = self.heads
        site = (self.layer, kv_head_of(self.model, head))
        for factor, new in ((0.0, values.zero()), (FACTOR, values.scaled(FACTOR))):
            got = self._scores(self.model, values.replace(new, heads=[site]))
            with self.plain.scaled_values(self.layer, head, heads, factor):
                expected = {key: self._read(key) for key in self.prompts}
            outcomes.append(self._changed(got, expected))
        return max(outcomes, key=lambda outcome: outcome.nats)

    def _head(self) -> Outcome:
        heads, head = self.heads
        got = self._scores(self.model, ablation.ablate(heads=[(self.layer, head)]))
        with self.plain.silenced(self.layer, head, heads):
            expected = {key: self._read(key) for key in self.prompts}
        return self._changed(got, expected)

    def _patch(self) -> Outcome:
        # Under a window both prompts may have the same stream in early layers.
        outcome = self._patched(0)
        for layer in range(1, int(self.model.cfg.n_layers)):
            if outcome.state == "equal" and (outcome.moved or 0) <= MOVED:
                outcome = self._patched(layer)
        return outcome

    def _patched(self, layer: int) -> Outcome:
        made = pairs(self.model, self.subject.facts, scheme=SCHEME, dose=1)
        probe = activations.patch_between(
            self.model, made, span="last", site="resid_post", layers=layer
        )
        got, expected = self._scores(self.model, probe), {}
        for key in self.prompts:
            if key[1] != 1:
                expected[key] = self.expected[key]
                continue
            bare, hijacked = (self.plain.ids(self.prompts[key[0], dose]) for dose in (0, 1))
            new = self.plain.stream(bare, layer, len(bare) - 1)
            with self.plain.patched(layer, len(hijacked) - 1, new):
                expected[key] = self._read(key)
        return self._changed(got, expected)

    def _account(self) -> Outcome:
        made = pairs(self.model, self.subject.facts, scheme=SCHEME, dose=1)
        facts = logit_shift.average(self.model, made, quiet=True).facts.set_index("case_id")
        worst = 0.0
        for case in facts.index:
            for dose, side in ((0, "bare"), (1, "hijacked")):
                true, false, _ = self.expected[case, dose]
                worst = max(worst, abs(float(facts.at[case, side]) - (false - true)))
        residual = float(facts["residual"].abs().max())
        if worst <= EQUAL < residual:
            return Outcome("unbalanced", residual)
        return _judged(max(worst, residual))

    def _state(self) -> Outcome:
        changed = _differing(self.state_before, _state_of(self.model))
        return Outcome("wrong" if changed else "equal", detail=", ".join(changed[:3]))

    def _bfloat16(self) -> Outcome:
        half = Reference(self.subject.make().to(torch.bfloat16), self.subject.tokenizer)
        expected = {key: self._read(key, half) for key in self.prompts}
        got = self._scores(self.subject.load(dtype="bfloat16"))
        # Rounding moves the plain model by this much; it may move ours as far the other way.
        rounding = 0.15 + 2 * _distance(expected, self.expected)
        worst = _distance(got, expected)
        return Outcome("equal" if worst <= rounding else "wrong", worst)

    def _folder(self) -> Outcome:
        with tempfile.TemporaryDirectory() as folder:
            self.subject.make().save_pretrained(folder)
            self.subject.tokenizer.save_pretrained(folder)
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            plain = Reference(loaded, AutoTokenizer.from_pretrained(folder))
            expected = {key: self._read(key, plain) for key in self.prompts}
            return _judged(_distance(self._scores(load_model(folder, device="cpu")), expected))

    # ------------------------------------------------------------ comparisons

    def _starts_after(self, key: tuple[int, int]) -> bool:
        fact = next(fact for fact in self.subject.facts if fact.case_id == key[0])
        ids = self.plain.ids(self.prompts[key])
        return all(
            self.plain.first_token(self.prompts[key], target)[0] == ids
            for target in (fact.target_true, fact.target_false)
        )

    def _changed(self, got: Any, expected: Any) -> Outcome:
        judged = _judged(_distance({key: got[key] for key in expected}, expected))
        moved = _distance({key: self.expected[key] for key in expected}, expected)
        return Outcome(judged.state, judged.nats, moved)


def _outcome(cell: Callable[[], Outcome]) -> Outcome:
    try:
        return cell()
    except InputError as error:
        return Outcome("refused", detail=str(error))
    except LookupError as error:
        if type(error) is LookupError:  # raised by the reference
            return Outcome("unchecked", detail=str(error))
        return _obscure(error)
    except Exception as error:
        return _obscure(error)


def _obscure(error: Exception) -> Outcome:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error).splitlines()[0] if str(error) else ""
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    return Outcome("obscure", detail=f"{type(error).__name__}: {text} ({place})")


def _judged(worst: float) -> Outcome:
    return Outcome("equal" if worst <= EQUAL else "wrong", worst)


def _distance(got: Mapping[Any, Any], expected: Mapping[Any, Any]) -> float:
    """Return the largest difference in nats; infinite if an item is missing."""
    if got.keys() != expected.keys():
        return float("inf")
    pairs = ((a, b) for key in expected for a, b in zip(got[key], expected[key], strict=True))
    differences = [abs(a - b) for a, b in pairs]
    return max(differences) if all(d == d for d in differences) else float("inf")


def _state_of(model: Any) -> dict[str, Any]:
    """Return copies of weights, hooks, modes and configuration."""
    state: dict[str, Any] = {name: value.clone() for name, value in model.state_dict().items()}
    for name, module in _modules(model):
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        state[f"{name}: hooks"] = [
            hook for each in hooks for hook in each.values() if not _of_libraries(hook)
        ]
        state[f"{name}: mode"] = module.training
    for name, point in model.hook_dict.items():
        state[f"{name}: hook point"] = len(point.fwd_hooks)
    state["config"] = model.original_model.config.to_dict()
    return state


def _of_libraries(hook: Any) -> bool:
    """Return whether the libraries put a hook on for themselves, as they do on the first run."""
    return str(getattr(hook, "__module__", "")).startswith("transformer")


def _modules(model: Any) -> Iterator[tuple[str, Any]]:
    yield from model.named_modules()
    yield from ((f"plain {name}", part) for name, part in model.original_model.named_modules())


def _differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) else a == b

    names = [name for name in before if name in after and not same(before[name], after[name])]
    return names + sorted(before.keys() ^ after.keys())
