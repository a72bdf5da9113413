"""The spans of the one-layer model's contexts, so that probes name tokens there as in prompts.

    last       the last token, at which the label is predicted
    context    all tokens before it
    cluster    the tokens of the last token's cluster: those that supports join with it, directly
               or through other tokens
    own        the tokens equal to the last one
    label      the tokens equal to the label (only where labels are given)

There are no sentences here, so there is no `hijack` and no `mention`. What comes closest to a
mention is `label` with the label of a wrong answer: the tokens that speak for it.

With the support `first-bit` the cluster is the half of the vocabulary with the last token's z_1
(figure C.7), with `first-two-bits` the quarter with its z_1 and z_2 (figure C.8); with `all` and
`hamming-1` it is every token.

>>> task = ConceptTask(bits=2, support="first-bit", length=4)
>>> layout(task, torch.tensor([[0, 1, 2, 3]])).query("cluster").tolist()
[[False, False, True, True]]
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


def layout(
    task: ConceptTask,
    tokens: Int[Tensor, "batch pos"],
    *,
    labels: Int[Tensor, " batch"] | None = None,
    spans: Sequence[str] = ("last", "context", "cluster", "own"),
) -> Layout:
    """The layout of contexts, with the spans that are asked for.

    Raises:
        InputError: A span that contexts do not have; `text:` is one of them.
    """
    masks = {atom: _mask(task, tokens, labels, atom) for atom in placed_atoms(spans)}
    return Layout(tokens, masks)


def clusters(task: ConceptTask) -> Bool[Tensor, "vocab vocab"]:
    """Row t: the tokens of t's cluster, t among them: a component of the graph of supports."""
    _, component = connected_components(task.neighbours().numpy(), directed=False)
    found = torch.from_numpy(component)
    return found[:, None] == found[None]


def _mask(
    task: ConceptTask, tokens: Tensor, labels: Tensor | None, atom: str
) -> Bool[Tensor, "batch pos"]:
    found = torch.zeros_like(tokens, dtype=torch.bool)
    if atom.startswith(AT):
        found[:, list(positions(atom, tokens.shape[1]))] = True
    elif atom == "last":
        found[:, -1] = True
    elif atom == "context":
        found[:, :-1] = True
    elif atom == "own":
        found = tokens == tokens[:, -1:]
    elif atom == "label" and labels is not None:
        found = tokens == labels[:, None]
    elif atom == "cluster":
        found = clusters(task).to(tokens.device)[tokens[:, -1:], tokens]
    else:
        names = [name for name in NAMES if name != "label" or labels is not None]
        sentences = (
            "Contexts of the task have no sentences; what speaks for a wrong answer there is "
            "`label` with that label. "
        )
        hint = sentences if atom in ("hijack", "mention") else ""
        raise unknown("span", atom, [*names, EVERYWHERE], hint + OTHER_FORMS)
    return found
