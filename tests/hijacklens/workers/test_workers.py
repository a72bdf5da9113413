"""One worker or several, some of them killed: the items of a run in this process."""

from __future__ import annotations

import shutil
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pretend_ray import Died, PretendRay
from sample_facts import sample_facts
from tiny_models import tiny_model, tiny_tokenizer

from hijacklens.engine.reading import ReadOptions, Requests
from hijacklens.engine.trie import Trie
from hijacklens.errors import InputError
from hijacklens.models.loading import load_model
from hijacklens.probe import HookProbe
from hijacklens.scoring.execution import Execution
from hijacklens.scoring.hijack import hijack
from hijacklens.store.contents import Store
from hijacklens.workers import cluster
from hijacklens.workers.cluster import Allocation, allocate, connected
from hijacklens.workers.replica import ModelLoader
from hijacklens.workers.workers import Replicas, count_parts, cut_parts
from probes import attention

DOSES = (0, 1, 2)
TEN_CORES = [{"Alive": True, "Resources": {"CPU": 10.0}}]
MIXED = [
    {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}},
    {"Alive": True, "Resources": {"CPU": 3.0, "GPU": 1.0}},
    {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model("llama").save_pretrained(path)
    tiny_tokenizer("llama").save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder, device="cpu")


def score(model, engine="local", store=False, sharing="auto", probes=()):
    execution = Execution(engine=engine, store=store, sharing=sharing, batch_tokens=100)
    return hijack(
        model, sample_facts(), doses=DOSES, probes=probes, execution=execution, quiet=True
    )


@pytest.fixture(scope="module")
def expected(model):
    return score(model)


def check(result, expected):
    pd.testing.assert_frame_equal(result.items, expected.items, atol=1e-4, rtol=0)
    pd.testing.assert_frame_equal(result.skipped, expected.skipped)


def engine_record(result):
    return result.settings.models[0].engine.record()


# Parts

prefixes = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)


@given(st.dictionaries(prefixes, st.sets(st.integers(0, 9)), max_size=40), st.integers(1, 9))
def test_parts_hold_everything_once(wanted, count):
    parts = cut_parts(Requests.of(wanted), count)
    assert len(parts) <= count
    prefixes_of_parts = [prefix for part in parts for prefix in part.requests]
    assert sorted(prefixes_of_parts) == sorted(wanted)
    assert all(
        set(part.requests[prefix]) == wanted[prefix] for part in parts for prefix in part.requests
    )
    assert all(
        part.requests and part.cost == Trie.of(part.requests.prefixes).nodes for part in parts
    )
    apart = cut_parts(Requests.of(wanted), count, shared=False)
    assert sum(part.cost for part in apart) == sum(map(len, wanted))


def test_parts_are_even_and_cut_between_subtrees():
    wanted = {(group, *range(20), leaf): {0} for group in range(8) for leaf in range(10)}
    parts = cut_parts(Requests.of(wanted), 4)
    assert [part.cost for part in parts] == [2 * 31] * 4
    assert all(len({prefix[0] for prefix in part.requests}) == 2 for part in parts)
    assert cut_parts(Requests.of({}), 3) == []


def test_parts_are_many_enough_to_balance_and_not_too_small():
    wanted = Requests.of({(i, 0): {0} for i in range(5_000)})
    assert count_parts(wanted, workers=2, batch_tokens=10_000) == 2
    assert count_parts(wanted, workers=2, batch_tokens=1_000) == 8
    assert count_parts(wanted, workers=2, batch_tokens=2_000) == 5
    assert count_parts(wanted, workers=1, batch_tokens=10) == 63


# Allocations


@pytest.mark.parametrize(
    ("nodes", "options", "allocation"),
    [
        (TEN_CORES, {}, Allocation(2, 4, 0)),
        (TEN_CORES, {"workers": 3}, Allocation(3, 3, 0)),
        (TEN_CORES, {"cpus": 0.5, "workers": 20}, Allocation(20, 0.5, 0)),
        (MIXED, {}, Allocation(3, 1, 1)),
        (MIXED, {"workers": 2}, Allocation(2, 1, 1)),
        (MIXED, {"gpus": 2}, Allocation(1, 1, 2)),
        (MIXED, {"gpus": 0}, Allocation(2, 4, 0)),
        (MIXED, {"gpus": 0, "workers": 3}, Allocation(3, 3, 0)),
    ],
)
def test_allocations(nodes, options, allocation):
    assert allocate(nodes, **options) == allocation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers must be at least 1, not 0"),
        ({"cpus": -1.0}, "cpus must be at least 0"),
        ({"workers": 11}, "no room for 11 workers of 1 cores and 0 GPUs: the cluster has 10 cores"),
        ({"gpus": 1}, "no room for 1 workers of 1 cores and 1 GPUs"),
        ({"cpus": 0.0}, "needs part of a core or of a GPU"),
    ],
)
def test_no_room(options, message):
    with pytest.raises(InputError, match=message):
        allocate(TEN_CORES, **options)


def test_without_ray_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'hijacklens\[ray\]'"), connected():
        pass


@pytest.fixture
def unstarted(monkeypatch):
    """A Ray that fails to start with the error in its list."""
    errors: list[Exception] = []

    def init(**options):
        raise errors[0]

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray = SimpleNamespace(is_initialized=lambda: False, init=init)
    monkeypatch.setitem(sys.modules, "ray", ray)
    return errors


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(None, "refused"), (b"SSH-2.0-x\r\n", "another service"), (b"", "timed out")],
)
@pytest.mark.parametrize("variable", [False, True])
def test_an_address_without_a_cluster_is_refused_in_seconds(
    answer, reason, variable, unstarted, monkeypatch
):
    """Ray itself waits for minutes, whether nothing listens there or something else does."""
    monkeypatch.setattr(cluster, "SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        if answer is None:
            server.close()
        else:
            threading.Thread(target=_answering, args=(server, answer), daemon=True).start()
        if variable:
            monkeypatch.setenv("RAY_ADDRESS", address)
        refused = f"no Ray cluster at '{address}' could be joined: .*{reason}.*ray start --head"
        with (
            pytest.raises(InputError, match=refused),
            connected(None if variable else address),
        ):
            pass


def _answering(server, answer):
    with suppress(OSError):
        connection, _ = server.accept()
        connection.sendall(answer)
        time.sleep(1)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(2, "No such file or directory"),
        NotADirectoryError(20, "Not a directory"),
        OSError("AF_UNIX path length cannot exceed 107 bytes"),
    ],
)
def test_a_folder_that_ray_cannot_use_is_refused(error, unstarted):
    """RAY_TMPDIR or TMPDIR is missing, a file, or too long for a socket."""
    unstarted.append(error)
    with pytest.raises(InputError, match=r"cannot be started.*RAY_TMPDIR=/tmp"), connected():
        pass


# Replicas, on a Ray that is pretended


def replicas(folder, fate=lambda method, arguments: None, *, workers=2):
    crew = Replicas(PretendRay(fate), ModelLoader(folder), Allocation(workers, 1, 0), attempts=3)
    crew.start()
    return crew


@pytest.mark.parametrize("workers", [1, 2])
def test_same_items_with_any_number_of_workers(folder, expected, workers):
    crew = replicas(folder, workers=workers)
    result = score(ModelLoader(folder), crew)
    check(result, expected)
    record, alone = engine_record(result), engine_record(expected)
    assert f"{workers} Ray workers" in record["why"]
    assert record["naive_tokens"] == alone["naive_tokens"]
    assert record["trie_tokens"] == alone["trie_tokens"] <= record["forward_tokens"]


def test_same_items_with_probes(folder, model):
    probes = [attention.knock_out(source="last", target="hijack")]
    crew = replicas(folder)
    check(score(model, crew, probes=probes), score(model, probes=probes))
    check(score(model, crew, sharing="plain"), score(model))


def test_a_dead_worker_is_replaced_and_its_part_read_again(folder, expected):
    reads = []

    def fate(method, arguments):
        if method == "read":
            reads.append(1)
            if len(reads) in (2, 3, 5):
                raise Died("killed")

    crew = replicas(folder, fate)
    result = score(ModelLoader(folder), crew)
    check(result, expected)
    assert crew.replaced == 3
    assert "3 of them replaced" in engine_record(result)["why"]


def test_a_part_that_kills_every_worker_ends_the_run_and_keeps_the_rest(
    folder, model, expected, tmp_path
):
    store = Store(tmp_path / "s.sqlite")
    deadly, store_is_resumed = [], []

    def fate(method, arguments):
        if method == "read":
            first = min(arguments[1])
            deadly.append(first)
            if first in deadly[2:3] and not store_is_resumed:
                raise Died("killed")

    crew = replicas(folder, fate, workers=1)
    with pytest.raises(InputError, match="3 workers died one after the other of the same"):
        score(ModelLoader(folder), crew, store)
    kept = store.count()
    assert kept > 0
    store_is_resumed.append(True)
    result = score(ModelLoader(folder), crew, store)  # the same workers continue
    check(result, expected)
    assert result.settings.models[0].readings.from_store == kept
    # A run in this process finds what workers kept: the fingerprint is the same.
    assert score(model, store=store).settings.models[0].readings.computed == 0


def test_workers_that_die_while_they_load_end_the_run(folder):
    def fate(method, arguments):
        raise Died("out of memory")

    with pytest.raises(InputError, match="as they loaded the model"):
        replicas(folder, fate)


def test_errors_of_a_worker_are_raised_as_they_are(folder, expected):
    def broken(value, hook):
        raise ZeroDivisionError("mine")

    crew = replicas(folder)
    with pytest.raises(ZeroDivisionError, match="mine"):
        score(ModelLoader(folder), crew, probes=[HookProbe("b", [("embed.hook_out", broken)])])
    with pytest.raises(InputError, match="unknown hook 'no'"):
        score(ModelLoader(folder), crew, probes=[HookProbe("c", [("no", broken)])])
    check(score(ModelLoader(folder), crew), expected)  # nothing is left of the runs before
    with pytest.raises(InputError, match="at least 1 token"):
        crew.read({(1, 2): {3}}, ReadOptions(batch_tokens=0))


def test_another_model_is_refused(folder, tmp_path):
    changed = load_model(folder, device="cpu")
    with torch.no_grad():
        next(iter(changed.parameters()))[0, 0] += 1
    crew = replicas(folder)
    with pytest.raises(InputError, match="they differ in weights"):
        score(changed, crew)
    with pytest.raises(InputError, match="not that of"):
        score(ModelLoader(folder, dtype="bfloat16"), crew)


def test_a_replacement_with_another_model_is_refused(folder, tmp_path):
    """The folder changes before the first worker dies."""
    shutil.copytree(folder, tmp_path / "model")

    def fate(method, arguments):
        if method == "read":
            tiny_model("llama", seed=7).save_pretrained(tmp_path / "model")
            raise Died("killed")

    crew = replicas(str(tmp_path / "model"), fate, workers=1)
    with pytest.raises(InputError, match="they differ in weights"):
        score(ModelLoader(str(tmp_path / "model")), crew)


def test_hooks_that_are_no_probes_are_refused(folder):
    model = load_model(folder, device="cpu")
    model.hook_dict["blocks.0.hook_resid_pre"].add_hook(lambda value, hook: None)
    with pytest.raises(InputError, match="may lack a hook"):
        score(model, replicas(folder))


def test_loaders(folder, model, monkeypatch, tmp_path):
    assert ModelLoader.of(model) == ModelLoader(folder, device="cpu")
    made = load_model(tiny_model("gpt2"), tokenizer=tiny_tokenizer("gpt2"), device="cpu")
    made.original_model.config._name_or_path = ""
    with pytest.raises(InputError, match="made in memory"):
        ModelLoader.of(made)
    monkeypatch.chdir(Path(folder).parent)
    assert ModelLoader("tiny-llama").sent() == ModelLoader(str(Path(folder).resolve()))
    assert ModelLoader("owner/name").sent() == ModelLoader("owner/name")
    with pytest.raises(InputError, match="unknown engine 'spark'"):
        score(model, "spark")


def test_a_loader_is_enough_for_the_local_engine(folder, expected):
    check(score(ModelLoader(folder, device="cpu")), expected)
