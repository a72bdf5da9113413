"""Tiny models that answer to the names of real ones, so that pages can be run as they stand.

A stand-in has as many layers and heads as the model it stands in for, and a vocabulary of whole
words of the atlas, so that prompts have about as many tokens. Its weights are random.
"""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from typing import Any

import torch
from hub_server import HubServer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hijacklens.facts.atlas import atlas
from hijacklens.facts.fact import FactSet
from hijacklens.models.packaged import PACKAGED, PackagedModel

LAYERS_AND_HEADS = {
    "smollm2-135m": (30, 9, 3),
    "gemma3-270m": (18, 4, 1),
    "gpt2": (12, 12, 12),
    "EleutherAI/pythia-160m": (12, 12, 12),
}
"""Name -> layers, query heads, key/value heads."""
LOADING = (
    "hijacklens",
    "hijacklens.models.loading",
    "hijacklens.workers.replica",
    "analyses.reproduction.workbench",
)
"""Modules that name `load_model`."""
MOST_FACTS = 8


@functools.cache
def _tokenizer() -> PreTrainedTokenizerFast:
    facts = atlas()
    texts = [
        f"{fact.prompt} {target}. Do not think of {target}."
        for fact in facts
        for target in (fact.target_true, fact.target_false)
    ]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=end, eos_token=end, unk_token=end
    )


def write_model(name: str, folder: Path) -> Path:
    """A folder with the stand-in of a name, as `save_pretrained` writes one."""
    layers, heads, kv_heads = LAYERS_AND_HEADS[name]
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=4 * heads,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def counterfact_records() -> list[dict[str, Any]]:
    """A few facts of the atlas in the layout of `counterfact.json`."""
    return [
        {
            "case_id": fact.case_id,
            "requested_rewrite": {
                "prompt": fact.template,
                "relation_id": fact.relation_id,
                "target_new": {"str": fact.target_false, "id": "Q0"},
                "target_true": {"str": fact.target_true, "id": "Q1"},
                "subject": fact.subject,
            },
        }
        for fact in atlas().where(relation=["P36", "P103", "P190"])[::9]
    ]


class StandIns:
    """The models by name, each made and loaded once."""

    def __init__(self, root: Path) -> None:
        """Take a folder to make them in."""
        self.root = root
        self.loaded: dict[Any, Any] = {}
        self.load_model = importlib.import_module("hijacklens.models.loading").load_model
        self.counterfact = root / "counterfact.json"
        self.counterfact.write_text(json.dumps(counterfact_records()), encoding="utf-8")

    def folder(self, name: str) -> Path:
        """Where the stand-in of a name lies."""
        place = self.root / name.replace("/", "--")
        return place if place.exists() else write_model(name, place)

    def load(self, source: Any, **options: Any) -> Any:
        """What `load_model` gives, with stand-ins for the names that are known."""
        if source not in PACKAGED:
            return self.load_model(source, **options)
        key = (source, *sorted(options.items(), key=str))
        if key not in self.loaded:
            self.loaded[key] = self.load_model(source, **options)
        return self.loaded[key]

    def serve(self, hub: HubServer) -> None:
        """Put the repositories that pages name on the hub."""
        for name in "gpt2", "EleutherAI/pythia-160m":
            hub.add(name, self.folder(name), tags=["step1000"])
        hub.add("meta-llama/Llama-2-7b-hf", {"config.json": "{}"}, gated=True)
        code = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
        tokenizer = self.folder("gpt2").glob("tokenizer*")
        files = {path.name: path.read_bytes() for path in tokenizer}
        hub.add("somebody/own-code", {**files, "config.json": json.dumps(code), "own.py": ""})

    def install(self, patch: Any) -> None:
        """Put them in place with a `monkeypatch`, and keep sets of facts small."""
        patch.setattr(PackagedModel, "folder", lambda model: self.folder(model.name))
        patch.setattr(PackagedModel, "installed", True)
        patch.setattr(PackagedModel, "revision", "a stand-in of the tests")
        # All are imported before one is patched: an import would keep the stand-in for good.
        for module in [importlib.import_module(name) for name in LOADING]:
            patch.setattr(module, "load_model", self.load)
        patch.setenv("HIJACKLENS_COUNTERFACT", str(self.counterfact))
        for name in ("sample", "limit"):
            patch.setattr(FactSet, name, _small(getattr(FactSet, name)))


def _small(method: Any) -> Any:
    def few(self: FactSet, n: int | None, **options: Any) -> FactSet:
        return method(self, min(MOST_FACTS, len(self) if n is None else n), **options)

    return few
