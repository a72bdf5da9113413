"""Plain Hugging Face forward passes of single prompts, as they are or with one change.

Nothing of this project is imported here. A change acts where transformers computes the quantity:

- attention is hidden by an additive mask on the scores, just before their softmax;
- a head is silenced at the input of its output matrix;
- W_V of a head is scaled in the output of the projection that makes the values. Which channels
  these are is measured: after a single token the attention is one, so a head's output has a
  gradient with respect to its values and to nothing else.
- a residual stream is replaced in the output of a decoder layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ATTENDED = torch.nn.functional.scaled_dot_product_attention
SOFTMAXES = (torch.nn.functional.softmax, torch.softmax, Tensor.softmax)
OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "Wo", "output.dense")
"""Paths of the output matrix of attention."""
NORMS = ("attn_sub_norm",)
"""Paths of a norm over the outputs of all heads, before that matrix (BitNet)."""
VALUES = ("v_proj", "kv_b_proj", "self.value")
"""Paths of a projection that makes the values; others are found by their gradient."""


class Reference:
    """A plain causal model and its tokenizer.

    Methods that change the model raise `LookupError` if the place of the change is not found.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model.eval().requires_grad_(True)
        self.tokenizer = tokenizer

    def ids(self, prompt: str) -> list[int]:
        """Return the tokens of a prompt, as its tokenizer makes them by default."""
        return list(self.tokenizer(prompt).input_ids)

    def first_token(self, prompt: str, target: str) -> tuple[list[int], int]:
        """Return the tokens after which the target starts, and its first token."""
        before, after = self.ids(prompt), self.ids(f"{prompt} {target}")
        same = [a == b for a, b in zip(before, after, strict=False)]
        n = same.index(False) if False in same else len(same)
        return after[:n], after[n]

    def logprobs(self, ids: Sequence[int]) -> Tensor:
        """Return log-probabilities [vocab] of the next token, in nats, from a float64 softmax."""
        with torch.no_grad():
            tokens = torch.tensor([list(ids)], device=self.model.device)
            return self.model(tokens).logits[0, -1].double().log_softmax(-1).cpu()

    @contextmanager
    def hidden(self, length: int, queries: Sequence[int], keys: Sequence[int]) -> Iterator[None]:
        """Hide keys from queries in every layer and head, for prompts of one length."""
        bias = torch.zeros(length, length)
        bias[list(queries), torch.tensor(list(keys))[:, None]] = -torch.inf
        with _AddedToScores(bias):
            yield

    @contextmanager
    def silenced(self, layer: int, head: int, heads: int) -> Iterator[None]:
        """Replace the output of one of the query heads by zero."""

        def silence(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0].clone()
            z.unflatten(-1, (heads, -1))[..., head, :] = 0
            return (z, *args[1:])

        handle = self._reading(layer, OUTPUTS).register_forward_pre_hook(silence)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def scaled_values(self, layer: int, head: int, heads: int, factor: float) -> Iterator[None]:
        """Multiply W_V by a factor, not its bias, for the values that a query head reads."""
        projection, channels = self._values_of(layer, head, heads)
        bias = getattr(getattr(projection, "base_layer", projection), "bias", None)

        def scale(module: Any, args: Any, output: Tensor) -> Tensor:
            fixed = torch.zeros_like(output[..., :1]) if bias is None else bias[channels]
            output = output.clone()
            output[..., channels] = factor * (output[..., channels] - fixed) + fixed
            return output

        handle = projection.register_forward_hook(scale)
        try:
            yield
        finally:
            handle.remove()

    def stream(self, ids: Sequence[int], layer: int, position: int) -> Tensor:
        """Return the residual stream [d_model] after a layer."""
        kept: list[Tensor] = []

        def keep(module: Any, args: Any, output: Any) -> None:
            stream = output if isinstance(output, Tensor) else output[0]
            kept.append(stream.reshape(-1, stream.shape[-1])[position].clone())

        handle = self._layers()[layer].register_forward_hook(keep)
        try:
            self.logprobs(ids)
        finally:
            handle.remove()
        return kept[0]

    @contextmanager
    def patched(self, layer: int, position: int, new: Tensor) -> Iterator[None]:
        """Replace the residual stream after a layer at one position."""

        def put(module: Any, args: Any, output: Any) -> Any:
            stream = (output if isinstance(output, Tensor) else output[0]).clone()
            stream.view(-1, stream.shape[-1])[position] = new
            return stream if isinstance(output, Tensor) else (stream, *output[1:])

        handle = self._layers()[layer].register_forward_hook(put)
        try:
            yield
        finally:
            handle.remove()

    def _layers(self) -> Any:
        count = self.model.config.get_text_config().num_hidden_layers
        lists = [
            (name, module)
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.ModuleList)
            and len(module) == count
            and "vision" not in name
        ]
        if not lists:
            raise LookupError("the decoder layers were not found")
        return min(lists, key=lambda pair: pair[0].count("."))[1]

    def _attention(self, layer: int) -> Any:
        """Return the innermost attention module of a layer."""
        named = self._layers()[layer].named_modules()
        found = [
            module
            for _, module in named
            if "Att" in type(module).__name__ and _inside(module, OUTPUTS)
        ]
        if not found:
            raise LookupError(f"the attention of layer {layer} was not found")
        return found[-1]

    def _reading(self, layer: int, names: Sequence[str]) -> Any:
        """Return the module of these names that reads the outputs of all heads."""
        return _inside(self._attention(layer), names)[0]

    def _values_of(self, layer: int, head: int, heads: int) -> tuple[Any, Tensor]:
        """Return the projection that makes values, and the channels that a query head reads."""
        attention = self._attention(layer)
        named = _inside(attention, VALUES)
        matrices = [
            module
            for module in attention.children()
            if any(parameter.dim() == 2 for parameter in module.parameters())
        ]
        outputs: list[tuple[Any, Tensor]] = []
        read: list[Tensor] = []

        def keep(module: Any, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.retain_grad()
                outputs.append((module, output))

        reader = self._reading(layer, (*NORMS, *OUTPUTS))
        handles = [reader.register_forward_pre_hook(lambda module, args: read.append(args[0]))]
        candidates = named or [each for each in matrices if each is not reader]
        handles += [module.register_forward_hook(keep) for module in candidates]
        try:
            with torch.enable_grad():
                # Rows of one token; several, as values that are clipped have no gradient.
                self.model(torch.arange(5, 37, device=self.model.device)[:, None])
                read[0].unflatten(-1, (heads, -1))[..., head, :].sum().backward()
        finally:
            for handle in handles:
                handle.remove()
            self.model.zero_grad(set_to_none=True)
        for module, output in reversed(outputs):  # the last one is closest to the values
            if output.grad is not None and output.grad.any():
                size = output.grad.reshape(-1, output.shape[-1]).abs().amax(0)
                return module, (size > 1e-3 * size.max()).nonzero()[:, 0]  # more than rounding
        raise LookupError(f"the value matrix of layer {layer} was not found")


def _inside(module: torch.nn.Module, paths: Sequence[str]) -> list[Any]:
    """Return the modules at these paths, as far as they exist."""
    found = dict(module.named_modules())
    return [found[path] for path in paths if path in found]


class _AddedToScores(TorchFunctionMode):
    """Adds a bias [query, key] to attention scores, whichever function computes the softmax."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = bias

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is ATTENDED:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            kwargs |= dict(zip(names, args, strict=False))
            kwargs["attn_mask"] = self._mask(
                kwargs["query"], kwargs.get("attn_mask"), causal=kwargs.pop("is_causal", False)
            )
            args = ()
        elif func in SOFTMAXES and self._are_scores(args[0]):
            scores = args[0].clone()
            scores[..., : len(self.bias)] += self.bias.to(scores)
            args = (scores, *args[1:])
        return func(*args, **kwargs)

    def _are_scores(self, scores: Tensor) -> bool:
        n = len(self.bias)  # one more column where a sink has a score
        return scores.dim() >= 3 and scores.shape[-2] == n and scores.shape[-1] in (n, n + 1)

    def _mask(self, query: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
        bias = self.bias.to(query)
        if causal:
            bias = bias + torch.full_like(bias, -torch.inf).triu(1)
        if mask is None:
            return bias
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
        return mask + bias
