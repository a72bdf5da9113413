"""Sabotages of `analyses.paper.embedding_geometry`."""

from __future__ import annotations

import numpy as np

from hijacklens.one_layer.embeddings import hamming_geometry
from hijacklens.one_layer.task import ConceptTask
from probes.geometry.hamming_fit import fit_gram
from probes.geometry.spectra import spectrum
from sabotages import Sabotage

UNTRAINED = {"seeds": 2, "steps": 1, "length": 16, "evaluation": 64}
HAMMING = ConceptTask.hamming


def shuffled_distances(monkeypatch):
    """Inner products by the distance of other tokens: the codes of the tokens are permuted."""

    def broken(task):
        order = np.random.default_rng(0).permutation(task.vocab)
        return HAMMING(task)[order][:, order]

    monkeypatch.setattr("hijacklens.one_layer.task.ConceptTask.hamming", broken)


def shuffled_gram(monkeypatch):
    """Embeddings with a wide gap, and equation 5.2 fitted to those of other tokens."""

    def wide(models, *, task):
        W_E = hamming_geometry(task.bits, a=1.0, b=task.bits / 2, b0=task.bits / 2 + 1)
        return spectrum(dict.fromkeys(models, W_E), task=task)

    def broken(gram, distance):
        order = np.random.default_rng(0).permutation(len(gram))
        return fit_gram(gram[order][:, order], distance)

    monkeypatch.setattr("analyses.paper.embedding_geometry.spectrum", wide)
    monkeypatch.setattr("probes.geometry.spectra.fit_gram", broken)


def small(bits, d_model):
    return {**UNTRAINED, "bits": (bits,), "d_models": (d_model,)}


SABOTAGES = (
    *(
        Sabotage(
            analysis=name,
            how="untrained models",
            claims=("the inner product falls", "the mean inner products are linear"),
            changes=small(4, 8),
        )
        for name in ("fig3b", "figc5", "figc6")
    ),
    *(
        Sabotage(
            analysis=name,
            how="embeddings of length 0, all on the line",
            claims=("the diagonal stands above",),
            changes=small(4, 8),
            patch=lambda monkeypatch: monkeypatch.setattr(
                "probes.geometry.hamming_fit.GramFit.jump", property(lambda fit: 0.0)
            ),
        )
        for name in ("fig3b", "figc5")
    ),
    Sabotage(
        analysis="figc4",
        how="untrained models",
        claims=("trained embeddings gain", "at the largest d"),
        changes={**UNTRAINED, "bits": (3,), "d_models": (4, 16)},
    ),
    *(
        Sabotage(
            analysis=name,
            how="untrained models",
            claims=("singular value m is above", "the m largest directions"),
            changes={**UNTRAINED, "bits": (4,), "d_models": (8,)},
        )
        for name in ("figc9", "figc10", "figc11", "figc12")
    ),
    *(
        Sabotage(
            analysis=name,
            how="predicted from the embeddings of other tokens",
            claims=("the m largest hold", "the gap is as wide"),
            changes=small(4, 8),
            patch=shuffled_gram,
            scale="paper",
        )
        for name in ("figc9", "figc10", "figc11", "figc12")
    ),
)
