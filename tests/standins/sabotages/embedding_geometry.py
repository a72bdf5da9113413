"""Sabotages of `analyses.paper.embedding_geometry`."""

from __future__ import annotations

import numpy as np

from analyses.paper import embedding_geometry
from hijacklens.one_layer.embeddings import hamming_geometry
from probes.geometry import spectra
from probes.geometry.hamming_fit import GramFit, fit_gram
from probes.geometry.spectra import spectrum
from sabotages import Sabotage

UNTRAINED = {"seeds": 2, "steps": 1, "length": 16, "evaluation": 64}


def shuffled_gram(monkeypatch):
    """Give the embeddings a wide gap, and fit equation 5.2 to the wrong tokens."""

    def wide(models, *, task):
        W_E = hamming_geometry(task.bits, a=1.0, b=task.bits / 2, b0=task.bits / 2 + 1)
        return spectrum(dict.fromkeys(models, W_E), task=task)

    def broken(gram, distance):
        order = np.random.default_rng(0).permutation(len(gram))
        return fit_gram(gram[order][:, order], distance)

    monkeypatch.setattr(embedding_geometry, "spectrum", wide)
    monkeypatch.setattr(spectra, "fit_gram", broken)


def no_jump(monkeypatch):
    monkeypatch.setattr(GramFit, "jump", property(lambda fit: 0.0))


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
            how="a diagonal on the line",
            claims=("the diagonal is above",),
            changes=small(4, 8),
            patch=no_jump,
        )
        for name in ("fig3b", "figc5")
    ),
    Sabotage(
        analysis="figc4",
        how="untrained models",
        claims=("trained embeddings gain", "at the largest d"),
        changes={**UNTRAINED, "bits": (3, 4), "d_models": (4, 32)},
        scale="full",
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
            how="a prediction from the wrong tokens",
            claims=("the m largest values hold", "the gap is as wide"),
            changes=small(4, 8),
            patch=shuffled_gram,
            scale="full",
        )
        for name in ("figc9", "figc10", "figc11", "figc12")
    ),
)
