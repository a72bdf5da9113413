"""What a model's attention supports: tree masks, explicit positions, cached keys and values.

Packed and cached rows are right only if the model uses the attention mask and the positions that it
is given. Its configuration may say that it does not. Otherwise this is tried: before the first pack
of a run, a few of its prompts are read both with sharing and without. A model that gives different
numbers is run without sharing, and the result says why. Without probes, a later run of the same
computation with prompts of the same length is not tried again.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from hijacklens.engine.forward import Pass
from hijacklens.engine.key_values import Pool
from hijacklens.engine.packs import Costs, Pack, separate, trunk
from hijacklens.engine.rows import PackedRows
from hijacklens.engine.trie import Trie
from hijacklens.models.agreement import agreement_of
from hijacklens.models.device_memory import is_out_of_memory
from hijacklens.models.hooked import HookedModel, device_of
from hijacklens.models.verification import difference, is_exact

_TESTED = "_hijacklens_tested_packs"
_KINDS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True)
class Support:
    """How a model is given tree masks, or why it is not."""

    windows: Mapping[str, int | None] = field(default_factory=lambda: {"": None})
    """Kind of layer -> its sliding window, or None; the kind "" if one mask serves all layers."""
    refused: str = ""
    """Why the model cannot run on packs; empty if its configuration allows it."""


def support_of(model: HookedModel) -> Support:
    """Return what the configuration of a model says about its attention."""
    if not isinstance(model, TransformerBridge):
        return Support(refused=f"a {type(model).__name__} takes no position ids")
    plain: Any = model.original_model
    config = plain.config.get_text_config()
    if "position_ids" not in inspect.signature(plain.forward).parameters:
        return Support(refused=f"a {type(plain).__name__} takes no position ids")
    if getattr(config, "alibi", False):
        return Support(refused="its positions are distances in the row (ALiBi)")
    if "local" in getattr(config, "attention_layers", ()):
        return Support(refused="its local layers use positions in the row")
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - _KINDS:
        other = ", ".join(sorted(map(str, kinds - _KINDS)))
        return Support(refused=f"it has layers that take no attention mask ({other})")
    windows: dict[str, int | None] = {"": None if kinds else window}
    if "sliding_attention" in kinds:
        windows = {"full_attention": None, "sliding_attention": window}
    return Support(windows)


def disagreement(run: Pass, trie: Trie, support: Support, *, cached: bool) -> str:
    """Read a few prompts with and without sharing, and describe the difference, if there is any.

    Args:
        run: How the model runs on rows without sharing; probes act on both.
        trie: What the run reads; its longest leaf and the two neighbouring leaves are tried.
        support: How the model is given masks.
        cached: Whether keys and values come from a cache.

    Returns:
        A reason not to use packs; empty if both give the same numbers.

    Note:
        Costs the forward passes of three leaves, twice.
    """
    tried = _tried(trie)
    length = int(trie.lengths.max())
    tested: dict[Any, int] = vars(run.model).setdefault(_TESTED, {})
    computation = agreement_of(run.model).computation
    key = (computation, cached, str(support.windows), run.plain is None)
    if not run.probes and length <= tested.get(key, 0):
        return ""
    packed = replace(run, windows=support.windows)
    try:
        logits = packed.logits(*_packs(packed, tried, cached=cached))
        expected = torch.cat([run.logits(_row(run, tried, pack)) for pack in separate(tried)])
    except Exception as error:  # an architecture may fail in any way on masks it does not know
        if is_out_of_memory(error):
            return "memory ran out in a test of packed prompts"
        return f"it fails on packed prompts ({type(error).__name__})"
    logprobs = (values.float().log_softmax(-1) for values in (logits, expected))
    if difference(*logprobs, exact=is_exact(run.model)):
        return "packed and plain prompts gave different numbers in a test"
    if not run.probes:
        tested[key] = length
    return ""


def cost_of_test(trie: Trie, costs: Costs) -> float:
    """Return about what `disagreement` costs, in tokens: a pass for each leaf, one for all."""
    tried = _tried(trie)
    rows = costs.rows(tried.lengths, 0).sum() + costs.rows(tried.nodes, 0)
    return float(rows) + (len(tried.leaves) + 1) * costs.forward_pass


def _tried(trie: Trie) -> Trie:
    """Return the longest leaf and the two neighbouring leaves."""
    longest = int(trie.lengths.argmax())
    return Trie.of(trie.leaves[max(longest - 1, 0) : longest + 2])


def _packs(run: Pass, trie: Trie, *, cached: bool) -> tuple[PackedRows, Pool | None]:
    """Return rows with all leaves of a small trie, in order, and the pool of their pasts."""
    n = len(trie.leaves)
    if not cached:
        return _row(run, trie, Pack(0, n, 0, trie.nodes)), None
    # One row for the first leaf and one for the others, with pasts of different lengths.
    first, *others = trie.lengths.tolist()
    packs = [Pack(0, 1, first // 2, first - first // 2)]
    if n > 1:
        packs.append(Pack(1, n, min(trie.shared[2:].tolist(), default=others[0] - 1), 0))
    below = trunk(trie, packs)
    pool = Pool(below)
    for pack in separate(below):
        run.logits(_row(run, below, pack), pool, keep=True)
    return PackedRows.of(trie, [[pack] for pack in packs], device_of(run.model)), pool


def _row(run: Pass, trie: Trie, pack: Pack) -> PackedRows:
    return PackedRows.of(trie, [[pack]], device_of(run.model))
