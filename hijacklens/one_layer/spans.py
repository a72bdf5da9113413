"""The spans of the one-layer model's contexts, so that probes name tokens as they do in prompts.

    last       the last token, at which the label is predicted
    context    all tokens before it
    cluster    the tokens of the last token's cluster: those that supports connect with it, directly
               or through other tokens
    own        the tokens equal to the last one
    label      the tokens equal to the label (only if labels are passed)

Contexts have no sentences, so there is no `hijack` and no `mention`. The closest to a mention is
`label` with the label of a wrong answer: the tokens that are evidence for it.

With the support `first-bit` the cluster is the half of the vocabulary with the last token's z_1
(figure C.7), with `first-two-bits` the quarter with its z_1 and z_2 (figure C.8); with `all` and
`hamming-1` it is every token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from hijacklens.errors import unknown
from hijacklens.one_layer.task import ConceptTask
from hijacklens.prompts.layout import Layout
from hijacklens.prompts.spans import AT, EVERYWHERE, OTHER_FORMS, placed_atoms, positions

NAMES = ("last", "context", "cluster", "own", "label")
NO_SENTENCES = (
    "Contexts of the task have no sentences; the tokens that speak for a wrong answer are the span "
    "`label` with that label. "
)


def layout(
    task: ConceptTask,
    tokens: Int[Tensor, "batch pos"],
    *,
    labels: Int[Tensor, " batch"] | None = None,
    spans: Sequence[str] = ("last", "context", "cluster", "own"),
) -> Layout:
    """Return the layout of contexts, with the requested spans.

    Raises:
        InputError: A span that contexts do not have, such as `text:`.
    """
    masks = {atom: _mask(task, tokens, labels, atom) for atom in placed_atoms(spans)}
    return Layout(tokens, masks)


def clusters(task: ConceptTask) -> Bool[Tensor, "vocab vocab"]:
    """Return t's cluster in row t, with t itself: a component of the graph of supports."""
    _, components = connected_components(task.neighbours().numpy(), directed=False)
    component = torch.from_numpy(components)
    return component[:, None] == component[None]


def _mask(
    task: ConceptTask, tokens: Tensor, labels: Tensor | None, atom: str
) -> Bool[Tensor, "batch pos"]:
    last = tokens[:, -1:]
    if atom == "own":
        return tokens == last
    if atom == "label" and labels is not None:
        return tokens == labels[:, None]
    if atom == "cluster":
        return clusters(task).to(tokens.device)[last, tokens]
    length = tokens.shape[1]
    columns = {"last": [length - 1], "context": list(range(length - 1))}.get(atom)
    if atom.startswith(AT):
        columns = list(positions(atom, length))
    if columns is None:
        names = [name for name in NAMES if name != "label" or labels is not None]
        hint = NO_SENTENCES if atom in ("hijack", "mention") else ""
        raise unknown("span", atom, [*names, EVERYWHERE], hint + OTHER_FORMS)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, columns] = True
    return mask
