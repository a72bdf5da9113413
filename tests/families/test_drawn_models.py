"""Drawn models find no siblings of known faults: each is equal to its plain model or refused.

`HYPOTHESIS_PROFILE=long` draws more.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import rows
import special
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from analyses.conformance.cells import Check, Subject

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
CELLS = ("load", "parity", "knock-out", "W_V", "head", "patch", "account", "state")
ROPES = [{"rope_type": "default", "rope_theta": 50.0}, rows.LLAMA3, rows.YARN, rows.LONG]
ROPES += [{"rope_type": name, "rope_theta": 1e4, "factor": 3.0} for name in ("linear", "dynamic")]
GROUPED = {"num_key_value_heads": st.sampled_from([1, 2, 4])}
ROTATED = {"rope_parameters": st.sampled_from(ROPES)}
TIED = {"tie_word_embeddings": st.booleans()}
WINDOW = {"sliding_window": st.sampled_from([None, 3, 12, 40])}
BIASES = {"attention_bias": st.booleans(), "mlp_bias": st.booleans()}
SCALE = st.sampled_from([0.3, 1.0, 2.5])
SWITCH = st.booleans()
DRAWN: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "llama": {**GROUPED, **ROTATED, **TIED, **BIASES, "head_dim": st.sampled_from([4, 8, 16])},
    "mistral": {**GROUPED, **ROTATED, **TIED, **WINDOW},
    "phi3": {**GROUPED, **TIED, **WINDOW},
    "qwen2:window": {**GROUPED, **TIED, "max_window_layers": st.sampled_from([0, 1, 2])},
    "gemma2": {
        **GROUPED,
        "sliding_window": st.sampled_from([3, 12, 40]),
        "query_pre_attn_scalar": st.sampled_from([2, 8, 32]),
        "attn_logit_softcapping": st.sampled_from([None, 5.0]),
        "final_logit_softcapping": st.sampled_from([None, 3.0]),
    },
    "granite": {
        **GROUPED, **TIED, "logits_scaling": SCALE, "residual_multiplier": SCALE,
        "embedding_multiplier": SCALE, "attention_multiplier": SCALE,
    },
    "cohere": {**GROUPED, "logit_scale": SCALE, "use_qk_norm": SWITCH, "attention_bias": SWITCH},
    "gpt2": {
        **TIED, "scale_attn_weights": SWITCH, "scale_attn_by_inverse_layer_idx": SWITCH,
        "reorder_and_upcast_attn": SWITCH,
    },
    "gpt_neox": {**TIED, "use_parallel_residual": SWITCH, "attention_bias": SWITCH},
    "falcon": {
        **TIED, "alibi": SWITCH, "parallel_attn": SWITCH, "bias": SWITCH, "multi_query": SWITCH,
        "new_decoder_architecture": SWITCH,
    },
    "stablelm": {
        **GROUPED, **TIED, "use_parallel_residual": SWITCH, "use_qkv_bias": SWITCH,
        "qk_layernorm": SWITCH,
    },
    "gpt_oss": {**GROUPED, "sliding_window": st.sampled_from([3, 12, 40])},
    "olmo": {**GROUPED, **TIED, "clip_qkv": st.sampled_from([None, 0.5]), "attention_bias": SWITCH},
}  # fmt: skip
"""Row -> what is drawn in its configuration."""
CHANGED = ("llama", "gpt2", "gpt_neox", "phi3", "mixtral", "bloom", "gemma2", "opt", "falcon")
KINDS = (special.hook, special.pre_hook, special.replaced, special.subclass)


def drawn(examples: int) -> Any:
    return settings(
        max_examples=10 * examples if LONG else examples,
        deadline=None,
        database=None,
        derandomize=not LONG,
        suppress_health_check=list(HealthCheck),
    )


def assert_equal_or_refused(make: Any, row: str) -> None:
    outcomes = Check(Subject.in_memory(make, rows.tokenizer_of(row))).run(CELLS)
    faults = {c: o for c, o in outcomes.items() if o.state in ("wrong", "obscure")}
    assert not faults, faults


@st.composite
def parts(draw: Any, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> tuple[str, str]:
    """A row, and the end of the path of one of its modules."""
    row = draw(st.sampled_from(CHANGED))
    modules = [name for name, part in rows.make(row).named_modules() if isinstance(part, kind)]
    last = {name.rpartition(".")[2] for name in modules if name}
    return row, draw(st.sampled_from(sorted(name for name in last if not name.isdigit())))


@pytest.mark.slow
@drawn(8)
@given(st.data())
def test_a_drawn_configuration_is_equal_or_refused(data):
    row = data.draw(st.sampled_from(sorted(DRAWN)))
    options = data.draw(st.fixed_dictionaries(DRAWN[row]))
    make = partial(rows.make, row, **options)
    try:
        make()
    except Exception:  # transformers does not have this combination
        assume(False)
    assert_equal_or_refused(make, row)


@pytest.mark.slow
@drawn(6)
@given(parts((nn.Linear, special.Conv1D)), st.booleans())
def test_a_model_with_a_drawn_adapter_is_equal_or_refused(part, parametrised):
    row, name = part
    change = (special.parametrised if parametrised else special.adapter)(name)
    assert_equal_or_refused(lambda: change(rows.make(row)), row)


@pytest.mark.slow
@drawn(6)
@given(parts(nn.Module), st.sampled_from(KINDS))
def test_a_model_with_a_drawn_hook_is_equal_or_refused(part, kind):
    row, name = part
    make = partial(_checked, row, kind(name))
    try:
        make()
    except Exception:  # such as a hook on a module whose output is no tensor
        assume(False)
    assert_equal_or_refused(make, row)


def _checked(row: str, change: Any) -> Any:
    """The changed model, if the plain one runs with the change."""
    model = change(rows.make(row))
    special.run_once(model)
    return model
