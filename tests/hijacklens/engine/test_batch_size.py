"""Sizes of batches: what fits, what is left after it did not, and what counts as out of memory."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from hijacklens.engine import batch_size
from hijacklens.engine.batch_size import BatchSize
from hijacklens.engine.packs import separate
from hijacklens.engine.plan import Level
from hijacklens.engine.reading import Accounting
from hijacklens.engine.trie import Trie
from hijacklens.models import device_memory
from hijacklens.models.loading import load_model
from hijacklens.prompts.prefixes import prefix_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return load_model(tiny_model("llama"), tokenizer=tiny_tokenizer("llama"), device="cpu")


def level(lengths):
    """Packs of one leaf each that share nothing."""
    leaves = [tuple(range(i * 100, i * 100 + n)) for i, n in enumerate(lengths)]
    trie = Trie.of(map(prefix_of, leaves))
    return Level(trie, separate(trie))


def padded(batch):
    return len(batch) * max(sum(pack.computed for pack in row) for row in batch)


@pytest.mark.parametrize("fill", [True, False])
@pytest.mark.parametrize("tokens", [1, 30, 64, 1000])
def test_batches_hold_every_pack_once_and_keep_to_their_size(model, tokens, fill):
    packs = level([3, 40, 7, 7, 21, 1, 12, 33, 9, 2])
    batches = list(BatchSize(model, tokens).batches(packs, fill=fill))
    found = [pack for batch in batches for row in batch for pack in row]
    assert sorted(found, key=lambda pack: pack.first) == list(packs.packs)
    for batch in batches:
        assert padded(batch) <= tokens or len(batch) == 1 == len(batch[0])
        assert fill or all(len(row) == 1 for row in batch)


def test_short_packs_fill_the_rows_of_long_ones(model):
    batches = list(BatchSize(model, 300).batches(level([90, 40, 50, 30, 30, 30])))
    assert [sum(pack.computed for pack in row) for row in batches[0]] == [90, 90, 90]


def test_rows_of_one_length(model):
    size = BatchSize(model, 100)
    batches = list(size.batches(level([5, 3, 5, 3]), one_length=True, fill=False))
    assert [[pack.computed for row in batch for pack in row] for batch in batches] == [
        [5, 5],
        [3, 3],
    ]


def test_the_remaining_packs_are_cut_again_after_memory_ran_out(model):
    size = BatchSize(model, 100)
    packs = level([20] * 12)
    batches = size.batches(packs, fill=False)
    assert len(next(batches)) == 5
    size.shrink(100)
    rest = list(batches)
    assert (size.tokens, size.shrunk) == (50, 1)
    assert [len(batch) for batch in rest] == [2, 2, 2, 1]


def test_little_memory_makes_small_batches(model, monkeypatch):
    usual = BatchSize(model)
    assert usual.tokens == batch_size.BATCH_TOKENS["cpu"]
    trunk_tokens = usual.limits().trunk_tokens
    packs = level([20] * 80)
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: 2**21)
    small = BatchSize(model)
    widest = max(map(padded, small.batches(packs)))
    need = widest * batch_size.token_bytes(model.cfg, torch.float32, width=20)
    assert need <= 2**20 and widest < max(map(padded, usual.batches(packs)))
    assert small.reads < usual.reads and small.limits().trunk_tokens < trunk_tokens
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: None)
    unknown = BatchSize(model)
    assert (unknown.tokens, unknown.reads) == (usual.tokens, usual.reads)


def test_free_and_peak_memory_of_this_machine():
    assert device_memory.peak_bytes(CPU) > 2**20
    free = device_memory.free_bytes(CPU)
    assert free is None or free > 2**20
    assert device_memory.free_bytes(torch.device("meta")) is None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert device_memory.is_out_of_memory(error) == expected


def test_bytes_of_keys_and_values():
    config = SimpleNamespace(n_layers=3, n_heads=4, n_key_value_heads=2, d_head=8)
    assert batch_size.state_bytes(config, torch.bfloat16) == 2 * 3 * 2 * 8 * 2


def test_one_line_for_people():
    done = Accounting(
        sharing="cached",
        why="it costs least",
        forward_tokens=1000,
        padded_tokens=1100,
        naive_tokens=3000,
        trie_tokens=900,
        passes=2,
        batch_tokens=1024,
        shrunk=1,
        seconds=4.0,
        peak_memory=2**30,
    )
    assert done.record()["tokens_per_second"] == 250.0
    assert done.summary() == (
        "1,000 tokens computed; every prompt by itself has 3,000, with shared beginnings 900 "
        "at best; engine: cached (it costs least); "
        "250 tokens/s, peak memory 1,024 MiB, batches shrunk 1 times"
    )
