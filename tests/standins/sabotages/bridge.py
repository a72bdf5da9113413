"""Sabotages of `analyses.bridge`; language models are a tiny random one."""

from __future__ import annotations

from analyses.bridge import attention, weights
from hijacklens.one_layer.task import ConceptTask
from probes.attention import knock_out
from sabotages import Sabotage
from sabotages.hijack_curves import blind_model

MIXED, LOGITS_AT = ConceptTask.sample_mixed, attention.logits_at
UNTRAINED = {"bits": 4, "d_model": 8, "length": 16, "seeds": 2, "steps": 1, "evaluation": 64}


def nothing_to_compare_with(monkeypatch):
    """The control uses the measured embeddings, not permuted ones."""
    monkeypatch.setattr(weights, "permuted", lambda W_E, seed: W_E)


def no_attention_to_the_hijack(monkeypatch):
    blind = knock_out(source="all", target="hijack")

    def broken(model, layout, *positions, probes):
        probes = [blind, *probes] if "hijack" in layout.spans else probes
        return LOGITS_AT(model, layout, *positions, probes=probes)

    monkeypatch.setattr(attention, "logits_at", broken)


def nothing_mixed_in(monkeypatch):
    def broken(task, batch, rate, generator, **options):
        return MIXED(task, batch, 0.0, generator, **options)

    monkeypatch.setattr(ConceptTask, "sample_mixed", broken)


SABOTAGES = (
    Sabotage(
        analysis="bridge-memory",
        how="untrained models",
        claims=("a trained W_V recalls", "a trained W_V is closer", "near words:", "subjects:"),
        changes={**UNTRAINED, "limit": 12, "draws": 39},
    ),
    Sabotage(
        analysis="bridge-spectrum",
        how="untrained models",
        claims=("one-layer: singular value m", "one-layer embeddings use a smaller"),
        changes=UNTRAINED,
    ),
    Sabotage(
        analysis="bridge-spectrum",
        how="no permutation",
        claims=("language models: some leading",),
        changes=UNTRAINED,
        patch=nothing_to_compare_with,
    ),
    Sabotage(
        analysis="bridge-attention",
        how="untrained models, blind to the hijack",
        claims=(
            "one-layer: attention",
            "in every language model the head",
            "over facts the shift",
        ),
        changes={**UNTRAINED, "support": "first-bit", "contexts": 64, "limit": 6},
        scale="full",
        patch=no_attention_to_the_hijack,
    ),
    Sabotage(
        analysis="bridge-mixing",
        how="no second label",
        claims=("one-layer: efficacy grows", "one-layer: efficacy at rate .5"),
        changes={**UNTRAINED, "steps": 150, "contexts": 256, "limit": 3, "doses": (0, 1)},
        patch=nothing_mixed_in,
    ),
    Sabotage(
        analysis="bridge-mixing",
        how="a model blind to the hijack",
        claims=(
            "one sentence raises efficacy, in",
            *(
                "one sentence raises efficacy in every language model more than the same fraction "
                f"of tokens does with {way}"
                for way in ("the trained", "equation", "the Bayes")
            ),
        ),
        changes={**UNTRAINED, "steps": 150, "contexts": 256, "limit": 6, "doses": (0, 1)},
        scale="full",
        patch=blind_model,
    ),
)
