"""What is known of a fact before it is hijacked: the predictors of its shift.

Two runs are read, and neither is the hijacked one: the bare query, and the hijacking sentence
alone, which ends before the query begins. Targets are read by their first token (rule `first`).

    logp_true, logp_false, prior    both targets after the bare query, and their log-odds, in nats
    rank_true, rank_false           log(1 + how many tokens are more likely)
    entropy, top_logprob            of the next token after the bare query, in nats
    sentence_true, sentence_false   both targets after the sentence alone, in nats
    tokens_*                        tokens of each target, the query and the sentence
    id_true, id_false               log(1 + token id) / log(vocabulary): later mostly means rarer
    similarity_true, _false         cosine of the mention's embedding and a target's unembedding
    similarity_targets              cosine of both unembeddings
    copying                         what heads would write to the margin, if each attended to the
                                    mention as to the subject in the bare run (values of the
                                    sentence alone); copying_all: if each attended to the mention
                                    alone; both without the scales of norms and in standard
                                    deviations over the facts of a scheme
    attention                       mean attention to the subject in the bare run
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from hijacklens.engine.batches import batches
from hijacklens.errors import InputError
from hijacklens.facts.fact import FactSet
from hijacklens.files import write_whole
from hijacklens.models.agreement import require_agreement
from hijacklens.models.hooked import HookedLanguageModel, HookedModel, device_of
from hijacklens.models.identity import identify
from hijacklens.probe import HookProbe, logits_at
from hijacklens.progress import bar
from hijacklens.prompts.layout import Layout
from hijacklens.prompts.schemes import Scheme, get_schemes
from hijacklens.scoring.pairs import SAME_FIRST_TOKEN, Pair, Pairs, pairs
from hijacklens.scoring.result import HijackResult
from hijacklens.store.fingerprint import fingerprint_of
from probes.anatomy import anatomy_of
from probes.anatomy.matrices import head_matrices, kv_head_of
from probes.anatomy.norms import embedded

SIDES = ("true", "false")
AFTER = ("logp_true", "logp_false", "rank_true", "rank_false", "prior", "entropy", "top_logprob")
PREDICTORS = (
    *AFTER,
    *(f"{of}_{side}" for of in ("sentence", "tokens", "id", "similarity") for side in SIDES),
    *("tokens_query", "tokens_sentence", "similarity_targets", "copying", "copying_all"),
    "attention",
)
TEXTS = ("model", "scheme", "case_id", "relation_id", "subject", "target_true", "target_false")
"""Columns that say which fact a row is of."""
EQUAL, ROUNDED = 0.002, 0.5
"""Nats by which a margin may differ when it is read again, in float32 and in 16 bits."""
MOST_READ = 64
"""Rows in a batch at most: each has the logits of the vocabulary."""
CHUNK = 256
"""Rows that are read and kept together."""


def predictors(
    model: HookedLanguageModel,
    facts: FactSet,
    schemes: str | Scheme | Iterable[str | Scheme] = ("do-not-think",),
    *,
    seed: int = 0,
    keep: Path | None = None,
    quiet: bool = False,
) -> pd.DataFrame:
    """Return a row per fact and scheme, with the columns `TEXTS` and `PREDICTORS`.

    Facts without a prompt pair, or whose targets share their first token, have no row (`skipped`).
    Costs one forward pass over every bare query and every sentence.

    Args:
        model: The model.
        facts: The facts.
        schemes: One or several schemes, or their names, each once.
        seed: Seeds the schemes.
        keep: A folder for finished rows, so that none is read again. They are keyed by the model,
            the prompts and the code of this module.
        quiet: Draw no progress bar.

    Raises:
        InputError: As for `hijacklens.pairs`; a scheme is given twice; no fact has a shift; or
            the model's logits are not a sum over heads that its hooks show.
    """
    require_agreement(model, operation="a law")
    chosen = [pair for each in _usable(model, facts, schemes, seed) for pair in each]
    if not chosen:
        raise InputError(f"no fact of {facts.name} has a shift under these schemes.")
    name, fingerprint = str(model.cfg.model_name), fingerprint_of(model, identify(model))
    rows = [(name, p.scheme.name, *(getattr(p.fact, of) for of in TEXTS[2:])) for p in chosen]
    table = pd.DataFrame(rows, columns=list(TEXTS))
    table["key"] = [hashlib.sha256(repr(_inputs(pair)).encode()).hexdigest() for pair in chosen]
    code, folder = fingerprint.key.encode() + Path(__file__).read_bytes(), None
    if keep and not fingerprint.unkeyed:
        folder = keep / hashlib.sha256(code).hexdigest()
    found = _kept(folder)
    # Equal prompts are read together: bare queries of a fact, sentences with one false target.
    missing: Any = table[~table["key"].isin([key for part in found for key in part["key"]])]
    order = missing.sort_values(["target_false", "case_id"], kind="stable").index
    with bar(len(order), unit="rows", label=f"{name}, predictors", quiet=quiet) as progress:
        for start in range(0, len(order), CHUNK):
            rows = order[start : start + CHUNK]
            part = _of_pairs(model, [chosen[i] for i in rows])
            found.append(part.assign(key=table.loc[rows, "key"].to_numpy()))
            if folder:
                with suppress(OSError):
                    folder.mkdir(parents=True, exist_ok=True)
                    write_whole(folder / f"{found[-1]['key'][0]}.parquet", found[-1].to_parquet)
            progress.update(len(rows))
    values = pd.concat(found).drop_duplicates("key").set_index("key")
    table[list(PREDICTORS)] = values.loc[table.pop("key")].to_numpy()
    scaled = ["copying", "copying_all"]  # the scales of norms differ between models
    spread: Any = table.groupby("scheme")[scaled].transform("std", ddof=0)
    table[scaled] /= spread.where(spread > 0, 1)
    return table


def skipped(
    model: HookedLanguageModel,
    facts: FactSet,
    schemes: str | Scheme | Iterable[str | Scheme] = ("do-not-think",),
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the facts that `predictors` has no row for: model, case_id, ..., scheme, reason."""
    parts = [each.skipped for each in _usable(model, facts, schemes, seed)]
    return pd.concat(parts).drop_duplicates(ignore_index=True)


def _usable(model: Any, facts: FactSet, schemes: Any, seed: int) -> list[Pairs]:
    """Return the pairs of each scheme that have a shift."""
    made = [pairs(model, facts, scheme=each, seed=seed) for each in get_schemes(schemes)]
    return [
        each.without(SAME_FIRST_TOKEN if pair.same_first_token else None for pair in each)
        for each in made
    ]


def _inputs(pair: Pair) -> tuple[Any, ...]:
    """Return what the predictors of a pair are made of, in an order that is always the same."""
    prompts = [(each.ids, sorted(each.spans.items())) for each in (pair.bare, pair.hijacked)]
    return *prompts, pair.items[0].true, pair.items[0].false


def _kept(folder: Path | None) -> list[pd.DataFrame]:
    """Return the tables in a folder; leave out files that cannot be read."""
    found: list[pd.DataFrame] = []
    for file in sorted(folder.glob("*.parquet")) if folder else ():
        with suppress(OSError, ValueError):
            found.append(pd.read_parquet(file))
    return found


def _of_pairs(model: Any, chosen: Sequence[Pair]) -> pd.DataFrame:
    """Return the columns `PREDICTORS` of prompt pairs; copying is in logits."""
    answers = torch.tensor([(p.items[0].true[0][1], p.items[0].false[0][1]) for p in chosen])
    anatomy = anatomy_of(model, chosen[0].bare.ids)
    layers = [(i, form) for i, form in enumerate(anatomy.layers) if form.attends]
    alone = [p.hijacked.ids[: max(p.hijacked.positions("hijack")) + 1] for p in chosen]
    mentions = [p.hijacked.positions("mention") for p in chosen]
    bare, attention = _read(
        model, [(p.bare.ids, p.bare.positions("subject")) for p in chosen], answers,
        [f"blocks.{i}.attn.hook_pattern" for i, _ in layers],
        lambda hook, value, last, at: value[:, last, list(at)].sum(-1),
    )  # fmt: skip
    clips = {f"blocks.{form.values_of}.attn.{form.values}": form.clip for _, form in layers}

    def at_mention(hook: str, value: Tensor, last: int, at: Sequence[int]) -> Tensor:
        clip = clips[hook]
        value = value if clip is None else value.clamp(-clip, clip)
        return value[list(at)].mean(0) if at else 0 * value[0]

    sentence, values = _read(
        model, list(zip(alone, mentions, strict=True)), answers,
        [f"blocks.{form.values_of}.attn.{form.values}" for _, form in layers], at_mention,
    )  # fmt: skip
    W_U = model.W_U.detach().float().cpu()
    of_answers = [anatomy.pulled(W_U.T[answers[:, i]]) for i in range(2)]
    readout = torch.stack([pulled.at_end for pulled in of_answers], 1)
    written = []
    for (i, form), value in zip(layers, values, strict=True):
        true, false = (pulled.heads[i] for pulled in of_answers)
        to, W_O = false - true, head_matrices(model, i, "O")[0].float().cpu()
        if value.shape[1] < len(W_O):
            value = value[:, [kv_head_of(model, head) for head in range(len(W_O))]]
        factor = form.attention * math.prod(later.stream for later in anatomy.layers[i:])
        written.append((value * torch.einsum("rd,hvd->rhv", to, W_O)).sum(-1) * factor)
    named = [[ids[i] for i in at] for ids, at in zip(alone, mentions, strict=True)]
    tokens = sorted({token for ids in named for token in ids}) or [0]
    row = {token: i for i, token in enumerate(tokens)}
    stream = embedded(model, tokens).cpu()
    mention = torch.stack(
        [stream[[row[token] for token in ids]].mean(0) if ids else 0 * stream[0] for ids in named]
    )
    columns: dict[str, Any] = {
        **bare,
        "tokens_query": [len(p.bare.positions("query")) for p in chosen],
        "tokens_sentence": [len(p.hijacked.positions("hijack")) for p in chosen],
        "similarity_targets": cosine_similarity(readout[:, 0], readout[:, 1]),
        "copying": sum((a * b).sum(1) for a, b in zip(written, attention, strict=True)),
        "copying_all": sum(each.sum(1) for each in written),
        "attention": torch.cat(attention, 1).mean(1),
    }
    for i, side in enumerate(SIDES):
        columns |= {
            f"sentence_{side}": sentence[f"logp_{side}"],
            f"tokens_{side}": [len(getattr(p.items[0], side)) for p in chosen],
            f"id_{side}": torch.log1p(answers[:, i]) / np.log(len(model.W_E)),
            f"similarity_{side}": cosine_similarity(mention, readout[:, i]),
        }
    return pd.DataFrame({name: np.asarray(columns[name], float) for name in PREDICTORS})


def _read(
    model: HookedModel, prompts: Sequence[Any], answers: Tensor, hooks: Sequence[str], reduce: Any
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return what follows each prompt (token ids, positions), and what hooks show there.

    This is `after` for the last token, and for each hook `reduce(hook, value, last, positions)`.
    Equal prompts are read once.
    """
    rows_of: dict[Any, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows_of.setdefault(prompt, []).append(i)
    distinct, found, device = list(rows_of), [[]] * len(prompts), device_of(model)
    for batch in batches(model, [ids for ids, _ in distinct], most_rows=MOST_READ):
        seen: dict[str, Tensor] = {}
        probe = HookProbe("law", [(name, partial(_show, seen, name)) for name in hooks])
        every, last = torch.arange(len(batch.members), device=device), batch.lengths - 1
        layout = Layout.of_symbols(batch.symbols, ())
        logits = logits_at(model, layout, every, last, probes=[probe])
        for row, logprobs in enumerate(logits.float().cpu().log_softmax(-1)):
            prompt = distinct[batch.members[row]]
            own, shown = (
                rows_of[prompt],
                [reduce(of, seen[of][row], last[row], prompt[1]) for of in hooks],
            )
            columns = after(logprobs.expand(len(own), -1), answers[own])
            for i, *values in zip(own, *columns.values(), strict=True):
                found[i] = [*values, *shown]
    stacked = [torch.stack(values) for values in zip(*found, strict=True)]
    return dict(zip(AFTER, stacked, strict=False)), stacked[len(AFTER) :]


def _show(seen: dict[str, Tensor], name: str, value: Tensor, hook: Any) -> None:
    seen[name] = value.detach().float().cpu()


def after(
    logprobs: Float[Tensor, "row token"], answers: Int[Tensor, "row 2"]
) -> dict[str, Float[Tensor, " row"]]:
    """Return the predictors `AFTER`: both answers, and the distribution that they are from."""
    logp = logprobs.gather(1, answers)
    ranks = torch.stack([(logprobs > logp[:, i, None]).sum(1).log1p() for i in range(2)])
    entropy, prior = torch.special.entr(logprobs.exp()).sum(1), logp[:, 1] - logp[:, 0]
    columns = (*logp.T, *ranks, prior, entropy, logprobs.amax(1))
    return dict(zip(AFTER, columns, strict=True))


def measured(run: HijackResult, table: pd.DataFrame) -> pd.DataFrame:
    """Add `dose` and the measured `shift` in nats of a run: a row per fact, scheme and dose.

    Raises:
        InputError: The run and the table share no fact, the run was made with probes, or the bare
            margins of the two differ, so that they are not of the same weights and prompts.
    """
    if run.settings.probes:
        raise InputError(f"a law is of the model alone; this run has {run.settings.probes}.")
    keys = ["model", "scheme", "case_id"]
    items = run.items.assign(margin=run.items["first_false"] - run.items["first_true"])
    bare = items.loc[items["dose"] == 0, [*keys, "margin"]]
    rows = items.loc[items["dose"] > 0, [*keys, "dose", "margin"]].merge(
        bare, on=keys, suffixes=("", "_bare")
    )
    rows["shift"] = rows["margin"] - rows["margin_bare"]
    joined = table.merge(rows[[*keys, "dose", "shift", "margin_bare"]], on=keys)
    if joined.empty:
        raise InputError(
            "the run and the predictors have no fact in common; use the same model, facts and "
            "schemes, and a dose above 0."
        )
    apart = (joined["prior"] - joined.pop("margin_bare")).abs().groupby(joined["model"]).max()
    dtypes = {model.name: model.dtype for model in run.settings.models}
    for model, most in apart.items():
        if not most <= (EQUAL if dtypes.get(str(model)) == "float32" else ROUNDED):
            raise InputError(
                f"the run and the predictors of {model!r} are not of the same weights, prompts "
                f"and targets: without a hijack their margins differ by up to {most:.2g} nats."
            )
    return joined
