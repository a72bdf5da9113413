"""A tiny LLaMA in which one query head alone carries a hijack, and facts that it is hijacked on.

The head attends to all tokens alike and answers a target with that target: its values tell eight
target tokens apart, and its output writes the answer's unembedding. MLPs write nothing and other
heads little or nothing; head 3 shares the planted head's key/value head, so it has its values.
"""

from __future__ import annotations

import torch
from tiny_models import tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from hijacklens.facts.fact import Fact, FactSet

PLANTED = (1, 2)
"""Layer and query head."""
TARGETS = ("Paris", "Rome", "London", "Berlin", "Guam", "Tokyo", "French", "English")
TEMPLATES = {
    "P131": "The {} is in the city of",
    "P36": "The capital of {} is",
    "P103": "The mother tongue of {} is",
}
SUBJECTS = ("Eiffel Tower", "Colosseum", "Italy", "Danielle Darrieux", "Big Ben", "Madrid")


def planted_facts() -> FactSet:
    """Three relations with six facts each; what is true is drawn by turns, and no matter."""
    facts = [
        Fact(
            case_id=len(SUBJECTS) * i + j,
            relation_id=relation,
            subject=subject,
            template=template,
            target_true=TARGETS[(i + 3 * j) % 8],
            target_false=TARGETS[(i + 3 * j + 1 + j % 3) % 8],
        )
        for i, (relation, template) in enumerate(TEMPLATES.items())
        for j, subject in enumerate(SUBJECTS)
    ]
    return FactSet(tuple(facts), name="planted")


def planted_model(*, others: float = 0.02, strength: float = 5.0) -> PreTrainedModel:
    """The plain model; `others` scales what the other heads write, from the tiny random model."""
    model = tiny_model("llama", layers=3)
    tokens = [tiny_tokenizer("llama")(f"x {target}").input_ids[-1] for target in TARGETS]
    parts = model.model
    layer, head = PLANTED
    with torch.no_grad():
        for block in parts.layers:
            block.mlp.down_proj.weight.zero_()
            block.self_attn.o_proj.weight.mul_(others)
        attention = parts.layers[layer].self_attn
        attention.q_proj.weight.zero_()  # the same attention to all tokens
        width = attention.head_dim
        kv_head = head // attention.num_key_value_groups
        seen = parts.layers[layer].input_layernorm(parts.embed_tokens.weight[tokens])
        values = slice(kv_head * width, (kv_head + 1) * width)
        attention.v_proj.weight[values] = torch.linalg.pinv(seen.T)  # target i has the value e_i
        answers = model.lm_head.weight[tokens] * parts.norm.weight
        own = slice(head * width, (head + 1) * width)
        attention.o_proj.weight[:, own] = strength * torch.linalg.pinv(answers)
    return model
