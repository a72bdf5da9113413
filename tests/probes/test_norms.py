"""What W_V reads of a token and how its output is read, against the plain model's own modules."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version

import pytest
import rows
import torch

import hijacklens as hl
from hijacklens.errors import InputError
from probes import values
from probes.anatomy.matrices import attention_norm_weight
from probes.anatomy.norms import embedded, normed
from probes.memory_fit import DirectPath
from probes.values.replacements import MatrixSite

IDS = [20, 31, 57, 44]
INPUTS = {
    "bloom": "self_attention.query_key_value",  # a norm of the embeddings
    "exaone4": "self_attn.v_proj",  # no norm before attention
    "flex_olmo": "self_attn.v_proj",
    "gemma4": "self_attn.v_proj",  # norms without the hooks of other norms
    "granite": "self_attn.v_proj",
    "llama": "self_attn.v_proj",
    "modernbert_decoder": "attn.v_proj",  # its first norm is the identity
    "olmo2": "self_attn.v_proj",
}


@cache
def loaded(family: str):
    model = hl.load_model(
        rows.make(family), tokenizer=rows.tokenizer_of(family), dtype="float32", device="cpu"
    )
    return rows.make(family), model


def first_layer(plain):
    """The first block of a plain model."""
    lists = (m for m in plain.modules() if isinstance(m, torch.nn.ModuleList))
    return next(each for each in lists if len(each) == 2)[0]


def fed(plain, path: str) -> torch.Tensor:
    """What the first layer of a plain model feeds to W_V for each token alone."""
    seen = []
    module = first_layer(plain).get_submodule(path)
    handle = module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0, 0]))
    with torch.no_grad():
        for token in IDS:
            plain(torch.tensor([[token]]))
    handle.remove()
    return torch.stack(seen)


@pytest.mark.parametrize("family", INPUTS)
def test_w_v_reads_of_a_token_what_the_model_feeds_to_it(family):
    plain, model = loaded(family)
    got = normed(model, 0, embedded(model, IDS))
    torch.testing.assert_close(got, fed(plain, INPUTS[family]), atol=1e-4, rtol=1e-4)


POSITIONS = {
    "gpt2": lambda plain, ids: plain.transformer.wte(ids),
    "openai-gpt": lambda plain, ids: plain.transformer.tokens_embed(ids),
    "xglm": lambda plain, ids: plain.model.embed_tokens(ids),
    "opt:projected": lambda plain, ids: plain.model.decoder.project_in(
        plain.model.decoder.embed_tokens(ids)
    ),
}


@pytest.mark.parametrize("family", POSITIONS)
def test_positions_are_left_out(family):
    plain, model = loaded(family)
    with torch.no_grad():
        expected = POSITIONS[family](plain, torch.tensor(IDS))
    torch.testing.assert_close(embedded(model, IDS), expected, atol=1e-5, rtol=1e-5)


def weight(norm) -> torch.Tensor:
    """The weight of a norm: its output for ones, which an RMS norm leaves as they are."""
    if isinstance(norm, torch.nn.LayerNorm):
        return norm.weight.detach()
    with torch.no_grad():
        return norm(torch.ones(1, 1, len(norm.weight)))[0, 0]


@pytest.mark.parametrize("family", ["bloom", "exaone4", "gemma4", "olmo2"])
def test_memories_of_a_head_are_those_of_the_plain_model(family):
    plain, model = loaded(family)
    x, answers = fed(plain, INPUTS[family]), [70, 33, 18, 90]
    up = plain.get_output_embeddings().weight.detach()
    if family == "bloom":
        after, final = torch.ones(len(up.T)), weight(plain.transformer.ln_f)
    else:
        after, final = first_layer(plain).post_attention_layernorm, plain.model.norm
        after, final = weight(after), weight(final)
    to = up * final * after
    to = to - to.mean(-1, keepdim=True) if family == "bloom" else to
    made = values.associations(zip(IDS, answers, strict=True))
    if version("transformer-lens").startswith("3.") and family in ("exaone4", "olmo2"):
        with pytest.raises(InputError, match="cannot be accounted for"):
            made.matrix(MatrixSite(model, 0, 0, "circuit"))
        return
    got = made.matrix(MatrixSite(model, 0, 0, "circuit"))
    torch.testing.assert_close(got, x.T @ to[answers], atol=1e-4, rtol=1e-4)

    path = DirectPath.of(model)  # without biases; relative to the mean over the vocabulary
    A, B = path.circuit(0, 1)
    bias = first_layer(plain).input_layernorm.bias.detach() if family == "bloom" else 0
    circuit = MatrixSite(model, 0, 1, "circuit").current
    expected = ((x - bias) @ circuit @ (to - to.mean(0))[answers].T).double()
    scores = path.read(IDS) @ A @ B @ path.write(answers).T
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=1e-3)


def test_the_weight_of_the_norm_before_attention_is_measured():
    for family in ("gemma4", "olmo2", "modernbert_decoder"):
        plain, model = loaded(family)
        norm = getattr(first_layer(plain), "input_layernorm", None)
        expected = torch.ones(int(model.cfg.d_model)) if norm is None else weight(norm)
        torch.testing.assert_close(attention_norm_weight(model, 0), expected)


@pytest.mark.parametrize("family", ["openai-gpt", "opt:projected"])
def test_norms_of_the_stream_leave_no_direct_path(family):
    with pytest.raises(InputError, match="norms of the residual stream itself"):
        DirectPath.of(loaded(family)[1])


@pytest.mark.parametrize("family", ["bloom:post-norm residual", "modernbert_decoder"])
def test_what_hooks_do_not_show_is_refused(family):
    site = MatrixSite(loaded(family)[1], 0, 0, "circuit")
    with pytest.raises(InputError, match="cannot be accounted for"):
        values.associations([(20, 30)]).matrix(site)
