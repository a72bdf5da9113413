"""Model folders made to run code, to hang or to fill the memory; facts with hostile texts."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from campaign import holds, writing_only_below
from hostile import HOSTILE
from safetensors.torch import load_file, save_file
from sample_facts import sample_facts
from tiny_models import tiny_model, tiny_tokenizer

import hijacklens as hl
from hijacklens.facts.records import facts_from_records

CODE = "import pathlib\npathlib.Path({mark!r}).touch()\n"
JINJA = "{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}{{% set x = open({mark!r}, 'w') %}}"


class Evil:
    """Unpickling one makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (open, (str(self.mark), "w"))


def config(**changes: Any) -> Callable[[Path, Path], None]:
    def change(folder: Path, mark: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def with_code(key: str, file: str, module: str) -> Callable[[Path, Path], None]:
    """A file of the folder names code that comes with it."""

    def change(folder: Path, mark: Path) -> None:
        (folder / f"{module}.py").write_text(CODE.format(mark=str(mark)))
        path = folder / file
        record = json.loads(path.read_text()) if path.exists() else {}
        names = {
            "AutoConfig": f"{module}.C",
            "AutoModelForCausalLM": f"{module}.M",
            "AutoTokenizer": [f"{module}.T", f"{module}.T"],
        }
        path.write_text(json.dumps(record | {key: names}))

    return change


def text(file: str, content: str) -> Callable[[Path, Path], None]:
    return lambda folder, mark: (folder / file).write_text(content.format(mark=str(mark))) and None


def raw(file: str, content: bytes) -> Callable[[Path, Path], None]:
    return lambda folder, mark: (folder / file).write_bytes(content) and None


def link(file: str, target: str) -> Callable[[Path, Path], None]:
    def change(folder: Path, mark: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to(target)

    return change


def pipe(file: str) -> Callable[[Path, Path], None]:
    def change(folder: Path, mark: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        os.mkfifo(folder / file)

    return change


def pickled(file: str, index: bool = False) -> Callable[[Path, Path], None]:
    def change(folder: Path, mark: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / file).write_bytes(pickle.dumps(Evil(mark)))
        if index:
            record = {"metadata": {}, "weight_map": {"model.norm.weight": file}}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(record))

    return change


def shards(name: str) -> Callable[[Path, Path], None]:
    """An index whose shards are elsewhere."""

    def change(folder: Path, mark: Path) -> None:
        names = list(load_file(folder / "model.safetensors"))
        (folder / "model.safetensors").unlink()
        record = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(record))

    return change


def header(size: int, content: bytes = b"{}") -> Callable[[Path, Path], None]:
    return raw("model.safetensors", struct.pack("<Q", size) + content)


def one_tensor(dtype: str, shape: list[int], end: int) -> Callable[[Path, Path], None]:
    found = {"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}
    content = json.dumps(found).encode()
    return header(len(content), content + bytes(8))


def weights(value: float) -> Callable[[Path, Path], None]:
    def change(folder: Path, mark: Path) -> None:
        found = load_file(folder / "model.safetensors")
        found["model.layers.0.mlp.up_proj.weight"].fill_(value)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return change


FOLDERS: dict[str, Callable[[Path, Path], Any]] = {
    "auto_map": with_code("auto_map", "config.json", "evil"),
    "auto_map of a tokenizer": with_code("auto_map", "tokenizer_config.json", "evil"),
    "auto_map of an unknown type": lambda folder, mark: (
        with_code("auto_map", "config.json", "evil")(folder, mark),
        config(model_type="evil")(folder, mark),
    ),
    "auto_map elsewhere": config(auto_map={"AutoModelForCausalLM": "../evil.M"}),
    "auto_map of a hub": config(auto_map={"AutoModelForCausalLM": "evil/evil--evil.M"}),
    "custom_generate": text("generate.py", CODE),
    "custom pipelines": config(custom_pipelines={"x": {"impl": "evil.P", "pt": ["evil.M"]}}),
    "generation config": text("generation_config.json", '{{"custom_generate": "evil"}}'),
    "hub kernel": config(attn_implementation="evil/kernel"),
    "hub kernel, private": config(_attn_implementation="evil/kernel"),
    "experts kernel": config(experts_implementation="evil/kernel"),
    "adapter": text("adapter_config.json", '{{"base_model_name_or_path": "evil"}}'),
    "chat template": text("chat_template.jinja", JINJA),
    "chat template of the tokenizer": text(
        "tokenizer_config.json", '{{"chat_template": "{{{{ x.__class__ }}}}"}}'
    ),
    "tokenizer class": text("tokenizer_config.json", '{{"tokenizer_class": "os.system"}}'),
    "tokenizer of a pipe": pipe("tokenizer_config.json"),
    "tokenizer, empty": text("tokenizer.json", ""),
    "tokenizer, deep": text("tokenizer.json", "[" * 100_000),
    "tokenizer, other": text("tokenizer.json", '{{"version": "1.0", "model": {{"type": "x"}}}}'),
    "config, deep": text("config.json", '{{"a":' * 50_000),
    "config, list": text("config.json", "[]"),
    "config, pipe": pipe("config.json"),
    "config, itself": link("config.json", "config.json"),
    "config, /dev/zero": link("config.json", "/dev/null"),
    "type with a path": config(model_type="../../evil"),
    "type, a number": config(model_type=7),
    "architecture": config(architectures=["os.system"]),
    "vocabulary, negative": config(vocab_size=-1),
    "vocabulary, text": config(vocab_size="; touch x"),
    "heads, none": config(num_attention_heads=0),
    "layers, a million": config(num_hidden_layers=1_000_000),
    "width, huge": config(hidden_size=10**9),
    "dtype": config(dtype="os.system"),
    "rope": config(rope_parameters={"rope_type": "evil", "rope_theta": float("nan")}),
    "quantised": config(quantization_config={"quant_method": "evil"}),
    "bitsandbytes": config(quantization_config={"quant_method": "bitsandbytes"}),
    "pickle": pickled("pytorch_model.bin"),
    "pickle in a shard": pickled("evil.bin", index=True),
    "pickle as safetensors": lambda folder, mark: (folder / "model.safetensors").write_bytes(
        pickle.dumps(Evil(mark))
    ),
    "shards above": shards("../../evil.safetensors"),
    "shards, absolute": shards("/etc/passwd"),
    "header, huge": header(2**62),
    "header, no JSON": header(8, b"not JSON"),
    "tensor beyond the file": one_tensor("F32", [10**9], 4 * 10**9),
    "tensor, overflow": one_tensor("F32", [2**62, 8], 8),
    "tensor, unknown type": one_tensor("EVIL", [2], 8),
    "weights, pipe": pipe("model.safetensors"),
    "weights, NaN": weights(float("nan")),
    "weights, infinite": weights(float("inf")),
}
QUICK = ("auto_map", "pickle", "shards above", "layers, a million")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "whole"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer("llama").save_pretrained(folder)
    score(folder)  # what is imported late is imported here
    return folder


def score(folder: Path) -> None:
    hl.hijack(
        hl.load_model(folder), sample_facts()[:2], doses=[1], quiet=True,
        execution=hl.Execution(store=False),
    )  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in FOLDERS],
)
def test_a_hostile_model_folder_runs_nothing(kind, whole, tmp_path):
    folder, mark = tmp_path / "deep" / "er" / "tiny", tmp_path / "mark"
    shutil.copytree(whole, folder)
    (tmp_path / "deep" / "evil.py").write_text(CODE.format(mark=str(mark)))
    FOLDERS[kind](folder, mark)

    with writing_only_below(folder):
        holds("hostile model folders", lambda: score(folder))
    assert not mark.exists()


FIELDS = ("subject", "target_true", "target_false", "relation_id", "template")


def test_hostile_facts_are_text_or_are_skipped(whole):
    """Every hostile text in every field; what can be scored keeps its texts."""
    good = {"relation_id": "P36", "subject": "Italy", "template": "The capital of {} is",
            "target_true": "Rome", "target_false": "Tokyo"}  # fmt: skip
    records = [
        {**good, "case_id": i * len(HOSTILE) + j, field: bad}
        for i, field in enumerate(FIELDS)
        for j, bad in enumerate(HOSTILE)
    ]
    assert len(records) >= 135
    for record in records:
        holds("hostile facts", lambda record=record: facts_from_records([record], name="hostile"))
    facts = facts_from_records([{**good, "case_id": 999}, *records], name="hostile")
    assert len(facts) + len(facts.skipped) == len(records) + 1
    assert len(facts) > 60
    for fact in facts:
        assert "__class__" not in fact.prompt and "/root" not in fact.prompt
    model = hl.load_model(whole)
    scored = hl.hijack(
        model, facts.where(relation="P36"), doses=[1], quiet=True,
        execution=hl.Execution(store=False),
    )  # fmt: skip
    texts = {fact.case_id: fact.subject for fact in facts}
    assert all(texts[row.case_id] == row.subject for row in scored.items.itertuples())
