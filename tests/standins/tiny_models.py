"""Small random models of five families with tokenizers trained on the spot, for offline tests.

Weights are drawn wide enough that attention is far from uniform and logits differ by whole nats,
so that a wrong mask, position or target shows. LLaMA, Gemma, Gemma-2 and Gemma-3 have grouped
key/value heads (4 query heads, 2 key/value heads); Gemma-2 and -3 have a sliding window of 8.
"""

from __future__ import annotations

import tempfile
from functools import cache

import torch
import transformers
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

FAMILIES = ("gpt2", "llama", "gemma", "gemma2", "gemma3")
CONTEXT = 160
TEXTS = [
    "The Eiffel Tower is in the city of Paris",
    "Rome is the capital of Italy and the Colosseum is in the city of Rome",
    "Do not think of Guam. Do not think of London.",
    "The mother tongue of Danielle Darrieux is French or English",
    "Think of Tokyo, Berlin or Madrid. The weather was mild today.",
    " Paris Rome London Berlin Guam Tokyo French English Italy",
] * 8


@cache
def tiny_tokenizer(family: str) -> PreTrainedTokenizerBase:
    """GPT-2: byte-level, no BOS. LLaMA: leading-space marker, BOS. Gemma: no marker, BOS."""
    if family == "gpt2":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        special = ["<|endoftext|>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        names = {"bos_token": special[0], "eos_token": special[0], "unk_token": special[0]}
    else:
        bos, eos = ("<s>", "</s>") if family == "llama" else ("<bos>", "<eos>")
        core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        spaces = normalizers.Replace(" ", "▁")
        marked = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        core.normalizer = marked if family == "llama" else spaces
        core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        special = ["<unk>", bos, eos, "<pad>", *(f"<0x{i:02X}>" for i in range(256))]
        alphabet = []
        names = {"bos_token": bos, "eos_token": eos, "unk_token": "<unk>", "pad_token": "<pad>"}
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    if family != "gpt2":
        core.post_processor = processors.TemplateProcessing(
            single=f"{names['bos_token']} $A",
            special_tokens=[(names["bos_token"], core.token_to_id(names["bos_token"]))],
        )
    folder = tempfile.mkdtemp(prefix=f"tokenizer-{family}-")
    PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def tiny_model(family: str, *, seed: int = 0, layers: int = 2) -> PreTrainedModel:
    """A random plain Hugging Face model in evaluation mode; the same for a seed."""
    tokenizer = tiny_tokenizer(family)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=32,
            n_layer=layers,
            n_head=4,
            n_positions=CONTEXT,
            **ends,
        )
        kind = GPT2LMHeadModel
    else:
        shape = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": CONTEXT,
            "pad_token_id": tokenizer.pad_token_id,
            **ends,
        }
        window = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
        if family == "llama":
            config, kind = LlamaConfig(**shape, tie_word_embeddings=False), LlamaForCausalLM
        elif family == "gemma":
            config, kind = GemmaConfig(**shape, head_dim=16), GemmaForCausalLM
        elif family == "gemma2":
            config, kind = Gemma2Config(**shape, **window), Gemma2ForCausalLM
        else:
            config, kind = Gemma3TextConfig(**shape, **window), Gemma3ForCausalLM
    config.architectures = [kind.__name__]
    if family == "gemma2":  # the fused attention of older transformers leaves out the soft cap
        config._attn_implementation = "eager"
    return rough(kind(config), seed=seed)


def rough(model: PreTrainedModel, *, seed: int = 0) -> PreTrainedModel:
    """A model in evaluation mode with weights so large that every part of it matters."""
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * 0.17)
            else:
                parameter.add_(noise * 0.1)
    return model


SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def random_model(name: str, **options) -> PreTrainedModel:
    """A random plain model of an architecture, such as `Llama:LlamaForCausalLM`."""
    tokenizer = tiny_tokenizer("gpt2")
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = getattr(transformers, f"{name.split(':')[0]}Config")(
        vocab_size=len(tokenizer), **ends, **options
    )
    plain = getattr(transformers, name.split(":")[-1])(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in plain.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.17) if parameter.dim() > 1 else parameter.add_(noise * 0.1)
    return plain
