"""The rows of the matrix: one line for each family and each variant that matters.

A line names a class of transformers and what differs from the generic sizes, which are applied to
the attributes that a configuration has.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import transformers
from tiny_models import tiny_tokenizer

from analyses.conformance.cells import Subject

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "attention_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    "attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 256),
    "context_length": 256,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    "moe_num_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "sliding_window": 12,
    # Latent attention
    "kv_lora_rank": 12,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "query_pre_attn_scalar": 8,
    # State spaces
    **dict.fromkeys(("mamba_d_state", "state_size"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_headdim": 8,
    "time_step_rank": 4,
    # Gated delta nets
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0),
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
DENSE = {"num_key_value_heads": 4}
BIASES = {"attention_bias": True, "mlp_bias": True}
TIED = {"tie_word_embeddings": True}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.5],
    "long_factor": [2.0, 3.0, 4.0, 6.0],
    "original_max_position_embeddings": 40,
    "factor": 6.4,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def _rope(kind: Mapping[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": dict(kind)}


def _mixed(kind: str, other: str = "full_attention") -> dict[str, Any]:
    return {"layer_types": [kind, other]}


ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt2:inverse layer scale": (
        "GPT2LMHeadModel",
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    ),
    "gpt2:unscaled": ("GPT2LMHeadModel", {"scale_attn_weights": False}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", {"multi_query": True}),
    "gpt_bigcode:mha": ("GPTBigCodeForCausalLM", {"multi_query": False}),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {"attention_types": [[["global", "local"], 1]], "window_size": 12},
    ),
    "gpt_neo:global": ("GPTNeoForCausalLM", {"attention_types": [[["global"], 2]]}),
    "gpt_neox": ("GPTNeoXForCausalLM", {}),
    "gpt_neox:serial, no biases": (
        "GPTNeoXForCausalLM",
        {"use_parallel_residual": False, "attention_bias": False},
    ),
    "gptj": ("GPTJForCausalLM", {"rotary_dim": 4}),
    "codegen": ("CodeGenForCausalLM", {"rotary_dim": 4}),
    "openai-gpt": ("OpenAIGPTLMHeadModel", {}),
    "opt": ("OPTForCausalLM", {"word_embed_proj_dim": 32}),
    "opt:projected": ("OPTForCausalLM", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "xglm": ("XGLMForCausalLM", {}),
    "bloom": ("BloomForCausalLM", {}),
    "bloom:post-norm residual": (
        "BloomForCausalLM",
        {"apply_residual_connection_post_layernorm": True},
    ),
    "mpt": ("MptForCausalLM", {}),
    "mpt:clip": ("MptForCausalLM", {"attn_config": {"clip_qkv": 0.5}}),
    "falcon": ("FalconForCausalLM", {}),
    "falcon:serial, biases": (
        "FalconForCausalLM",
        {"parallel_attn": False, "bias": True, "multi_query": False, "num_kv_heads": 4},
    ),
    "falcon:grouped": (
        "FalconForCausalLM",
        {"new_decoder_architecture": True, "multi_query": False, "num_kv_heads": 2},
    ),
    "falcon:one norm": (
        "FalconForCausalLM",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon:alibi": ("FalconForCausalLM", {"alibi": True}),
    "llama": ("LlamaForCausalLM", {}),
    "llama:tied": ("LlamaForCausalLM", TIED),
    "llama:biases": ("LlamaForCausalLM", {**BIASES, **DENSE}),
    "llama:linear": (
        "LlamaForCausalLM",
        _rope({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
    ),
    "llama:dynamic": (
        "LlamaForCausalLM",
        _rope({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    ),
    "llama:llama3": ("LlamaForCausalLM", _rope(LLAMA3)),
    "llama:yarn": ("LlamaForCausalLM", _rope(YARN)),
    "llama:longrope": ("LlamaForCausalLM", _rope(LONG)),
    "mistral": ("MistralForCausalLM", {}),
    "mistral:no window": ("MistralForCausalLM", {"sliding_window": None}),
    "ministral3": ("Ministral3ForCausalLM", {}),
    "mixtral": ("MixtralForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2:window": ("Qwen2ForCausalLM", {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {}),
    "qwen2_moe:mixed": ("Qwen2MoeForCausalLM", {"mlp_only_layers": [0], "norm_topk_prob": True}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "qwen3:window": (
        "Qwen3ForCausalLM",
        {"use_sliding_window": True, "max_window_layers": 1, "attention_bias": True},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {}),
    "qwen3_moe:mixed": ("Qwen3MoeForCausalLM", {"mlp_only_layers": [1]}),
    "qwen3_next": ("Qwen3NextForCausalLM", _mixed("linear_attention")),
    "qwen3_5": ("Qwen3_5ForCausalLM", _mixed("linear_attention")),
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", _mixed("linear_attention")),
    "gemma": ("GemmaForCausalLM", {}),
    "gemma2": ("Gemma2ForCausalLM", {}),
    "gemma3": ("Gemma3ForCausalLM", _mixed("sliding_attention")),
    "gemma3:bidirectional": (
        "Gemma3ForCausalLM",
        {**_mixed("sliding_attention"), "use_bidirectional_attention": True},
    ),
    "gemma4": (
        "Gemma4ForCausalLM",
        {
            **_mixed("sliding_attention"),
            **{
                "vocab_size_per_layer_input": 420,
                "hidden_size_per_layer_input": 8,
                "global_head_dim": 8,
            },
        },
    ),
    "vaultgemma": ("VaultGemmaForCausalLM", {}),
    "recurrent_gemma": (
        "RecurrentGemmaForCausalLM",
        {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 64},
    ),
    "phi": ("PhiForCausalLM", DENSE),
    "phi:qk norm": ("PhiForCausalLM", {**DENSE, "qk_layernorm": True}),
    "phi3": ("Phi3ForCausalLM", {}),
    "phi3:no window": ("Phi3ForCausalLM", {"sliding_window": None, **DENSE}),
    "phi3:longrope": (
        "Phi3ForCausalLM",
        {**_rope({**LONG, "partial_rotary_factor": 1.0}), "original_max_position_embeddings": 40},
    ),
    "phimoe": ("PhimoeForCausalLM", {}),
    "persimmon": ("PersimmonForCausalLM", {}),
    "stablelm": ("StableLmForCausalLM", {}),
    "stablelm:parallel, biases, qk norm": (
        "StableLmForCausalLM",
        {"use_parallel_residual": True, "use_qkv_bias": True, "qk_layernorm": True},
    ),
    "olmo": ("OlmoForCausalLM", {}),
    "olmo:clip": ("OlmoForCausalLM", {"clip_qkv": 0.5}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "olmo3": ("Olmo3ForCausalLM", _mixed("sliding_attention")),
    "olmoe": ("OlmoeForCausalLM", {}),
    "flex_olmo": ("FlexOlmoForCausalLM", {}),
    "olmo_hybrid": ("OlmoHybridForCausalLM", _mixed("linear_attention")),
    "granite": (
        "GraniteForCausalLM",
        {
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.3,
        },
    ),
    "granite:ones": ("GraniteForCausalLM", {}),
    "granitemoe": (
        "GraniteMoeForCausalLM",
        {"logits_scaling": 2.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0},
    ),
    "granitemoehybrid:nope": (
        "GraniteMoeHybridForCausalLM",
        {"layer_types": ["mamba", "attention"], "position_embedding_type": "nope"},
    ),
    "granitemoehybrid:rope": (
        "GraniteMoeHybridForCausalLM",
        {"layer_types": ["mamba", "attention"], "position_embedding_type": "rope"},
    ),
    "cohere": ("CohereForCausalLM", {}),
    "cohere:qk norm": ("CohereForCausalLM", {"use_qk_norm": True, "logit_scale": 0.25}),
    "cohere2": ("Cohere2ForCausalLM", _mixed("sliding_attention")),
    "starcoder2": ("Starcoder2ForCausalLM", {}),
    "starcoder2:window": ("Starcoder2ForCausalLM", {"sliding_window": 12, "use_bias": False}),
    "smollm3": ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}),
    "nemotron": ("NemotronForCausalLM", {}),
    "glm": ("GlmForCausalLM", {}),
    "glm4": ("Glm4ForCausalLM", {}),
    "glm4_moe": ("Glm4MoeForCausalLM", {"first_k_dense_replace": 1}),
    "glm4_moe_lite": ("Glm4MoeLiteForCausalLM", {"head_dim": 4, **DENSE}),
    "gpt_oss": ("GptOssForCausalLM", _mixed("sliding_attention")),
    "seed_oss": ("SeedOssForCausalLM", {}),
    "ernie4_5": ("Ernie4_5ForCausalLM", {}),
    "ernie4_5_moe": (
        "Ernie4_5_MoeForCausalLM",
        {"moe_layer_start_index": 1, "moe_layer_end_index": 1},
    ),
    "exaone4": ("Exaone4ForCausalLM", _mixed("sliding_attention")),
    "apertus": ("ApertusForCausalLM", _rope(LLAMA3)),
    "arcee": ("ArceeForCausalLM", {}),
    "hunyuan": ("HunYuanDenseV1ForCausalLM", {}),
    "jais2": ("Jais2ForCausalLM", {}),
    "minimax_m2": ("MiniMaxM2ForCausalLM", {}),
    "llama4": ("Llama4ForCausalLM", {"interleave_moe_layer_step": 1}),
    "nanochat": ("NanoChatForCausalLM", {}),
    "afmoe": ("AfmoeForCausalLM", _mixed("sliding_attention")),
    "laguna": ("LagunaForCausalLM", _mixed("sliding_attention")),
    "modernbert_decoder": ("ModernBertDecoderForCausalLM", _mixed("sliding_attention")),
    "bitnet": ("BitNetForCausalLM", {}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", {"head_dim": 4, **DENSE}),
    "deepseek_v2:no q rank": (
        "DeepseekV2ForCausalLM",
        {"head_dim": 4, **DENSE, "q_lora_rank": None},
    ),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {"head_dim": 4, **DENSE, "first_k_dense_replace": 1}),
    "deepseek_v3:yarn": ("DeepseekV3ForCausalLM", {"head_dim": 4, **DENSE, **_rope(YARN)}),
    "youtu": ("YoutuForCausalLM", {"head_dim": 4, **DENSE}),
    "jamba": (
        "JambaForCausalLM",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    ),
    "bamba": ("BambaForCausalLM", {"attn_layer_indices": [1]}),
    "falcon_h1": ("FalconH1ForCausalLM", {"mamba_d_ssm": 64}),
    "lfm2": ("Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"]}),
    "lfm2_moe": (
        "Lfm2MoeForCausalLM",
        {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    ),
    "mamba": ("MambaForCausalLM", {}),
    "mamba2": ("Mamba2ForCausalLM", {"num_heads": 8, "n_groups": 1}),
    "falcon_mamba": ("FalconMambaForCausalLM", {}),
    "rwkv": ("RwkvForCausalLM", {}),
    "nemotron_h": (
        "NemotronHForCausalLM",
        {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8},
    ),
    "zamba2": (
        "Zamba2ForCausalLM",
        {
            "layers_block_type": ["mamba", "hybrid"],
            "attention_head_dim": 16,
            "attention_hidden_size": 64,
            **DENSE,
        },
    ),
    "hrm_text": ("HrmTextForCausalLM", {}),
    "jetmoe": ("JetMoeForCausalLM", {"kv_channels": 8}),
    "bert": ("BertLMHeadModel", {"is_decoder": False}),
    "bert:decoder": ("BertLMHeadModel", {"is_decoder": True}),
}


def config_of(name: str, **more: Any) -> Any:
    """The configuration of a row: the generic sizes, what its line says, and then `more`."""
    cls, overrides = ROWS[name]
    kind = getattr(transformers, cls).config_class
    has = set(kind().to_dict()) - set(kind.attribute_map)
    sizes = {key: value for key, value in {**SIZES, **TOKENS}.items() if key in has}
    config = kind(**{**sizes, "vocab_size": len(tokenizer_of(name)), **overrides, **more})
    config.architectures = [cls]
    return config


def tokenizer_of(name: str) -> Any:
    """A tiny tokenizer that puts a BOS."""
    return tiny_tokenizer("llama")


def filled(model: Any, *, scale: float = 0.25, seed: int = 0) -> Any:
    """Draw weights so wide that no attention is uniform and every bias and norm counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or "inv_freq" in name:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if isinstance(tensor, torch.nn.Parameter):
                tensor.copy_(noise * scale) if tensor.dim() > 1 else tensor.add_(noise * 0.2)
            elif "correction" in name or "expert_bias" in name:  # of routers
                tensor.add_(noise * 0.2)
    return model.eval()


def make(name: str, **more: Any) -> Any:
    """The plain model of a row; the same weights on every call."""
    config = config_of(name, **more)
    with torch.random.fork_rng():  # some small parameters keep their initial draw
        torch.manual_seed(0)
        return filled(getattr(transformers, ROWS[name][0])(config))


def subject(name: str) -> Subject:
    """The model of a row, as it is checked."""
    return Subject.in_memory(partial(make, name), tokenizer_of(name))
