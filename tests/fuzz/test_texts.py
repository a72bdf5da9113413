"""Fuzz of text input: schemes, spans, doses, probes and sweep files."""

from __future__ import annotations

from typing import Any

import pytest
from campaign import campaign, holds
from hostile import HOSTILE, words
from hypothesis import given
from hypothesis import strategies as st
from sample_facts import sample_facts

from analyses.commands.options import read_template
from analyses.sweeps.file import load_sweep, read_sweep
from analyses.texts import read_doses
from hijacklens.prompts.schemes import PLACEHOLDERS, REGISTRY, Scheme, Unusable, add_scheme
from hijacklens.prompts.spans import atoms, positions
from probes.specification import KINDS, parse

FACTS = sample_facts()
ANY = st.sampled_from(HOSTILE) | st.text(max_size=20)


def pieces(*words: str, most: int = 8) -> st.SearchStrategy[str]:
    """Texts made of words that mean something to a door, and of some that do not."""
    return st.lists(st.sampled_from(words) | ANY, max_size=most).map("".join) | ANY


TEMPLATES = pieces(
    *(f"{{{name}}}" for name in PLACEHOLDERS),
    *words("{ } {{ }} {} {0} {subject!r} {subject:>9} {subject.__class__} {target_false[0]}"),
    "Do not think of ",
    ".",
    "=",
    "never-say=",
)

NAMES = st.just("never-say") | pieces("never", "-", "say", "7", "../", "think")


@campaign(60, 20_000)
@given(name=NAMES, template=TEMPLATES)
def test_schemes(name, template):
    def door() -> None:
        scheme = Scheme(name=name, template=template)
        for fact in FACTS:
            try:
                sentence = scheme.sentence(fact, pool=["Rome", "Paris"], seed=1)
            except Unusable:
                continue
            assert "__class__" not in sentence or "__class__" in fact.subject + template

    holds("schemes and templates", door)


@campaign(10, 5_000)
@given(template=st.one_of(TEMPLATES, TEMPLATES.map("never-say={}".format)))
def test_added_schemes_and_the_option(template):
    def door() -> None:
        name, text = read_template(template)
        before = dict(REGISTRY)
        try:
            add_scheme(name, text)
        finally:
            REGISTRY.clear()
            REGISTRY.update(before)

    holds("--template", door)


@campaign(60, 20_000)
@given(
    pieces(
        *words("hijack query subject last bos all text: at: token: + .. - 0 1 -1 99 at:0..-1"),
    ),
    st.integers(0, 40),
)
def test_spans(span, length):
    def door() -> None:
        for atom in atoms(span):
            if atom.startswith("at:"):
                assert all(0 <= place < length for place in positions(atom, length))

    holds("spans", door)


DOSES = st.lists(st.sampled_from(words("0 1 5 0-5 2-9 3-1 07 99999")), max_size=4).map(
    ",".join
) | pieces(
    *words("0 1 5 - , 0-5 9999 99999 \u0661 \u00b2 1.5 1e3 inf -1"),
    " ",
    "\t",
)


@campaign(60, 20_000)
@given(DOSES)
def test_doses(text):
    holds("doses", lambda: read_doses(text))


@st.composite
def probe_texts(draw: Any) -> str:
    """A kind with some of its options, each with a value that may fit."""
    kind = draw(st.sampled_from(list(KINDS.values())))
    names = draw(st.lists(st.sampled_from([option.name for option in kind.options]), unique=True))
    needed = [option.name for option in kind.options if option.default is None]
    fitting = words("last hijack all 3 0-1 8.3+9.1 zero yes no before after 0.5 2 uniform")
    parts = [f"{name}={draw(st.sampled_from(fitting))}" for name in dict.fromkeys(names + needed)]
    return f"{kind.name}:{','.join(parts)}"


OPTIONS = sorted({option.name for kind in KINDS.values() for option in kind.options})
PROBES = pieces(
    *(f"{name}:" for name in KINDS),
    *(kind.example for kind in KINDS.values()),
    *(f",{name}=" for name in OPTIONS),
    *words("last hijack text:Paris all 8-11 0-9999 8.3+9.1 mean zero yes no nan inf 1e999 -1"),
    *words("\u0663 9999999999"),
    most=10,
)  # fmt: skip


@campaign(60, 20_000)
@given(PROBES | probe_texts())
def test_probes(text):
    def door() -> None:
        found = parse(text)
        assert found.needs_model or found.probe().key

    holds("probe strings", door)


TOML = pieces(
    *words("[scoring] [training] [[training.tasks]] [[training.recipes]] [scoring.templates]"),
    'models = ["gpt2"]',
    "models = [{ source = 'x', dtype = 'float64' }]",
    'facts = [{ source = "atlas", limit = 0 }]',
    'facts = ["../../evil"]',
    "schemes = ['relation']",
    "seeds = [0, 0]",
    "seeds = 1000000000000",
    "seeds = true",
    'doses = "0-3"',
    "doses = [0, 1.5]",
    "doses = 3",
    "probes = ['knock-out:source=last,target=hijack']",
    "bits = 5",
    "bits = 99999999999",
    "bits = 1.0",
    "length = 8",
    "omega = nan",
    "beta = -inf",
    "d_model = 8",
    "d_model = 99999999999999",
    "learning_rates = [0.1]",
    "learning_rates = ['a']",
    "learning_rates = 1",
    "steps = 1",
    "freeze = ['W_V']",
    "freeze = [1]",
    "init_scale = 'x'",
    "weight_decay = 'x'",
    "support = 7",
    "d_attn = 'x'",
    "dtype = 7",
    "name = '../../evil'",
    "x.y.z = 1",
    "= 1",
    most=6,
).map(lambda text: text.replace("]", "]\n").replace("[[", "\n[["))
LINE = st.sampled_from(
    words(
        """[scoring]|[training]|[[training.tasks]]|[[training.recipes]]|models = ['gpt2']|
            bits = 5|d_model = 8|length = 8|seeds = 2|seeds = [0, 'a']|seeds = [[1]]|seeds = -1|
            seeds = [9223372036854775808]|doses = [0, 1]|doses = {a = 1}|doses = 1979-05-27|
            learning_rates = ['a']|learning_rates = [nan]|learning_rates = [-1]|
            learning_rates = [[1]]|steps = 1|steps = true|freeze = ['W_V']|freeze = [1]|
            freeze = [[1]]|init_scale = 'x'|init_scale = nan|weight_decay = 'x'|weight_decay = -1|
            support = 7|support = []|d_attn = 'x'|dtype = 7|dtype = []|value_init = 3|
            value_init = {}|batch = 'x'|evaluation = 1.5|omega = 'x'|beta = {}|bits = 'x'|bits = 13|
            length = nan|facts = [[]]|facts = [{source = 3}]|facts = [{limit = 'x'}]|
            facts = [{cases = [true]}]|schemes = [[]]|models = [{source = 'a', dtype = []}]|
            models = [{source = 'a', devices = 0}]|rule = []|rule = 'frist'|batch_tokens = 0|
            probes = [{}]|probes = ['ablate:kind=mean']|templates = 3|templates = {a = 3}|
            templates = {'A b' = 'x'}""",
        "|",
    )
)
LINES = st.lists(LINE, max_size=9).map("\n".join)


SCORING = "[scoring]\nmodels = ['gpt2']"
TRAINING = "[training]\n[[training.tasks]]\nbits = 3\n[[training.recipes]]\ndim = 4"
SWEEPS = st.builds(
    "{}\n{}".format,
    st.sampled_from([SCORING, TRAINING]),
    st.lists(LINE.filter(lambda line: not line.startswith(("[", "models"))), max_size=2).map(
        "\n".join
    ),
)
"""Sweeps that work, with a line or two more."""


@campaign(60, 10_000)
@given(TOML | LINES | SWEEPS)
def test_sweeps(text):
    holds("sweep files", lambda: read_sweep(text))


@pytest.mark.parametrize("name", ["folder", "missing.toml", "latin.toml", "a\0b", "x" * 5000])
def test_files_of_sweeps(name, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin.toml").write_bytes(b"\xe9")
    assert holds("sweep files: names", lambda: load_sweep(tmp_path / name)) == "refused"
