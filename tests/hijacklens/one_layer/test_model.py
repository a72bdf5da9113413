"""The one-layer model: equation 4.1, its hooks, what TransformerLens' tools make of it, files."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformer_lens import ActivationCache, patching
from type_checks import unchecked

from hijacklens.errors import InputError
from hijacklens.models.hooked import HookedModel, hooked, require_eval
from hijacklens.one_layer import memory
from hijacklens.one_layer.architecture import OneLayerConfig, OneLayerWeights
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.task import ConceptTask

TOLERANCE = {"float32": 1e-6, "float64": 1e-12}


def model_of(**changes: object) -> OneLayerTransformer:
    shape: dict[str, object] = {"vocab": 16, "d_model": 6, "d_attn": 5, "length": 12, "seed": 3}
    return OneLayerTransformer(OneLayerConfig(**{**shape, **changes}))  # type: ignore[arg-type]


def contexts(batch: int = 7, pos: int = 12, vocab: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab, (batch, pos), generator=torch.Generator().manual_seed(seed))


def literal(model: OneLayerTransformer, context: list[int]) -> list[float]:
    """Equation 4.1 as the paper writes it: columns are tokens, one softmax, the last column."""
    E = model.W_E.T  # [d, V]
    K, Q, V = (w[0, 0].T for w in (model.W_K, model.W_Q, model.W_V))  # [d_a, d], [d_a, d], [d, d]
    U = [E[:, token] for token in context]
    query = Q @ U[-1]
    exponent = [math.exp(float(K @ u @ query) / math.sqrt(len(query))) for u in U]
    mixed = torch.zeros_like(U[0])
    for weight, u in zip(exponent, U, strict=True):
        mixed = mixed + weight / sum(exponent) * u
    answer = V @ mixed
    return [float(E[:, token] @ answer) for token in range(E.shape[1])]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("init_scale", [None, 1.0], ids=["default scale", "sharp attention"])
def test_equals_the_literal_equation(dtype: str, init_scale: float | None) -> None:
    model = model_of(dtype=dtype, init_scale=init_scale)
    tokens = contexts()
    with torch.no_grad():
        expected = torch.tensor(
            [literal(model, row.tolist()) for row in tokens], dtype=torch.float64
        )
        hooked_path, fast_path = model(tokens)[:, -1], model.last_logits(tokens)
    # Logits are about 0.1 at the default scale and 10 at scale 1.
    tolerance = TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))
    assert hooked_path.dtype == fast_path.dtype == getattr(torch, dtype)
    torch.testing.assert_close(hooked_path.double(), expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(fast_path.double(), expected, atol=tolerance, rtol=0)


def test_by_hand() -> None:
    """Two tokens, uniform attention: the output is the mean of the values, nothing added."""
    eye = torch.eye(2, dtype=torch.float64)
    swap = eye.flip(0)
    zero = torch.zeros_like(eye)
    weights = OneLayerWeights(W_E=eye, W_Q=zero, W_K=zero, W_V=swap)
    model = OneLayerTransformer.from_weights(weights, length=4)
    logits = model(torch.tensor([[0, 0, 0, 1]]))
    assert logits[0, -1].tolist() == [0.25, 0.75]  # each token votes for the other
    assert logits[0, 0].tolist() == [0.0, 1.0]


def test_every_position_answers_the_context_up_to_it() -> None:
    model, tokens = model_of(dtype="float64", init_scale=1.0), contexts()
    with torch.no_grad():
        logits = model(tokens)
        for pos in range(tokens.shape[1]):
            prefix = model.last_logits(tokens[:, : pos + 1])
            torch.testing.assert_close(logits[:, pos], prefix, atol=1e-12, rtol=0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 15), min_size=1, max_size=20), st.integers(0, 15), st.randoms())
def test_the_order_before_the_last_token_does_not_matter(
    before: list[int], last: int, random: object
) -> None:
    model = model_of(dtype="float64", init_scale=1.0)
    shuffled = list(before)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    with torch.no_grad():
        one, other = (model(torch.tensor([[*row, last]]))[:, -1] for row in (before, shuffled))
    torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_theorem_1_in_one_call() -> None:
    task = ConceptTask(bits=4, omega=1.0, length=64)
    weights = memory.theorem_1(task, dtype=torch.float64)
    model = OneLayerTransformer.from_weights(weights, length=64)
    drawn = task.sample(200, torch.Generator().manual_seed(0))
    counts = torch.nn.functional.one_hot(drawn.tokens, 16).sum(1).double()
    with torch.no_grad():
        logits = model(drawn.tokens)[:, -1]
    expected = memory.uniform_logits(counts, W_E=weights.W_E, W_V=weights.W_V)
    torch.testing.assert_close(logits, expected, atol=1e-12, rtol=0)
    assert (logits.argmax(1) == drawn.labels).double().mean() > 0.9


class TestHooks:
    def test_names_and_shapes_are_those_of_transformer_lens(self) -> None:
        model, tokens = model_of(), contexts(batch=2)
        logits, cache = model.run_with_cache(tokens)
        assert isinstance(cache, ActivationCache)
        shapes = {name: tuple(cache[name].shape) for name in cache}
        assert shapes == {
            "hook_embed": (2, 12, 6),
            "blocks.0.hook_resid_pre": (2, 12, 6),
            "blocks.0.attn.q.hook_in": (2, 12, 6),
            "blocks.0.attn.k.hook_in": (2, 12, 6),
            "blocks.0.attn.v.hook_in": (2, 12, 6),
            "blocks.0.attn.hook_q": (2, 12, 1, 5),
            "blocks.0.attn.hook_k": (2, 12, 1, 5),
            "blocks.0.attn.hook_v": (2, 12, 1, 6),
            "blocks.0.attn.hook_attn_scores": (2, 1, 12, 12),
            "blocks.0.attn.hook_pattern": (2, 1, 12, 12),
            "blocks.0.attn.hook_z": (2, 12, 1, 6),
            "blocks.0.hook_attn_out": (2, 12, 6),
            "blocks.0.hook_resid_post": (2, 12, 6),
            "unembed.hook_in": (2, 12, 6),
        }
        assert set(model.hook_dict) == set(shapes)
        assert tuple(logits.shape) == (2, 12, 16)

    def test_cached_values_agree_with_each_other(self) -> None:
        model, tokens = model_of(dtype="float64"), contexts()
        logits, cache = model.run_with_cache(tokens)
        scores = torch.einsum("bqe,bke->bqk", cache["q", 0][:, :, 0], cache["k", 0][:, :, 0])
        last = (scores[:, -1] / math.sqrt(5)).softmax(-1)
        torch.testing.assert_close(cache["pattern", 0][:, 0, -1], last, atol=1e-12, rtol=0)
        out = cache["z", 0][:, :, 0] @ model.W_O[0, 0] @ model.W_U + model.b_U
        torch.testing.assert_close(out, logits, atol=1e-12, rtol=0)

    def test_accessors_have_the_leading_axes_of_transformer_lens(self) -> None:
        model = model_of()
        accessors = {n: tuple(getattr(model, n).shape) for n in ("W_E", "W_U", "b_U", "W_O")}
        assert accessors == {"W_E": (16, 6), "W_U": (6, 16), "b_U": (16,), "W_O": (1, 1, 6, 6)}
        assert tuple(model.W_Q.shape) == tuple(model.W_K.shape) == (1, 1, 6, 5)
        assert tuple(model.W_V.shape) == (1, 1, 6, 6)
        assert tuple(model.blocks[0].attn.W_V.shape) == (1, 6, 6)
        assert model.W_U.data_ptr() == model.W_E.data_ptr()  # tied

    def test_it_is_a_hooked_model_in_evaluation_mode(self) -> None:
        model = model_of()
        assert isinstance(model, HookedModel)
        require_eval(model, operation="test")
        assert (model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_vocab) == (1, 1, 16)
        assert (model.cfg.d_attn, model.cfg.attn_scale) == (5, math.sqrt(5))

    def test_a_hook_edits_and_comes_off(self) -> None:
        model, tokens = model_of(), contexts()
        plain = model(tokens)

        def only_last(pattern: torch.Tensor, hook: object) -> torch.Tensor:
            edited = torch.zeros_like(pattern)
            edited[..., -1] = 1.0
            return edited

        with hooked(model, [("blocks.0.attn.hook_pattern", only_last)]):
            edited = model(tokens)[:, -1]
        by_hand = model.W_E[tokens[:, -1]] @ model.W_V[0, 0] @ model.W_U
        torch.testing.assert_close(edited, by_hand)
        ran = model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.attn.hook_pattern", only_last)])
        torch.testing.assert_close(ran[:, -1], by_hand)
        assert torch.equal(model(tokens), plain)

    def test_only_chosen_rows_are_unembedded(self) -> None:
        model, tokens = model_of(), contexts()

        def gather(x: torch.Tensor, hook: object) -> torch.Tensor:
            return x[[0, 3], [-1, 4]][None]

        rows = model.run_with_hooks(tokens, fwd_hooks=[("unembed.hook_in", gather)])
        torch.testing.assert_close(rows[0], model(tokens)[[0, 3], [-1, 4]])

    def test_no_output_is_asked_for_by_none(self) -> None:
        model, tokens = model_of(), contexts()
        output, cache = model.run_with_cache(tokens, return_type=None, names_filter="hook_embed")
        assert output is None
        assert list(cache) == ["hook_embed"]
        with pytest.raises(InputError, match="return_type 'loss'"):
            model(tokens, return_type="loss")


class TestTransformerLensTools:
    """The accounts of ActivationCache and the patching tools hold for this model."""

    def test_logit_attribution_sums_to_the_logits(self) -> None:
        model, tokens = model_of(dtype="float64"), contexts()
        logits, cache = model.run_with_cache(tokens)
        parts, labels = cache.decompose_resid(return_labels=True)
        assert labels == ["0_attn_out"]  # the embedding reaches no output by itself
        torch.testing.assert_close(parts.sum(0), cache["resid_post", 0], atol=1e-12, rtol=0)
        heads, names = cache.stack_head_results(return_labels=True, incl_remainder=True)
        assert names == ["L0H0", "remainder"]
        assert heads[1].abs().max() < 1e-12
        full, names = cache.get_full_resid_decomposition(return_labels=True)
        assert names == ["L0H0", "bias"]
        answer, other = tokens[:, 0], tokens[:, 1]
        attributions = cache.logit_attrs(
            full[:, :, -1], answer, incorrect_tokens=other, pos_slice=-1
        )
        rows = torch.arange(len(tokens))
        expected = logits[rows, -1, answer] - logits[rows, -1, other]
        torch.testing.assert_close(attributions.sum(0), expected, atol=1e-12, rtol=0)

    def test_patching_a_value_moves_the_logit_by_its_share(self) -> None:
        """Uniform attention over 6 tokens: one patched value changes 1/6 of the output."""
        task = ConceptTask(bits=4, omega=1.0, length=6)
        weights = memory.theorem_1(task, dtype=torch.float64)
        model = OneLayerTransformer.from_weights(weights, length=6)
        clean, corrupted = contexts(batch=1, pos=6, seed=1), contexts(batch=1, pos=6, seed=2)
        with torch.no_grad():
            _, cache = model.run_with_cache(clean)
            base = model(corrupted)[0, -1, 5]
            moved = patching.get_act_patch_attn_head_v_by_pos(
                model, corrupted, cache, lambda logits: logits[0, -1, 5]
            )
        near = task.neighbours() & (task.hamming() == 1)
        for pos in range(6):
            votes = near[5, clean[0, pos]].double() - near[5, corrupted[0, pos]].double()
            assert float(moved[0, pos, 0]) == pytest.approx(float(base + votes / 6), abs=1e-6)

    def test_patching_everything_gives_the_clean_run(self) -> None:
        model, clean, corrupted = model_of(), contexts(seed=1), contexts(seed=2)
        with torch.no_grad():
            logits, cache = model.run_with_cache(clean)
            out = patching.get_act_patch_attn_head_out_all_pos(
                model, corrupted, cache, lambda logits: logits[:, -1, 2].mean()
            )
        assert float(out[0, 0]) == pytest.approx(float(logits[:, -1, 2].mean()), abs=1e-6)


class TestStart:
    def test_gaussian_of_the_documented_scale(self) -> None:
        model = model_of(vocab=256, d_model=128, d_attn=64)
        for weight in (w.detach() for w in (model.W_E, model.W_Q, model.W_K, model.W_V)):
            # The standard deviation of n draws is off by a share of about 1 / sqrt(2 n).
            assert float(weight.std()) == pytest.approx(128**-0.5, rel=5 / (2 * 8192) ** 0.5)
            assert abs(float(weight.mean())) < 5 * 128**-0.5 / 8192**0.5
        scaled = model_of(vocab=256, d_model=128, d_attn=64, init_scale=0.5)
        torch.testing.assert_close(scaled.W_E, model.W_E * 0.5 * 128**0.5)

    def test_the_seed_decides_and_the_dtype_does_not(self) -> None:
        one, same, other = model_of(), model_of(dtype="float64"), model_of(seed=4)
        assert torch.equal(one.W_V, same.W_V.float())
        assert not torch.equal(one.W_E, other.W_E)

    def test_identity_changes_nothing_else(self) -> None:
        gaussian, identity = model_of(), model_of(value_init="identity")
        assert torch.equal(identity.W_V[0, 0], torch.eye(6))
        for name in ("W_E", "W_Q", "W_K"):
            assert torch.equal(getattr(gaussian, name), getattr(identity, name))

    @pytest.mark.parametrize(
        ("freeze", "trained"),
        [
            ((), {"W_E", "W_Q", "W_K", "W_V"}),
            (("W_E",), {"W_Q", "W_K", "W_V"}),
            (("W_V",), {"W_E", "W_Q", "W_K"}),
            (("W_QK",), {"W_E", "W_V"}),
            (("W_E", "W_QK"), {"W_V"}),
        ],
    )
    def test_frozen_parts_get_no_gradient(self, freeze: tuple[str, ...], trained: set[str]) -> None:
        model = model_of(freeze=freeze)
        model(contexts())[:, -1].square().sum().backward()
        with_gradient = {
            n.rpartition(".")[2] for n, p in model.named_parameters() if p.grad is not None
        }
        assert with_gradient == trained

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"vocab": 0}, "vocab is 0"),
            ({"d_attn": -1}, "d_attn is -1"),
            ({"init_scale": -0.1}, "init_scale is -0.1"),
            ({"init_scale": math.inf}, "init_scale is inf"),
            ({"value_init": "zero"}, "unknown start of W_V 'zero'"),
            ({"freeze": ("W_Q",)}, "unknown part to freeze 'W_Q'.*W_QK"),
            ({"dtype": "float16"}, "unknown dtype 'float16'"),
            ({"seed": -1}, "seed is -1"),
        ],
    )
    def test_bad_configuration(self, changes: dict[str, object], message: str) -> None:
        with pytest.raises(InputError, match=message):
            model_of(**changes)

    @pytest.mark.parametrize(
        ("tokens", "message"),
        [
            (torch.tensor([[0, 16]]), "from 0 to 16.*0 to 15"),
            (torch.tensor([[-1, 3]]), "from -1 to 3"),
            (torch.zeros(2, 0, dtype=torch.long), "empty"),
        ],
        ids=["too large", "negative", "no tokens"],
    )
    def test_bad_tokens(self, tokens: torch.Tensor, message: str) -> None:
        for path in (model_of(), model_of().last_logits):
            with pytest.raises(InputError, match=message):
                path(tokens)


def test_another_value_matrix_leaves_the_model_alone() -> None:
    model, tokens = model_of(freeze=("W_V",), init_scale=0.3), contexts()
    before = model(tokens)
    new = torch.eye(6)
    other = model.with_value(new)
    with torch.no_grad():
        other.W_E.zero_()
    assert torch.equal(other.W_V[0, 0], new)
    assert other.config == model.config  # results name a model by its seed
    assert torch.equal(model(tokens), before)
    assert model.double().with_value(new.double()).W_E.dtype == torch.float64


class TestFiles:
    def test_round_trip(self, tmp_path) -> None:
        model = model_of(freeze=("W_QK",), dtype="float64", value_init="identity")
        with torch.no_grad():
            model.W_E.mul_(1.5)
        folder = model.save(tmp_path / "deep" / "model")
        assert sorted(path.name for path in folder.iterdir()) == [
            "config.json",
            "model.safetensors",
        ]
        back = OneLayerTransformer.load(folder)
        assert back.config == model.config
        assert torch.equal(back(contexts()), model(contexts()))
        assert not back.blocks[0].attn.W_K.requires_grad

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda f: (f / "config.json").unlink(), "no one-layer model"),
            (lambda f: (f / "model.safetensors").unlink(), "no one-layer model"),
            (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
            (lambda f: (f / "config.json").write_text('{"kind": "bert"}'), "not the configuration"),
            (lambda f: (f / "config.json").write_text("[1]"), "not the configuration"),
            (lambda f: (f / "model.safetensors").write_bytes(b"PK\x03\x04 a pickle"), "cannot be"),
            (lambda f: save_file({"wte": torch.ones(2)}, f / "model.safetensors"), r"\['wte'\]"),
            (lambda f: edit(f, d_model=7), r"W_E is \(16, 6\).*says \(16, 7\)"),
            (lambda f: edit(f, dtype="float64"), "float32.*says.*float64"),
            (lambda f: edit(f, vocab=0), "vocab is 0"),
            (lambda f: edit(f, freeze=3), "freeze is 3"),
            (lambda f: edit(f, layers=2), "not the configuration"),
        ],
        ids=[
            "no config", "no weights", "broken json", "foreign json", "json list", "a pickle",
            "foreign tensors", "other shape", "other dtype", "bad entry", "bad type", "extra",
        ],
    )  # fmt: skip
    def test_a_spoilt_folder_gives_one_error(self, tmp_path, spoil, message: str) -> None:
        folder = model_of().save(tmp_path)
        spoil(folder)
        with unchecked(), pytest.raises(InputError, match=message):
            OneLayerTransformer.load(folder)

    def test_truncated_weights(self, tmp_path) -> None:
        folder = model_of().save(tmp_path)
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(InputError, match="cannot be read"):
            OneLayerTransformer.load(folder)


def edit(folder, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
