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
                                    alone; both in standard deviations over the facts of a scheme
    attention                       mean attention to the subject in the bare run
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from hijacklens.engine.batches import batches
from hijacklens.errors import InputError
from hijacklens.facts.fact import FactSet
from hijacklens.models.hooked import HookedLanguageModel, HookedModel, device_of
from hijacklens.models.verification import require_agreement
from hijacklens.probe import HookProbe, logits_at
from hijacklens.progress import bar
from hijacklens.prompts.layout import Layout
from hijacklens.prompts.schemes import Scheme
from hijacklens.prompts.tokens import TokenIds
from hijacklens.scoring.pairs import pairs
from hijacklens.scoring.result import HijackResult
from probes.anatomy import Anatomy, anatomy_of
from probes.values.matrices import head_matrices, kv_head_of

PREDICTORS = (
    *("logp_true", "logp_false", "prior", "rank_true", "rank_false", "entropy", "top_logprob"),
    *("sentence_true", "sentence_false", "tokens_true", "tokens_false", "tokens_query"),
    *("tokens_sentence", "id_true", "id_false", "similarity_true", "similarity_false"),
    *("similarity_targets", "copying", "copying_all", "attention"),
)
TEXTS = ("model", "scheme", "case_id", "relation_id", "subject", "target_true", "target_false")
"""Columns that say which fact a row is of."""
MOST_READ = 64
"""Rows in a batch at most: each has the logits of the vocabulary."""


def predictors(
    model: HookedLanguageModel,
    facts: FactSet,
    schemes: Iterable[str | Scheme] = ("do-not-think",),
    *,
    seed: int = 0,
    quiet: bool = False,
) -> pd.DataFrame:
    """Return a row per fact and scheme, with the columns `TEXTS` and `PREDICTORS`.

    Facts without a prompt pair, or whose targets share their first token, have no row. Costs one
    forward pass over every bare query and every sentence.

    Raises:
        InputError: As for `hijacklens.pairs`; no fact has a shift; or the model's logits are not a
            sum over heads that its hooks show.
    """
    require_agreement(model, operation="a law")
    made = [pair for each in schemes for pair in pairs(model, facts, scheme=each, seed=seed)]
    chosen = [pair for pair in made if not pair.same_first_token]
    if not chosen:
        raise InputError(f"no fact of {facts.name} has a shift under these schemes.")
    answers = [tuple(steps[0][1] for steps in (p.items[0].true, p.items[0].false)) for p in chosen]
    anatomy = anatomy_of(model, chosen[0].bare.ids)
    layers = [(i, form) for i, form in enumerate(anatomy.layers) if form.attends]
    patterns = [f"blocks.{i}.attn.hook_pattern" for i, _ in layers]
    values = [f"blocks.{form.values_of}.attn.{form.values}" for _, form in layers]
    bare_ids, subjects = [p.bare.ids for p in chosen], [p.bare.positions("subject") for p in chosen]
    alone = [p.hijacked.ids[: max(p.hijacked.positions("hijack")) + 1] for p in chosen]
    mentions = [p.hijacked.positions("mention") for p in chosen]
    label = f"{model.cfg.model_name}, predictors"
    with bar(2 * len(chosen), unit="prompts", label=label, quiet=quiet) as progress:
        bare = _read(model, bare_ids, answers, subjects, patterns, progress)
        sentence = _read(model, alone, answers, mentions, values, progress)
    attention = torch.stack([bare[name] for name in patterns], 1)
    written, readout = _written(model, anatomy, answers, [sentence[name] for name in values])
    untyped: Any = model
    W_E = untyped.W_E.detach().float().cpu()
    named = [[ids[i] for i in at] for ids, at in zip(alone, mentions, strict=True)]
    mention = torch.stack([W_E[ids].mean(0) if ids else 0 * W_E[0] for ids in named])
    logp, ranks = bare["logprobs"], bare["ranks"].log1p()
    columns: dict[str, Any] = {
        "logp_true": logp[:, 0],
        "logp_false": logp[:, 1],
        "prior": logp[:, 1] - logp[:, 0],
        "rank_true": ranks[:, 0],
        "rank_false": ranks[:, 1],
        "entropy": bare["entropy"],
        "top_logprob": bare["top"],
        "sentence_true": sentence["logprobs"][:, 0],
        "sentence_false": sentence["logprobs"][:, 1],
        "tokens_true": [len(p.items[0].true) for p in chosen],
        "tokens_false": [len(p.items[0].false) for p in chosen],
        "tokens_query": [len(p.bare.positions("query")) for p in chosen],
        "tokens_sentence": [len(p.hijacked.positions("hijack")) for p in chosen],
        "id_true": np.log1p([true for true, _ in answers]) / np.log(len(W_E)),
        "id_false": np.log1p([false for _, false in answers]) / np.log(len(W_E)),
        "similarity_true": cosine_similarity(mention, readout[:, 0]),
        "similarity_false": cosine_similarity(mention, readout[:, 1]),
        "similarity_targets": cosine_similarity(readout[:, 0], readout[:, 1]),
        "copying": (written * attention).sum((1, 2)),
        "copying_all": written.sum((1, 2)),
        "attention": attention.mean((1, 2)),
    }
    texts = [
        (str(model.cfg.model_name), p.scheme.name, *(getattr(p.fact, name) for name in TEXTS[2:]))
        for p in chosen
    ]
    table = pd.DataFrame(texts, columns=list(TEXTS))
    table[list(PREDICTORS)] = np.column_stack([np.asarray(columns[n], float) for n in PREDICTORS])
    scaled = ["copying", "copying_all"]  # the scales of norms differ between models
    spread: Any = table.groupby("scheme")[scaled].transform("std", ddof=0)
    table[scaled] /= spread.where(spread > 0, 1)
    return table


def measured(run: HijackResult, table: pd.DataFrame) -> pd.DataFrame:
    """Add `dose` and the measured `shift` in nats of a run: a row per fact, scheme and dose.

    Raises:
        InputError: The run and the table share no fact, or the run was made with probes.
    """
    if run.settings.probes:
        raise InputError(f"a law is of the model alone; this run has {run.settings.probes}.")
    keys = ["model", "scheme", "case_id"]
    items = run.items.assign(shift=run.items["first_false"] - run.items["first_true"])
    bare = items.loc[items["dose"] == 0].set_index(keys)["shift"]
    rows = items.loc[items["dose"] > 0, [*keys, "dose", "shift"]]
    rows = rows.assign(shift=rows["shift"] - bare.loc[pd.MultiIndex.from_frame(rows[keys])].values)
    joined = table.merge(rows, on=keys)
    if joined.empty:
        raise InputError(
            "the run and the predictors have no fact in common; use the same model, facts and "
            "schemes, and a dose above 0."
        )
    return joined


def _read(
    model: HookedModel,
    rows: Sequence[TokenIds],
    answers: Sequence[tuple[int, ...]],
    positions: Sequence[tuple[int, ...]],
    hooks: Sequence[str],
    progress: Any,
) -> dict[str, Tensor]:
    """Return what follows each prompt, and what hooks show there: for equal prompts only once.

    Of patterns this is the last token's attention to `positions` [row, head], of values their mean
    over `positions` [row, head, d_head].
    """
    requests: dict[tuple[TokenIds, tuple[int, ...]], list[int]] = {}
    for i, row in enumerate(zip(rows, positions, strict=True)):
        requests.setdefault(row, []).append(i)
    distinct, members, device = list(requests), list(requests.values()), device_of(model)
    found: list[Any] = [None] * len(rows)
    for batch in batches([ids for ids, _ in distinct], device=device, most_rows=MOST_READ):
        at, mask = torch.arange(len(batch.members), device=device), 0.0 * batch.symbols
        for row, member in enumerate(batch.members):
            mask[row, list(distinct[member][1])] = 1
        seen: dict[str, Tensor] = {}
        keep = partial(_keep, seen, mask, at, batch.lengths - 1)
        probe = HookProbe("law", [(name, partial(keep, name)) for name in hooks])
        layout = Layout.of_symbols(batch.symbols, ())
        logits = logits_at(model, layout, at, batch.lengths - 1, probes=[probe])
        logprobs = logits.float().cpu().log_softmax(-1)
        entropy = torch.special.entr(logprobs.exp()).sum(1)
        for row, member in enumerate(batch.members):
            pair = logprobs[row, torch.tensor([answers[i] for i in members[member]])]
            ranks = (logprobs[row] > pair[..., None]).sum(-1).float()
            for i, *read in zip(members[member], pair, ranks, strict=True):
                shown = [seen[name][row] for name in hooks]
                found[i] = (*read, entropy[row], logprobs[row].amax(), *shown)
            progress.update(len(members[member]))
    names = ("logprobs", "ranks", "entropy", "top", *hooks)
    return {name: torch.stack([row[i] for row in found]) for i, name in enumerate(names)}


def _keep(
    seen: dict[str, Tensor], mask: Tensor, at: Tensor, last: Tensor, name: str, value: Tensor,
    hook: Any,
) -> None:  # fmt: skip
    value = value.detach().float().to(mask.device)
    if name.endswith("hook_pattern"):
        seen[name] = torch.einsum("bhk,bk->bh", value[at, :, last], mask).cpu()
    else:
        mean = mask / mask.sum(1, keepdim=True).clamp(min=1)
        seen[name] = torch.einsum("bphd,bp->bhd", value, mean).cpu()


def _written(
    model: HookedModel, anatomy: Anatomy, answers: Sequence[tuple[int, ...]], values: Any
) -> tuple[Float[Tensor, "row layer head"], Float[Tensor, "row 2 d_model"]]:
    """Return what each head writes to the margin if it attends to the values, and the readout."""
    untyped: Any = model
    readout = untyped.W_U.detach().float().cpu().T[torch.tensor(answers)]
    if anatomy.final is not None:
        readout = torch.stack([anatomy.final.pull(readout[:, i]) for i in range(2)], 1)
    direction, written, values = readout[:, 1] - readout[:, 0], [], list(values)
    for i, form in enumerate(anatomy.layers):
        if form.attends:
            to = form.after_attention.pull(direction) if form.after_attention else direction
            W_O = head_matrices(model, i, "O")[0].float().cpu()
            value = values.pop(0)
            if value.shape[1] < len(W_O):
                value = value[:, [kv_head_of(model, head) for head in range(len(W_O))]]
            read = torch.einsum("rd,hvd->rhv", to, W_O)
            written.append((value * read).sum(-1) * form.attention)
    return torch.stack(written, 1), readout
