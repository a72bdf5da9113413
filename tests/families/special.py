"""Special cases: models that somebody changed before loading, and tokenizers of other kinds.

Every case is equal to its plain model or refused. A case is made from a row by a change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any

import rows
import torch
import transformers
from tiny_models import tiny_tokenizer
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from analyses.conformance.cells import FACTS, Subject
from hijacklens.models.loading import load_model
from hijacklens.scoring.execution import Execution
from hijacklens.scoring.hijack import hijack

Change = Callable[[Any], Any]


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter, built as peft builds it."""

    def __init__(self, base_layer: nn.Module, seed: int = 0) -> None:
        super().__init__()
        self.base_layer = base_layer
        rows, columns = base_layer.weight.shape
        if isinstance(base_layer, Conv1D):
            rows, columns = columns, rows
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
        self.lora_A = nn.Parameter(draw(2, columns) * 0.3)
        self.lora_B = nn.Parameter(draw(rows, 2) * 0.3)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + x @ self.lora_A.T @ self.lora_B.T


class LowRank(nn.Module):
    """A parametrisation that adds a low-rank matrix to a weight."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(1))
        self.left = nn.Parameter(draw(weight.shape[0], 2) * 0.3)
        self.right = nn.Parameter(draw(2, weight.shape[1]) * 0.3)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.left @ self.right


def modules(model: Any, ending: str) -> list[tuple[Any, str]]:
    """The parents and names of all modules whose path ends so."""
    paths = [name for name, _ in model.named_modules() if f".{name}".endswith(f".{ending}")]
    assert paths, f"no module {ending}"
    return [
        (model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in paths
    ]


def every(ending: str, change: Callable[[Any], Any]) -> Change:
    """Replace every module whose path ends so by what `change` returns, if that is a module."""

    def apply(model: Any) -> Any:
        for parent, name in modules(model, ending):
            new = change(getattr(parent, name))
            if isinstance(new, nn.Module):  # not a handle or a tensor
                setattr(parent, name, new)
        return model

    return apply


def adapter(ending: str) -> Change:
    return every(ending, Adapted)


def parametrised(ending: str) -> Change:
    def change(module: Any) -> None:
        parametrize.register_parametrization(module, "weight", LowRank(module.weight))

    return every(ending, change)


def _scaled(output: Any, factor: float = 1.7) -> Any:
    if isinstance(output, torch.Tensor):
        return output * factor
    return (output[0] * factor, *output[1:])


def hook(ending: str) -> Change:
    """A forward hook of the user's that scales the output."""
    return every(
        ending, lambda m: m.register_forward_hook(lambda m, args, output: _scaled(output)) and None
    )


def pre_hook(ending: str) -> Change:
    """A hook of the user's that scales the first input, however it is passed."""

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0] * 0.6, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * 0.6}

    return every(ending, lambda m: m.register_forward_pre_hook(before, with_kwargs=True))


def replaced(ending: str) -> Change:
    """A method `forward` that the user put on the instance."""

    def change(module: Any) -> None:
        forward = module.forward
        module.forward = MethodType(
            lambda self, *args, **kwargs: _scaled(forward(*args, **kwargs)), module
        )

    return every(ending, change)


def attribute(ending: str, name: str, value: Any) -> Change:
    def change(module: Any) -> None:
        assert hasattr(module, name)
        setattr(module, name, value)

    return every(ending, change)


def times(ending: str, name: str, factor: float) -> Change:
    """Multiply a tensor of modules in place, without autograd's notice."""
    return every(ending, lambda module: getattr(module, name).data.mul_(factor))


def subclass(ending: str) -> Change:
    """Modules of a class of the user's, with another forward."""

    def change(module: Any) -> None:
        kind = type(module)

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _scaled(kind.forward(self, *args, **kwargs))

        module.__class__ = type(kind.__name__, (kind,), {"forward": forward})

    return every(ending, change)


def both(*changes: Change) -> Change:
    def apply(model: Any) -> Any:
        for change in changes:
            model = change(model)
        return model

    return apply


class Bent(nn.Module):
    """An unembedding that is not linear."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @property
    def weight(self) -> torch.Tensor:
        return self.inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 5 * torch.tanh(self.inner(x))


def _set_bias(head: Any) -> nn.Module:
    new = nn.Linear(head.in_features, head.out_features, bias=True)
    new.weight = head.weight
    with torch.no_grad():
        new.bias.copy_(torch.randn(len(new.bias), generator=torch.Generator().manual_seed(3)))
    return new


def _shared_layer(model: Any) -> Any:
    model.model.layers[1] = model.model.layers[0]
    model.config.use_cache = False  # both would write to one place of the cache
    return model


def _shorter(model: Any) -> Any:
    del model.model.layers[1]
    return model


def run_once(model: Any, **options: Any) -> Any:
    with torch.no_grad():
        model(torch.arange(5, 12)[None], **options)
    return model


def _unnamed(model: Any) -> Any:
    model.config.architectures = None
    return model


def _training(model: Any) -> Any:
    return model.train()


CHANGES: dict[str, tuple[str, Change]] = {
    # Adapters, on fused and on separate projections
    "adapter on gpt2's c_attn": ("gpt2", adapter("c_attn")),
    "adapter on gpt2's attn.c_proj": ("gpt2", adapter("attn.c_proj")),
    "adapter on gpt_neox's query_key_value": ("gpt_neox", adapter("query_key_value")),
    "adapter on bloom's query_key_value": ("bloom", adapter("query_key_value")),
    "adapter on falcon's query_key_value": ("falcon", adapter("query_key_value")),
    "adapter on phi3's qkv_proj": ("phi3", adapter("qkv_proj")),
    "adapter on phi3's gate_up_proj": ("phi3", adapter("gate_up_proj")),
    "adapter on llama's q_proj and v_proj": ("llama", both(adapter("q_proj"), adapter("v_proj"))),
    "adapter on llama's o_proj": ("llama", adapter("o_proj")),
    "adapter on llama's down_proj": ("llama", adapter("down_proj")),
    "adapter on llama's lm_head": ("llama", adapter("lm_head")),
    "adapter on mixtral's v_proj": ("mixtral", adapter("v_proj")),
    "adapter on gptj's v_proj": ("gptj", adapter("v_proj")),
    "adapter on mpt's Wqkv": ("mpt", adapter("Wqkv")),
    "parametrised q_proj of llama": ("llama", parametrised("q_proj")),
    "parametrised v_proj of llama": ("llama", parametrised("v_proj")),
    "parametrised c_attn of gpt2": ("gpt2", parametrised("c_attn")),
    # Hooks of the user's
    "hook on gpt2's attention": ("gpt2", hook("attn")),
    "hook on gpt2's c_attn": ("gpt2", hook("c_attn")),
    "hook on gpt2's ln_1": ("gpt2", hook("ln_1")),
    "hook on gpt2's mlp": ("gpt2", hook("mlp")),
    "hook on gpt2's last norm": ("gpt2", hook("ln_f")),
    "hook on llama's attention": ("llama", hook("self_attn")),
    "hook on llama's v_proj": ("llama", hook("v_proj")),
    "hook on llama's norms": ("llama", hook("input_layernorm")),
    "hook on llama's layers": ("llama", hook("layers.0")),
    "hook on llama's embedding": ("llama", hook("embed_tokens")),
    "hook on llama's unembedding": ("llama", hook("lm_head")),
    "hook on mixtral's attention": ("mixtral", hook("self_attn")),
    "hook on gemma2's norm after attention": ("gemma2", hook("post_attention_layernorm")),
    "hook on gpt_neox's attention": ("gpt_neox", hook("attention")),
    "hook before gpt2's attention": ("gpt2", pre_hook("attn")),
    "hook before llama's o_proj": ("llama", pre_hook("o_proj")),
    "hook before llama's mlp": ("llama", pre_hook("mlp")),
    "hook before llama's attention": ("llama", pre_hook("self_attn")),
    # Methods, classes and attributes that the user replaced
    "forward of llama's attention replaced": ("llama", replaced("self_attn")),
    "forward of llama's mlp replaced": ("llama", replaced("mlp")),
    "forward of llama's q_proj replaced": ("llama", replaced("q_proj")),
    "forward of llama's norm replaced": ("llama", replaced("norm")),
    "forward of gpt2's attention replaced": ("gpt2", replaced("attn")),
    "subclass of llama's attention": ("llama", subclass("self_attn")),
    "subclass of llama's norms": ("llama", subclass("input_layernorm")),
    "subclass of llama's v_proj": ("llama", subclass("v_proj")),
    "attention scale of llama changed": ("llama", attribute("self_attn", "scaling", 0.9)),
    "attention scale of gpt2 changed": ("gpt2", attribute("attn", "scaling", 0.9)),
    "norm epsilon of llama changed": ("llama", attribute("norm", "variance_epsilon", 0.5)),
    "activation of llama replaced": ("llama", attribute("mlp", "act_fn", nn.Tanh())),
    "last norm of llama removed": ("llama", every("norm", lambda module: nn.Identity())),
    "norm of llama replaced by a layer norm": (
        "llama",
        every("input_layernorm", lambda module: nn.LayerNorm(32)),
    ),
    "frequencies of llama's rope changed": ("llama", times("rotary_emb", "inv_freq", 0.5)),
    "unembedding of llama with a bias": ("llama", every("lm_head", _set_bias)),
    "unembedding of llama not linear": ("llama", every("lm_head", Bent)),
    "one layer of llama used twice": ("llama", _shared_layer),
    "one layer of llama deleted": ("llama", _shorter),
    # How the model was used before
    "llama in training mode": ("llama", _training),
    "llama in float64": ("llama", lambda model: model.double()),
    "llama without gradients": ("llama", lambda model: model.requires_grad_(False)),
    "llama with gradient checkpointing": (
        "llama",
        lambda model: model.gradient_checkpointing_enable() or model,
    ),
    "llama after output_hidden_states": ("llama", partial(run_once, output_hidden_states=True)),
    "opt after output_hidden_states": ("opt", partial(run_once, output_hidden_states=True)),
    "llama without architectures": ("llama", _unnamed),
    "gemma3 without architectures": ("gemma3", _unnamed),
    "gpt_oss without architectures": ("gpt_oss", _unnamed),
    "llama with eager attention": (
        "llama",
        lambda model: model.set_attn_implementation("eager") or model,
    ),
    "falcon:alibi with eager attention": (
        "falcon:alibi",
        lambda model: model.set_attn_implementation("eager") or model,
    ),
}
"""Name -> the row, and what is done to its model before it is loaded."""

PLACES = {
    "weight": "gpt2 c_attn, gpt2 ln_1, gpt_neox query_key_value, bloom query_key_value, "
    "falcon query_key_value, codegen qkv_proj, mpt Wqkv, phi3 qkv_proj, llama v_proj, "
    "llama lm_head, llama embed_tokens, phi3 gate_up_proj",
    "parameter": "gpt2 c_attn, llama v_proj, llama input_layernorm, mixtral o_proj",
    "output": "gpt2 attn, gpt2 c_attn, llama self_attn, llama v_proj, phi3 qkv_proj",
    "method": "llama mlp, llama q_proj, gpt2 c_attn",
    "scale": "llama self_attn, gpt2 attn",
}
"""What is changed after loading -> rows and modules."""
EDITS: dict[str, Callable[[Any], Any]] = {
    "weight": lambda module: module.weight.data.mul_(-1.3),
    "parameter": lambda module: setattr(
        module, "weight", nn.Parameter(module.weight.detach() * -1.3)
    ),
    "output": lambda module: module.register_forward_hook(lambda m, args, out: _scaled(out)),
    "method": lambda module: setattr(
        module, "forward", lambda x: 1.5 * type(module).forward(module, x)
    ),
    "scale": lambda module: setattr(module, "scaling", 0.9),
}
AFTER: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    f"{what} of {row}'s {ending} changed after loading": (row, ending, EDITS[what])
    for what, places in PLACES.items()
    for row, ending in map(str.split, places.split(", "))
}
"""Name -> the row, the modules, and what is done to each after a first run."""

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "short context": ("llama", {"max_position_embeddings": 48}),
    "short context, learned positions": ("gpt2", {"n_positions": 48}),
    "short context, dynamic rope": (
        "llama",
        {
            "max_position_embeddings": 48,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        },
    ),
    "short context, alibi": ("mpt", {"max_seq_len": 48}),
    "several end tokens": ("llama", {"eos_token_id": [2, 7, 8]}),
    "embedding larger than the tokenizer": ("llama", {"vocab_size": 512}),
    "embedding smaller than the tokenizer": ("llama", {"vocab_size": 60}),
    "no cache": ("llama", {"use_cache": False}),
    "attention outputs switched on": ("llama", {"output_attentions": True}),
    "hidden states switched on": ("llama", {"output_hidden_states": True}),
    "dropout": ("gpt2", {"embd_pdrop": 0.3, "attn_pdrop": 0.3, "resid_pdrop": 0.3}),
}
"""Name -> the row, and what its configuration says instead."""


def _changed_tokenizer(family: str, **settings: Any) -> Any:
    tokenizer = copy.deepcopy(tiny_tokenizer(family))
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    return tokenizer


def _always(tokenizer: Any, **settings: Any) -> Any:
    """Switch padding or truncation on in the tokenizer itself."""
    core = tokenizer.backend_tokenizer
    if "padding" in settings:
        core.enable_padding(**settings["padding"])
    if "truncation" in settings:
        core.enable_truncation(**settings["truncation"])
    return tokenizer


TOKENIZERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "tokenizer without a BOS": ("llama", lambda: tiny_tokenizer("gpt2")),
    "tokenizer of gemma": ("gemma3", lambda: tiny_tokenizer("gemma3")),
    "tokenizer that pads on the left": (
        "llama",
        lambda: _changed_tokenizer("llama", padding_side="left"),
    ),
    "tokenizer that always pads": (
        "llama",
        lambda: _always(_changed_tokenizer("llama"), padding={"pad_id": 3, "length": 12}),
    ),
    "tokenizer without a padding token": (
        "gpt2",
        lambda: _changed_tokenizer("gpt2", pad_token=None),
    ),
}
"""Name -> the row, and what makes its tokenizer."""


def _multimodal(kind: str) -> Any:
    text = rows.config_of({"gemma3": "gemma3", "llava": "llama", "mistral3": "mistral"}[kind])
    small = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    if kind == "gemma3":
        vision: Any = transformers.SiglipVisionConfig(**small, vision_use_head=False)
        config: Any = transformers.Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=4
        )
        model_kind: Any = transformers.Gemma3ForConditionalGeneration
    elif kind == "llava":
        vision = transformers.CLIPVisionConfig(**small)
        config = transformers.LlavaConfig(
            text_config=text, vision_config=vision, image_token_index=9
        )
        model_kind = transformers.LlavaForConditionalGeneration
    else:
        vision = transformers.PixtralVisionConfig(**{**small, "head_dim": 16})
        config = transformers.Mistral3Config(
            text_config=text, vision_config=vision, image_token_index=9
        )
        model_kind = transformers.Mistral3ForConditionalGeneration
    config.architectures = [model_kind.__name__]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return rows.filled(model_kind(config))


def _headless() -> Any:
    return transformers.GPT2Model(rows.config_of("gpt2")).eval()


OTHERS: dict[str, Callable[[], Any]] = {
    "gemma3, multimodal": partial(_multimodal, "gemma3"),
    "llava": partial(_multimodal, "llava"),
    "mistral3": partial(_multimodal, "mistral3"),
    "gpt2 without an unembedding": _headless,
}
"""Name -> what makes a model that has no row."""


def _changed(row: str, change: Change) -> Any:
    return change(rows.make(row))


def _configured(row: str, settings: dict[str, Any]) -> Any:
    return rows.make(row, **settings)


def _after(row: str, ending: str, change: Callable[[Any], Any]) -> Subject:
    """The subject whose modules are changed after loading and scoring."""

    def make() -> Any:
        return every(ending, change)(rows.make(row))

    def load(dtype: str = "float32") -> Any:
        plain = rows.make(row)
        parts = [getattr(parent, name) for parent, name in modules(plain, ending)]
        model = load_model(plain, tokenizer=rows.tokenizer_of(row), dtype=dtype, device="cpu")
        hijack(model, FACTS, doses=(1,), execution=Execution(store=False), quiet=True)
        for part in parts:
            change(part)
        return model

    return Subject(make, rows.tokenizer_of(row), load)


def subjects() -> dict[str, Subject]:
    """All special cases."""
    tokenizer = tiny_tokenizer("llama")
    made = {
        name: Subject.in_memory(partial(_changed, *case), tokenizer)
        for name, case in CHANGES.items()
    }
    for name, case in CONFIGS.items():
        made[name] = Subject.in_memory(partial(_configured, *case), tokenizer)
        if name.startswith("short"):
            made[name] = replace(made[name], doses=(0, 1))
    made |= {name: _after(*case) for name, case in AFTER.items()}
    for name, (row, tokens) in TOKENIZERS.items():
        made[name] = Subject.in_memory(partial(rows.make, row, vocab_size=len(tokens())), tokens())
    for name, make in OTHERS.items():
        made[name] = Subject.in_memory(make, tokenizer)
    return made
