"""Fuzz: folders that a user names: saved results, one-layer models, checkpoints, stores, models."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sqlite3
import struct
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from campaign import campaign, holds, writing_only_below
from hostile import HOSTILE
from hypothesis import given
from hypothesis import strategies as st
from sample_facts import sample_facts
from tiny_models import tiny_model, tiny_tokenizer

import hijacklens as hl
from analyses.reproduction.reproduction import reproduce
from hijacklens import plots
from hijacklens.files import RECORD
from hijacklens.one_layer.checkpoint import FILE, Checkpoint
from hijacklens.one_layer.model import CONFIG_FILE, WEIGHTS_FILE, OneLayerTransformer
from hijacklens.one_layer.stacked_runs import StackedRuns, train_runs
from hijacklens.results.result import load_result
from hijacklens.scoring.comparison import compare
from hijacklens.store.contents import Store
from probes import geometry, heads, logit_lens, logit_shift, patching

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(HOSTILE)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=3,
)
TYPES = (
    "os:system",
    "hijacklens.results.result:Result",
    "hijacklens.scoring.result:HijackResult",
    "hijacklens.one_layer.trained:TrainingResult",
    "analyses.sweeps.run:SweepResult",
    "analyses.reproduction.reproduction:Reproduction",
    "probes.heads.ranking:HeadSearch",
    "probes.geometry.subspaces:PrincipalAngles",
)


@st.composite
def changed(draw: Any, record: Any) -> Any:
    """A JSON value with one place in it replaced or taken out."""
    if isinstance(record, dict) and record and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(list(record)))
        if draw(st.integers(0, 3)) == 0:
            return {k: v for k, v in record.items() if k != key}
        return {**record, key: draw(changed(record[key]))}
    if isinstance(record, list) and record and draw(st.integers(0, 4)):
        i = draw(st.integers(0, len(record) - 1))
        return [*record[:i], draw(changed(record[i])), *record[i + 1 :]]
    return draw(JSON)


@st.composite
def damaged(draw: Any, data: bytes) -> bytes:
    """Bytes that were cut short or have some changed."""
    if draw(st.booleans()):
        return data[: draw(st.integers(0, len(data)))]
    array = bytearray(data)
    for _ in range(draw(st.integers(1, 5))):
        place = draw(st.integers(0, max(0, len(array) - 1)))
        array[place : place + 2] = draw(st.binary(min_size=1, max_size=3))
    return bytes(array)


# ---------------------------------------------------------------- saved results


@pytest.fixture(scope="module")
def bridge():
    return hl.load_model(tiny_model("gpt2"), tokenizer=tiny_tokenizer("gpt2"))


@pytest.fixture(scope="module")
def trained():
    task = hl.ConceptTask(bits=3, length=16)
    return hl.train(
        task,
        d_model=8,
        seeds=2,
        steps=3,
        batch=8,
        learning_rates=(0.01,),
        evaluation=50,
        quiet=True,
    )


@pytest.fixture(scope="module")
def saved(bridge, trained, tmp_path_factory):
    """One small result of each kind, in a folder each."""
    facts, root = sample_facts().where(case_ids=[0, 1, 3, 7]), tmp_path_factory.mktemp("saved")
    scored = hl.hijack(bridge, facts, doses=[1], quiet=True)
    pairs = hl.pairs(bridge, facts)
    found = heads.search(bridge, pairs, size=1, candidates=2, quiet=True)
    results = {
        "hijack": scored,
        "parity": compare(scored, scored),
        "training": trained,
        "heads": found,
        "average": logit_shift.average(bridge, pairs, quiet=True),
        "trace": logit_shift.trace(bridge, pairs[0]),
        "patching": patching.sweep(bridge, pairs, patching.ByHead(), quiet=True),
        "lens": logit_lens.trace(bridge, pairs[0]),
        "inner products": geometry.fit(trained),
        "spectra": geometry.spectrum(trained),
        "lemma": reproduce("lemma5"),
    }
    with pytest.MonkeyPatch.context() as patch:
        # Nobody looks at the figures, and drawing them takes most of the time.
        patch.setattr(plots, "write", lambda figure, path: path.touch())
        for name, result in results.items():
            result.save(root / name)
    return root


def use(folder: Path) -> None:
    result = load_result(folder)
    assert repr(result)
    json.dumps(result.configuration(), default=str)
    result.to_dataframe()


def test_they_are_whole(saved):
    for folder in saved.iterdir():
        assert holds("results: as they are", lambda folder=folder: use(folder)) == "works"


@campaign(20, 1_500)
@given(data=st.data())
def test_results(data, saved, tmp_path_factory):
    name = data.draw(st.sampled_from(sorted(path.name for path in saved.iterdir())))
    folder = tmp_path_factory.mktemp("result", numbered=True) / "r"
    shutil.copytree(saved / name, folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".svg", ".png"))
    way = data.draw(st.sampled_from(["record", "record", "type", "bytes", "gone", "column"]))
    if way == "record":
        record = json.loads((folder / RECORD).read_text())
        (folder / RECORD).write_text(json.dumps(data.draw(changed(record))))
    elif way == "type":
        record = json.loads((folder / RECORD).read_text())
        (folder / RECORD).write_text(
            json.dumps({**record, "type": data.draw(st.sampled_from(TYPES))})
        )
    elif way == "column":
        for path in folder.glob("*.parquet"):
            table = pd.read_parquet(path)
            column = data.draw(st.sampled_from(list(table.columns)))
            if data.draw(st.booleans()):
                table = table.drop(columns=column)
            else:
                table[column] = data.draw(st.sampled_from(["x", 1.5, None, True]))
            table.to_parquet(path)
    else:
        path = data.draw(st.sampled_from(files))
        if way == "bytes":
            path.write_bytes(data.draw(damaged(path.read_bytes())))
        else:
            path.unlink()
    with writing_only_below(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        holds("saved results", lambda: use(folder))
    shutil.rmtree(folder.parent)


@pytest.mark.parametrize("kind", ["folder", "pipe", "deep", "missing", "link in a circle"])
def test_records_that_are_none(kind, tmp_path):
    path = tmp_path / RECORD
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "deep":
        path.write_text('{"type":' * 50_000 + "1" + "}" * 50_000)
    elif kind == "link in a circle":
        path.symlink_to(path)
    assert holds("results: records that are none", lambda: load_result(tmp_path)) == "refused"


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 5000, "~nobody", "\ud800"])
def test_names_of_folders(name, trained):
    assert holds("results: names", lambda: load_result(name)) == "refused"
    if name not in ("~nobody", "\ud800"):
        assert holds("results: names", lambda: trained.save(name)) == "refused"


# ---------------------------------------------------------------- one-layer models and checkpoints


@campaign(40, 3_000)
@given(data=st.data())
def test_one_layer_folders(data, trained, tmp_path_factory):
    folder = trained.models[0].save(tmp_path_factory.getbasetemp() / "one-layer")
    if data.draw(st.booleans()):
        record = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps(data.draw(changed(record))))
    else:
        name = data.draw(st.sampled_from([CONFIG_FILE, WEIGHTS_FILE]))
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(data.draw(damaged(content) | st.binary(max_size=40)))
    holds("one-layer folders", lambda: OneLayerTransformer.load(folder))


@campaign(20, 600)
@given(data=st.data())
def test_checkpoints(data, trained, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "checkpoint"
    folder.mkdir(exist_ok=True)
    runs = trained.recipe.runs(trained.task)
    checkpoint = Checkpoint(folder, {"steps": 64, "seeds": [0, 1]})

    def go_on() -> None:
        stacked = StackedRuns(runs, steps=64, batch=8)
        train_runs(stacked, checkpoint=checkpoint, checkpoint_seconds=0, quiet=True)

    if not (folder / "whole").exists():
        go_on()
        checkpoint.path.rename(folder / "whole")
    content = (folder / "whole").read_bytes()
    way = data.draw(st.sampled_from(["bytes", "header", "tensors", "other"]))
    if way == "bytes":
        content = data.draw(damaged(content))
    elif way == "header":
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        changed_header = json.dumps(data.draw(changed(header))).encode()
        content = struct.pack("<Q", len(changed_header)) + changed_header + content[8 + size :]
    elif way == "other":
        content = data.draw(st.binary(max_size=100))
    (folder / FILE).write_bytes(content)
    if way == "tensors":
        state = dict(checkpoint.load() or {})
        name = data.draw(st.sampled_from(sorted(state)))
        if data.draw(st.booleans()):
            del state[name]
        else:
            state[name] = torch.zeros(data.draw(st.sampled_from([0, 1, 3])))
        checkpoint.save(state)
    holds("checkpoints", go_on)


# ---------------------------------------------------------------- stores


@campaign(6, 300)
@given(data=st.data())
def test_stores(data, bridge, tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    path, facts = root / "readings.sqlite", sample_facts().where(case_ids=[0, 3])
    whole = tmp_path_factory.getbasetemp() / "whole.sqlite"
    if not whole.exists():
        hl.hijack(bridge, facts, doses=[1], execution=hl.Execution(store=whole), quiet=True)
        with sqlite3.connect(whole) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    expected = hl.hijack(
        bridge, facts, doses=[1], execution=hl.Execution(store=False), quiet=True
    ).items
    path.write_bytes(data.draw(damaged(whole.read_bytes()) | st.binary(max_size=200)))

    def door() -> None:
        Store(path).contents()
        found = hl.hijack(
            bridge, facts, doses=[1], execution=hl.Execution(store=path), quiet=True
        ).items
        pd.testing.assert_frame_equal(found, expected)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        holds("stores", door)  # a file that SQLite cannot even open is refused
    shutil.rmtree(root)


@pytest.mark.parametrize("kind", ["folder", "pipe", "below a file"])
def test_things_that_are_no_stores(kind, bridge, tmp_path):
    path = tmp_path / "store"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_text("")
        path = path / "store"
    facts = sample_facts()[:1]

    def door() -> None:
        hl.hijack(bridge, facts, doses=[1], execution=hl.Execution(store=path), quiet=True)

    assert holds("stores: no files", door) == "refused"


# ---------------------------------------------------------------- folders of language models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("gpt2").save_pretrained(where)
    tiny_tokenizer("gpt2").save_pretrained(where)
    return where


class Evil:
    """Unpickling one makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (open, (str(self.mark), "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("way", ["torch", "pickle"])
def test_pickled_weights_run_no_code(name, way, folder, tmp_path):
    mark, copy = tmp_path / "mark", tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "model.safetensors").unlink()
    weights = {"transformer.wte.weight": torch.zeros(2), "evil": Evil(mark)}
    if way == "torch":
        torch.save(weights, copy / name)
    else:
        (copy / name).write_bytes(pickle.dumps(Evil(mark)))
    assert holds("models: pickles", lambda: hl.load_model(copy), says=str(copy)) == "refused"
    assert not mark.exists()


def test_plain_pickled_weights_are_read_as_tensors(folder, tmp_path):
    """A `pytorch_model.bin` of tensors alone is an ordinary model."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "model.safetensors").unlink()
    torch.save(tiny_model("gpt2").state_dict(), copy / "pytorch_model.bin")
    assert holds("models: pickles", lambda: hl.load_model(copy)) == "works"


@campaign(6, 150)
@given(data=st.data())
def test_model_folders(data, folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    copy = root / "tiny"
    shutil.copytree(folder, copy)
    path = copy / data.draw(st.sampled_from(sorted(path.name for path in copy.iterdir())))
    way = data.draw(st.sampled_from(["json", "bytes", "gone"]))
    if way == "gone":
        path.unlink()
    elif way == "json" and path.suffix == ".json":
        path.write_text(json.dumps(data.draw(changed(json.loads(path.read_text())))))
    else:
        path.write_bytes(data.draw(damaged(path.read_bytes())))

    def door() -> None:
        hl.hijack(hl.load_model(copy), sample_facts()[:1], doses=[1], quiet=True)

    holds("model folders", door)
    shutil.rmtree(root)
