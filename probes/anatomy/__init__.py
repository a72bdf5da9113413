"""How a model makes logits from what its parts write, measured by one pass over a short prompt.

    stream after a layer = stream * (stream before + attention * heads + sum of factors * MLPs)

Families differ in multipliers, norms, gates and the clipping of values. Which of these a bridge
has is found by comparing what its hooks see in this pass, not by its name, and what fits none of
the known forms is refused. A layer may also hold parts that are no heads and no MLP, such as
state-space mixers; what these write is the rest of what the layer adds to the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from hijacklens.errors import InputError
from hijacklens.models.hooked import HookedModel, device_of, hooked
from hijacklens.one_layer.model import OneLayerTransformer
from probes.anatomy.matrices import head_matrices
from probes.anatomy.norms import Norm, norm_at, some_tokens
from probes.rounding import EQUAL, rounding

TRIED_TOKENS = 8
"""The length of the short prompt."""
MLPS = ("mlp", "moe", "shared_mlp")
"""Parts of a block that are MLPs."""
SURE = 0.5
"""A factor is known if three standard errors of its fit are at most this."""


@dataclass(slots=True)
class LayerForm:
    """How a layer adds to the residual stream."""

    attends: bool = True
    """Whether it has heads."""
    values: str = "hook_v"
    """The hook of the attention at which values are read."""
    values_of: int = -1
    """The layer whose values the heads read: its own, or an earlier one that shares them."""
    clip: float | None = None
    """Largest absolute value of a coordinate of the values."""
    gated: bool = False
    """Whether each coordinate of a head's output is multiplied by a gate, or divided by a norm."""
    after_attention: Norm | None = None
    """The norm on the output of attention (Gemma-2 and -3)."""
    attention: float = 1.0
    mlps: dict[str, float] = field(default_factory=dict)
    """Hook of an MLP's output -> its factor."""
    stream: float = 1.0
    post: tuple[Norm, Norm] | None = None
    """Norms of the stream itself, after attention and after the MLP (GPT, OPT-350m)."""
    other: bool = False
    """Whether further parts write to the stream."""


@dataclass(frozen=True, slots=True)
class Pulled:
    """Directions of the residual stream that the output reads, times the scales of norms."""

    at_end: Float[Tensor, "read d_model"]
    """After the last layer."""
    before: Sequence[Float[Tensor, "read d_model"]]
    """By layer, where attention is added."""
    middle: Sequence[Float[Tensor, "read d_model"]]
    """By layer, where the MLP is added."""
    heads: Sequence[Float[Tensor, "read d_model"]]
    """By layer, of what the heads write: before the norm that may follow attention."""


@dataclass(slots=True)
class Anatomy:
    """How a model makes logits."""

    layers: list[LayerForm]
    final: Norm | None
    stream_end: str
    """The hook of the stream after the last layer."""
    projection: Tensor | None = None
    """A matrix [d_model, width] between the stream and the unembedding (OPT-350m)."""
    logit_scale: float = 1.0
    soft_cap: float = 0.0
    """Logits become `soft_cap * tanh(logits / soft_cap)`, if it is above 0."""
    residual: bool = True
    """Whether the embedding reaches the output."""
    hook_names: frozenset[str] = frozenset()
    """The hooks that run in a forward pass."""

    def projected(self, direction: Float[Tensor, "read width"]) -> Float[Tensor, "read d_model"]:
        """Map a direction on the input of the unembedding to one on the last norm's output."""
        return direction if self.projection is None else direction @ self.projection.to(direction).T

    def pulled(self, direction: Float[Tensor, "read width"]) -> Pulled:
        """Map a direction on the input of the unembedding to those on the stream that it reads."""
        pulled = self.projected(direction)
        pulled = pulled if self.final is None else self.final.pull(pulled)
        at_end, before, middle, heads = pulled, [], [], []
        for form in reversed(self.layers):
            middle.append(pulled if form.post is None else form.post[1].pull(pulled))
            pulled = middle[-1] if form.post is None else form.post[0].pull(middle[-1])
            before.append(pulled)
            norm = form.after_attention
            heads.append(pulled if norm is None else norm.pull(pulled))
        return Pulled(at_end, before[::-1], middle[::-1], heads[::-1])


def anatomy_of(model: HookedModel, tokens: Sequence[int] = ()) -> Anatomy:
    """Measure a model on the first of these tokens, or on some of its vocabulary.

    Raises:
        InputError: The logits cannot be written as a sum over heads, MLPs and further parts.

    Note:
        Costs a forward pass over at most eight tokens.
    """
    norm = partial(norm_at, model)
    names, n_layers = frozenset(model.hook_dict), int(model.cfg.n_layers)
    soft_cap = float(getattr(model.cfg, "output_logits_soft_cap", None) or 0)
    attention_only = bool(getattr(model.cfg, "attn_only", False))
    layers = [
        LayerForm(
            values_of=i,
            after_attention=norm(f"blocks.{i}.ln1_post"),
            mlps={} if attention_only else {f"blocks.{i}.hook_mlp_out": 1.0},
        )
        for i in range(n_layers)
    ]
    result = Anatomy(layers, norm("ln_final"), "", soft_cap=soft_cap, hook_names=names)
    if not isinstance(model, TransformerBridge):
        for i, name in ((i, name) for i in range(n_layers) for name in ("hook_v", "hook_pattern")):
            if f"blocks.{i}.attn.{name}" not in names:
                raise _refused(model, f"layer {i} has no hook {name!r}")
        result.residual = not isinstance(model, OneLayerTransformer)
        return result
    seen = _Seen(model, tokens[:TRIED_TOKENS] or some_tokens(model, TRIED_TOKENS))
    result.hook_names = frozenset(seen.ran)
    streams = [seen.only(f"blocks.{i}.hook_in") for i in range(n_layers)]
    ends = [f"blocks.{n_layers - 1}.hook_out"]
    ends += ["ln_final.hook_in", "project_out.hook_in", "unembed.hook_in"]
    result.stream_end = next(name for name in ends if name in seen.values)
    streams.append(seen.only(result.stream_end))
    if not seen.close(seen.values.get("ln_final.hook_in", streams[-1]), streams[-1]):
        raise _refused(model, "its last norm does not read what the last layer gives")
    for i, form in enumerate(layers):
        if f"blocks.{i}.attn.hook_pattern" in seen.values:
            heads = [_measure_heads(seen, layers, i)]
            if form.after_attention:
                if not seen.close(seen.only(f"blocks.{i}.ln1_post.hook_in"), heads[0]):
                    raise _refused(model, f"the heads of layer {i} do not enter its norm alone")
                heads = [seen.only(f"blocks.{i}.ln1_post.hook_out")]
        else:
            heads, form.attends = [], False
        _measure_layer(seen, form, i, (streams[i], streams[i + 1]), heads, norm)
    heads = {len(v) for name, v in seen.values.items() if name.endswith("attn.hook_pattern")}
    if len(heads) != 1:
        raise _refused(model, "its layers have no heads, or different numbers of them")
    _measure_head(seen, result, streams[-1])
    return result


class _Seen:
    """What the hooks of a bridge saw in a pass over one prompt, in float64."""

    def __init__(self, model: TransformerBridge, tokens: Sequence[int]) -> None:
        self.model: Any = model
        self.values: dict[str, Tensor] = {}
        self.repeated: set[str] = set()
        self.ran: set[str] = set()
        wanted = ("hook_in", "hook_out", "hook_v", "hook_pattern", "hook_z", "hook_mlp_out")
        wanted += ("hook_scale", "hook_pos_embed", "hook_resid_pre")

        def keep(name: str) -> Any:
            def hook_function(value: Any, hook: Any) -> None:
                self.ran.add(name)
                if isinstance(value, Tensor) and value.shape[:1] == (1,):
                    if name in self.values:
                        self.repeated.add(name)
                    self.values[name] = value[0].detach().cpu().double()

            return hook_function

        names = [name for name in model.hook_dict if name.split(".")[-1] in wanted]
        dtype = next(iter(model.parameters())).dtype
        self.tolerance = rounding(dtype)
        self.rounding = torch.finfo(dtype).eps
        row = torch.tensor([list(tokens)], device=device_of(model))
        with torch.inference_mode(), hooked(model, [(name, keep(name)) for name in names]):
            self.logits = model(row, use_cache=False)[0].cpu().double()

    def only(self, name: str) -> Tensor:
        """Return what a hook saw, if it ran once."""
        if name not in self.values or name in self.repeated:
            raise _refused(self.model, f"its hook {name} does not run once in a forward pass")
        return self.values[name]

    def close(self, got: Tensor, expected: Tensor) -> bool:
        """Return whether two tensors are equal up to rounding."""
        same = got.shape == expected.shape
        return same and bool((got - expected).norm() <= self.tolerance * expected.norm() + 1e-9)

    def factors(self, parts: Sequence[Tensor], whole: Tensor) -> list[float] | None:
        """Return the numbers by which parts sum to the whole, or None if there are none.

        A number of the whole may be off by the rounding of the sum, and by the tolerance times
        what is added to the first part. Both are small next to what is added in most coordinates,
        though not next to the norm of a stream, in which a few coordinates can be huge.

        Raises:
            InputError: A part drowns in the rounding of the others, so any number would fit.
        """
        if any(part.shape != whole.shape for part in parts):
            return None
        size = sum((part.square().mean(-1, keepdim=True).sqrt() for part in parts[1:]), 0 * whole)
        level = whole.square().mean(-1, keepdim=True).sqrt() * EQUAL + 1e-9
        off = self.rounding * (parts[0].abs() + whole.abs() + level) + self.tolerance * size
        columns = torch.stack([(part / off).flatten() for part in parts], 1)
        target = (whole / off).flatten()
        # The default driver can return zeros where a column is zero (pytorch/pytorch#187411).
        found = torch.linalg.lstsq(columns, target[:, None], driver="gelsd").solution[:, 0]
        errors = 3 * torch.linalg.pinv(columns.mT @ columns).diagonal().clamp(min=0).sqrt()
        for i, part in enumerate(parts):
            if not part.any() or abs(found[i] - 1) <= errors[i] + (self.tolerance if i else 0):
                found[i] = 1
        rest = columns @ found - target
        if not rest.square().mean() <= 1:
            return None
        if (errors > SURE).any():
            raise _refused(
                self.model,
                "a layer adds too little to the stream to show by what factor in this dtype. Load "
                "the model in float32",
            )
        return found.tolist()


def _refused(model: Any, reason: str) -> InputError:
    return InputError(
        f"the logits of {model.cfg.model_name!r} cannot be accounted for: {reason}. Ablate heads "
        "(probes.ablation) or patch activations (probes.patching) instead."
    )


def _measure_heads(seen: _Seen, layers: list[LayerForm], layer: int) -> Tensor:
    """Find which values the heads of a layer read, and whether their output is gated.

    Return what the heads and the output bias give together [pos, d_model].
    """
    form, attn = layers[layer], f"blocks.{layer}.attn"
    pattern, z = seen.only(f"{attn}.hook_pattern"), seen.only(f"{attn}.hook_z")
    W_O, b_O = head_matrices(seen.model, layer, "O")
    written = torch.einsum("phe,hed->pd", z, W_O.cpu().double())
    written = written if b_O is None else written + b_O.cpu().double()

    def read(name: str, clip: float | None) -> Tensor | None:
        values = seen.values.get(name)
        if values is None or z.shape[1] % values.shape[1]:
            return None
        values = values if clip is None else values.clamp(-clip, clip)
        values = values.repeat_interleave(z.shape[1] // values.shape[1], dim=1)
        return torch.einsum("hpj,jhe->phe", pattern, values)

    config: Any = seen.model.original_model.config.get_text_config()
    clips = [
        getattr(part, "clip_qkv", None) for part in (config, getattr(config, "attn_config", 0))
    ]
    for source in range(layer, -1, -1):
        for hook in ("v_norm.hook_out", "hook_v"):
            for clip in (*filter(None, clips), None):  # a few tokens need not reach the clip
                got = read(f"blocks.{source}.attn.{hook}", clip)
                if got is not None and seen.close(got, z):
                    form.values, form.values_of, form.clip = hook, source, clip
                    return written
    if read(f"{attn}.hook_v", None) is None:
        raise _refused(
            seen.model, f"the hooks of layer {layer} do not show the values of its heads"
        )
    form.gated = True
    return written


def _measure_layer(
    seen: _Seen,
    form: LayerForm,
    layer: int,
    streams: tuple[Tensor, Tensor],
    heads: list[Tensor],
    norm: Callable[[str], Norm | None],
) -> None:
    """Find how the outputs of attention and MLPs enter the stream."""
    block, (before, after) = f"blocks.{layer}", streams
    children = {
        name: value
        for name, value in seen.values.items()
        if name.startswith(f"{block}.") and name.count(".") == 3 and name.endswith(".hook_out")
        if not name.split(".")[2].startswith(("ln", "attn")) and value.shape == before.shape
    }
    mlps = {name: v for name, v in children.items() if name.split(".")[2] in MLPS}
    mixers = [value for name, value in children.items() if name not in mlps]
    if (total := f"{block}.hook_mlp_out") in seen.values:
        mlps = {total: seen.values[total]}
    parts = [*heads, *mlps.values()]
    form.mlps, form.other = dict.fromkeys(mlps, 1.0), bool(mixers)
    if found := seen.factors([before, *parts, *mixers], after):
        form.stream = found[0]
        form.attention = found[1] / found[0] if heads else 1.0
        for i, name in enumerate(mlps, start=1 + len(heads)):
            form.mlps[name] = found[i] / found[0]
        return
    first, second = (f"{block}.ln{i}" for i in (1, 2))
    inside = seen.values.get(f"{first}.hook_out")
    if heads and inside is not None and seen.close(seen.only(f"{second}.hook_out"), after):
        entered = [before, heads[0]], [inside, *mlps.values()]
        if all(
            seen.factors(added, seen.only(f"{path}.hook_in")) == [1.0] * len(added)
            for path, added in zip((first, second), entered, strict=True)
        ):
            norms = norm(first), norm(second)
            assert norms[0] and norms[1]
            form.post = norms[0], norms[1]
            return
    raise _refused(seen.model, f"no hooks of layer {layer} show all that it adds")


def _measure_head(seen: _Seen, result: Anatomy, stream: Tensor) -> None:
    """Find how the stream after the last layer becomes logits."""
    model, final = seen.model, seen.values.get("ln_final.hook_out", stream)
    if "project_out.hook_out" in seen.values:
        if not seen.close(seen.only("project_out.hook_in"), final):
            raise _refused(model, "its last norm has no hook")
        result.projection = model.project_out.weight.detach().T
        final = seen.values["project_out.hook_out"]
    if not seen.close(seen.only("unembed.hook_in"), final):
        raise _refused(model, "its last norm is not followed by the unembedding alone")
    raw = seen.only("unembed.hook_out")
    capped = result.soft_cap * torch.tanh(raw / result.soft_cap) if result.soft_cap else raw
    if seen.close(seen.logits, capped):
        return
    if not (scale := seen.factors([raw], seen.logits)):
        raise _refused(model, "its logits are no multiple of what the unembedding gives")
    result.logit_scale, result.soft_cap = scale[0], 0.0
