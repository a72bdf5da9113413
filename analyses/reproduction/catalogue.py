"""The catalogue: every figure, theorem and lemma by its id, in one line each.

What a list needs stands here and nowhere else, so that listing and completing ids imports nothing
heavy. How an analysis is run is in the module of its family (`analyses.reproduction.registry`).

>>> CATALOGUE["fig3a"].source
'Figure 3a'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hijacklens.errors import unknown


@dataclass(frozen=True, slots=True)
class Entry:
    """One figure or statement of the paper, described."""

    id: str
    """What it is called on the command line, e.g. `fig3a` or `theorem1`."""
    source: str
    """Where it stands in the paper, e.g. `Figure 3a`."""
    title: str
    """One line."""
    question: str
    quick: str
    """Time at quick scale on two CPU cores, as measured, e.g. `40 s`; `+ 40 s` is beside models
    that other entries have trained, and with `shared` there is nothing more to train."""
    paper: str
    """The same at the scale of the paper, on one core; `depends` where model and facts decide, `~`
    where it is put together from parts that were run at different times."""
    uses_models: bool = False
    """Whether it runs language models, so that --model says something."""
    uses_facts: bool = False
    """Whether it scores them on facts, so that --facts says something."""

    @property
    def cost(self) -> Mapping[str, str]:
        """Time by scale."""
        return {"quick": self.quick, "paper": self.paper}


FAMILIES: Mapping[str, tuple[Entry, ...]] = {
    "paper.hijack_curves": (
        Entry(
            "fig1",
            "Figure 1",
            "Prompts and answers of the models",
            "Do contexts about Chicago move the answer from Paris to Chicago?",
            "30 s",
            "30 s",
            uses_models=True,
        ),
        Entry(
            "fig2a",
            "Figure 2a",
            "Generic hijack against the dose",
            "Does 'Do not think of {o_}.' raise efficacy, and more with each sentence?",
            "1 min",
            "depends",
            uses_models=True,
            uses_facts=True,
        ),
        Entry(
            "figb1",
            "Figure B.1",
            "Generic reverse against the dose",
            "Does 'Do not think of {o*}.' lower efficacy?",
            "1 min",
            "depends",
            uses_models=True,
            uses_facts=True,
        ),
        Entry(
            "fig2b",
            "Figure 2b",
            "Relation hijack on P190",
            "Do true sentences that name the false target raise efficacy on twin cities?",
            "1 min",
            "depends",
            uses_models=True,
            uses_facts=True,
        ),
        Entry(
            "figb2",
            "Figure B.2",
            "Relation hijack on four relations",
            "Do true sentences that name the false target raise efficacy, and more with each?",
            "1 min",
            "depends",
            uses_models=True,
            uses_facts=True,
        ),
        Entry(
            "figb3",
            "Figure B.3",
            "Relation reverse on four relations",
            "Do sentences that give the true answer lower efficacy?",
            "1 min",
            "depends",
            uses_models=True,
            uses_facts=True,
        ),
        Entry(
            "figb4",
            "Figure B.4",
            "Near-word hijack and reverse on P1412",
            "Is a word close to the target enough?",
            "1 min",
            "depends",
            uses_models=True,
            uses_facts=True,
        ),
    ),
    "bridge.weights": (
        Entry(
            "bridge-memory",
            "not in the paper (equation 5.1)",
            "Memory fit of OV circuits beside the one-layer W_V",
            "Are value matrices of language models associative memories as the one-layer's?",
            "30 s",
            "+ 2 min",
            uses_models=True,
            uses_facts=True,
        ),
        Entry(
            "bridge-spectrum",
            "not in the paper (figures C.9 to C.12)",
            "Singular values of embeddings, one-layer beside language models",
            "Do embeddings of language models have few large directions, too?",
            "30 s",
            "+ 2 min",
            uses_models=True,
        ),
    ),
    "bridge.attention": (
        Entry(
            "bridge-attention",
            "not in the paper (figures 3c and C.7)",
            "Attention to the cues against the shift, one-layer beside language models",
            "Does the last token attend to the hijack, and more where the answer moves more?",
            "20 s",
            "+ 4 min",
            uses_models=True,
            uses_facts=True,
        ),
    ),
    "bridge.mixing": (
        Entry(
            "bridge-mixing",
            "not in the paper (figures 2a and C.13)",
            "Mixing curves of the one-layer model beside dose curves",
            "Does the answer turn at the same share of the context in both kinds of model?",
            "40 s",
            "+ 1 min",
            uses_models=True,
            uses_facts=True,
        ),
    ),
    "paper.value_matrix": (
        Entry(
            "fig3a",
            "Figure 3a",
            "W_V trained against identity, L = 64",
            "Does a model need a trained value matrix where contexts are short?",
            "40 s",
            "25 min",
        ),
        Entry(
            "figc1",
            "Figure C.1",
            "W_V trained against identity, L = 64 and 128",
            "Is the identity clearly worse, and more so at short L?",
            "+ 40 s",
            "+ 50 min",
        ),
        Entry(
            "figc2",
            "Figure C.2",
            "Trained W_V replaced by the construction or a random one, over d",
            "Does equation 5.1 do what the trained W_V does, and a random memory not?",
            "1 min",
            "~ 1.5 h",
        ),
        Entry(
            "figc3",
            "Figure C.3",
            "Smallest principal angle of the trained W_V to the construction, over d",
            "Is the trained W_V closer to equation 5.1 than to a random memory or its start?",
            "shared",
            "shared",
        ),
    ),
    "paper.embedding_geometry": (
        Entry(
            "fig3b",
            "Figure 3b",
            "Inner product of embeddings by Hamming distance, m = 8",
            "Are inner products linear in the Hamming distance, with a jump at 0 (equation 5.2)?",
            "30 s",
            "7 min",
        ),
        Entry(
            "figc4",
            "Figure C.4",
            "Trained against frozen embeddings as d crosses V",
            "Must embeddings be trained where d < V, and not where d > V?",
            "40 s",
            "~ 1.5 h",
        ),
        Entry(
            "figc5",
            "Figure C.5",
            "Inner product of embeddings by Hamming distance, m = 7 and 8",
            "Are inner products linear in the Hamming distance, with a jump at 0 (equation 5.2)?",
            "30 s",
            "+ 3 min",
        ),
        Entry(
            "figc6",
            "Figure C.6",
            "Inner product by Hamming distance with W_V = I",
            "Are inner products linear in the Hamming distance when W_V is the identity?",
            "30 s",
            "1 min",
        ),
        Entry(
            "figc9",
            "Figure C.9",
            "Singular values of W_E, m = 7, d = 32",
            "Is there a gap between the m largest singular values and the rest?",
            "20 s",
            "30 s",
        ),
        Entry(
            "figc10",
            "Figure C.10",
            "Singular values of W_E, m = 7, d = 64",
            "Is there a gap between the m largest singular values and the rest?",
            "20 s",
            "30 s",
        ),
        Entry(
            "figc11",
            "Figure C.11",
            "Singular values of W_E, m = 8, d = 32",
            "Is there a gap between the m largest singular values and the rest?",
            "20 s",
            "30 s",
        ),
        Entry(
            "figc12",
            "Figure C.12",
            "Singular values of W_E, m = 8, d = 64",
            "Is there a gap between the m largest singular values and the rest?",
            "20 s",
            "2 min",
        ),
    ),
    "paper.attention_selection": (
        Entry(
            "fig3c",
            "Figure 3c",
            "Attention with two clusters, m = 8",
            "Does attention go to the tokens of the last token's cluster?",
            "20 s",
            "5 min",
        ),
        Entry(
            "figc7",
            "Figure C.7",
            "Attention with two clusters",
            "Does attention go to the tokens of the last token's cluster?",
            "20 s",
            "+ 9 min",
        ),
        Entry(
            "figc8",
            "Figure C.8",
            "Attention with four clusters",
            "Does attention go to the tokens of the last token's cluster?",
            "20 s",
            "12 min",
        ),
    ),
    "paper.context_mixing": (
        Entry(
            "figc13",
            "Figure C.13",
            "Contexts of two labels mixed at a rate",
            "Does the answer move from the first label to the second as the rate goes up?",
            "20 s",
            "12 min",
        ),
        Entry(
            "figc14",
            "Figure C.14",
            "Accuracy against the length of contexts",
            "Is a longer context better, and how far below the Bayes rule does it stay?",
            "20 s",
            "~ 1 h",
        ),
    ),
    "paper.sensitivity": (
        Entry(
            "sensitivity",
            "not in the paper",
            "Conclusions under other values of the settings that are ours",
            "Which conclusions depend on settings that the paper does not state?",
            "30 s",
            "6 min",
        ),
    ),
    "paper.constructed_error": (
        Entry(
            "theorem1",
            "Theorem 1 (7)",
            "Error of the constructed model against L",
            "Does the constructed one-layer model reach any error as L grows, and how fast?",
            "5 s",
            "90 s",
        ),
        Entry(
            "lemma2",
            "Lemma 2",
            "Constructed memory against the identity on the Hamming-1 support",
            "Does equation 5.1 give error 0 and the identity an error above 0?",
            "2 s",
            "5 min",
        ),
    ),
    "paper.identity_law": (
        Entry(
            "theorem3",
            "Theorem 3",
            "Identity W_V trained to the posterior: the linear law",
            "Do inner products fall linearly with the Hamming distance, with slope L / beta?",
            "30 s",
            "16 min",
        ),
    ),
    "paper.geometry_theory": (
        Entry(
            "theorem4",
            "Theorem 4 (8)",
            "Error under equation 5.2 over (a, b, b0)",
            "Does the constructed memory reach any error on embeddings of equation 5.2, where its "
            "exact margin is positive?",
            "20 s",
            "16 min",
        ),
    ),
    "paper.lemmas": (
        Entry(
            "lemma5",
            "Lemma 5",
            "Rank of embeddings under equation 5.2",
            "Do embeddings of equation 5.2 with b = b0 have rank at most m + 2?",
            "1 s",
            "1 s",
        ),
        Entry(
            "lemma6",
            "Lemma 6",
            "Gradient of the attention scores, closed form against autograd",
            "Is the closed form of the gradient of an unnormalised score right?",
            "1 s",
            "5 min",
        ),
    ),
}
"""Module of `analyses` -> its analyses, in the order in which they are listed and run."""

CATALOGUE: Mapping[str, Entry] = {
    entry.id: entry for entries in FAMILIES.values() for entry in entries
}
"""All entries by id."""


def entry_of(name: str) -> Entry:
    """The entry of an id.

    Raises:
        InputError: There is none of that id.
    """
    if name not in CATALOGUE:
        raise unknown("analysis", name, CATALOGUE, "`hijacklens reproduce --list` explains them.")
    return CATALOGUE[name]
