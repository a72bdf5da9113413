"""Runs that are cut short, overlap or find a broken store end with the table of an unbroken run."""

from __future__ import annotations

import copy
import random
import resource
import sqlite3
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass

import pandas as pd
import pytest
import torch
from forked import finish, kill, start
from sample_facts import sample_facts
from tiny_models import tiny_model, tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from hijacklens.errors import InputError
from hijacklens.models.loading import load_model
from hijacklens.probe import HookProbe
from hijacklens.scoring import hijack as hijack_module
from hijacklens.scoring.execution import Execution
from hijacklens.scoring.hijack import hijack
from hijacklens.store.contents import Store
from hijacklens.store.database import StoreWarning, aside_from

DOSES = (0, 1, 2)


def load(family="gpt2", **options):
    return load_model(tiny_model(family), tokenizer=tiny_tokenizer(family), device="cpu", **options)


@pytest.fixture(scope="module")
def model():
    return load()


def score(model, store, **options):
    execution = Execution(store=store, batch_tokens=options.pop("batch_tokens", 100))
    options = {"facts": sample_facts(), "doses": DOSES, "quiet": True, **options}
    return hijack(model, execution=execution, **options)


@pytest.fixture(scope="module")
def unbroken(model):
    return score(model, False)


def counts(result):
    """How many readings came from the store, and how many were computed."""
    (record,) = result.settings.models
    return record.readings.from_store, record.readings.computed


def check(result, expected):
    """The same items, but for what float32 rounds when a prompt runs in another batch."""
    pd.testing.assert_frame_equal(result.items, expected.items, atol=1e-5, rtol=0)
    pd.testing.assert_frame_equal(result.skipped, expected.skipped)


def check_table(result, expected):
    """The same table, too."""
    check(result, expected)
    pd.testing.assert_frame_equal(result.full_summary, expected.full_summary, atol=1e-5, rtol=0)


class ForwardTokens(TorchDispatchMode):
    """The number of tokens of each forward pass, counted without a hook on the model."""

    def __init__(self, model, fail_at=None):
        super().__init__()
        self.vocab, self.fail_at = len(model.tokenizer), fail_at
        self.passes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.embedding.default and len(args[0]) == self.vocab:
            self.passes.append(args[1].numel())
            if len(self.passes) == self.fail_at:
                raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


@contextmanager
def forward_tokens(model):
    with ForwardTokens(model) as counted:
        yield counted.passes


def test_a_second_run_computes_nothing(model, unbroken, tmp_path):
    path = tmp_path / "s.sqlite"
    with forward_tokens(model) as passes:
        first = score(model, path)
    all_tokens = sum(passes)
    check(first, unbroken)
    assert counts(first)[0] == 0
    with forward_tokens(model) as passes:
        second = score(model, Store(path))
    assert 0 < sum(passes) < all_tokens / 5  # the check of a few stored readings
    assert counts(second) == (counts(first)[1], 0)
    pd.testing.assert_frame_equal(second.items, first.items)  # bit for bit
    (record,) = second.settings.models
    assert record.readings.store == str(path)
    assert record.readings.store_off == ""


def test_without_a_store_all_is_computed(model, unbroken, tmp_path, monkeypatch):
    monkeypatch.setenv("HIJACKLENS_CACHE", str(tmp_path))
    monkeypatch.delenv("HIJACKLENS_STORE")
    for _ in range(2):
        assert counts(score(model, False)) == counts(unbroken)
    assert counts(unbroken)[0] == 0
    assert list(tmp_path.iterdir()) == []
    usual = [counts(score(model, True)) for _ in range(2)]  # and True means the cache folder
    assert usual == [counts(unbroken), counts(unbroken)[::-1]]
    assert [path.name for path in tmp_path.iterdir()] == ["readings-v3.sqlite"]


def test_overlapping_runs_compute_only_what_is_missing(model, tmp_path):
    path = tmp_path / "s.sqlite"
    facts = sample_facts()

    def alone(**options):
        return score(model, False, **options)

    score(model, path, facts=facts[:5], doses=[0, 1])
    for options in (
        {"facts": facts[:5]},  # one more dose
        {"facts": facts[3:]},  # other facts
        {"schemes": ["do-not-think", "relation"]},
    ):
        before = Store(path).count()
        with forward_tokens(model) as passes:
            result = score(model, path, **options)
        with forward_tokens(model) as all_passes:
            expected = alone(**options)
        check(result, expected)
        found, computed = counts(result)
        assert found + computed == counts(expected)[1]
        assert 0 < computed == Store(path).count() - before
        assert 0 < sum(passes) < sum(all_passes)
    check(score(model, path, batch_tokens=1), alone())
    # Dose 0 is the same prompt under every scheme.
    bare = score(model, path, schemes=["think"], doses=[0])
    assert counts(bare)[1] == 0


def killed_and_resumed(model, unbroken, path, after):
    """Whether a run was killed midway; it is, and ends, with the table of the unbroken one."""
    child = start(lambda: score(model, path, batch_tokens=1))
    killed = kill(child, after)
    done = Store(path).count()
    result = score(model, path, batch_tokens=1)
    check_table(result, unbroken)
    found, computed = counts(result)
    assert found == done
    assert found + computed == counts(unbroken)[1]
    return killed and found > 0 and computed > 0


def seconds_of_a_run(model, path):
    begun = time.perf_counter()
    assert finish(start(lambda: score(model, path, batch_tokens=1))) == 0
    return time.perf_counter() - begun


@pytest.mark.filterwarnings("error::hijacklens.store.database.StoreWarning")
def test_a_run_that_is_killed_resumes(model, unbroken, tmp_path):
    seconds = seconds_of_a_run(model, tmp_path / "whole.sqlite")
    fractions = (0.35, 0.6, 0.85)
    midway = [
        killed_and_resumed(model, unbroken, tmp_path / f"{fraction}.sqlite", seconds * fraction)
        for fraction in fractions
    ]
    assert any(midway)


@pytest.mark.slow
def test_a_run_that_is_killed_at_twenty_random_moments_resumes(model, unbroken, tmp_path):
    seconds = seconds_of_a_run(model, tmp_path / "whole.sqlite")
    draw = random.Random(0)
    midway = [
        killed_and_resumed(model, unbroken, tmp_path / f"{i}.sqlite", seconds * draw.random())
        for i in range(20)
    ]
    assert sum(midway) >= 5


@pytest.mark.slow
def test_a_run_that_is_killed_over_and_over_ends(model, unbroken, tmp_path):
    path = tmp_path / "s.sqlite"
    seconds = seconds_of_a_run(model, tmp_path / "whole.sqlite")
    draw = random.Random(1)
    done = [0]
    for _ in range(20):
        kill(start(lambda: score(model, path, batch_tokens=1)), seconds * 0.4 * draw.random())
        done.append(Store(path).count())
    assert done == sorted(done)  # nothing that was finished is lost
    assert done[-1] > 0
    check_table(score(model, path, batch_tokens=1), unbroken)


def test_two_processes_at_once(model, unbroken, tmp_path):
    path = tmp_path / "s.sqlite"

    def work(i):
        warnings.simplefilter("error", StoreWarning)
        score(model, path).items.to_pickle(tmp_path / f"{i}.pkl")

    children = [start(lambda i=i: work(i)) for i in range(2)]
    assert [finish(child) for child in children] == [0, 0]
    for i in range(2):
        items = pd.read_pickle(tmp_path / f"{i}.pkl")
        pd.testing.assert_frame_equal(items, unbroken.items, atol=1e-5, rtol=0)
    last = score(model, path)
    check(last, unbroken)
    assert counts(last)[1] == 0


def test_an_interrupted_run_keeps_what_is_done(model, unbroken, tmp_path):
    path = tmp_path / "s.sqlite"
    with forward_tokens(model) as all_passes:
        score(model, False, batch_tokens=1)
    fail_at = len(all_passes) * 2 // 3
    with ForwardTokens(model, fail_at), pytest.raises(KeyboardInterrupt):
        score(model, path, batch_tokens=1)
    done = Store(path).count()
    assert 0 < done < counts(unbroken)[1]
    result = score(model, path)
    assert counts(result)[0] == done
    check(result, unbroken)


@dataclass(frozen=True)
class Spoil:
    """Writes a value over the residual stream of every prompt with a token in it."""

    token: int
    value: float
    fail_after: int = 10**9
    spans: tuple[str, ...] = ()
    packs: bool = False

    @property
    def key(self):
        return f"spoil {self.token} with {self.value}"

    def hooks(self, model, layout):
        rows = (layout.tokens == self.token).any(1)
        calls.append(1)
        if len(calls) > self.fail_after:
            raise RuntimeError("the machine is on fire")

        def spoil(residual, hook):
            return torch.where(rows[:, None, None], self.value, residual)

        return [("blocks.0.hook_resid_post", spoil)]


calls: list[int] = []


def test_facts_without_finite_scores_are_listed_and_the_rest_is_kept(model, unbroken, tmp_path):
    path = tmp_path / "s.sqlite"
    word = model.tokenizer(" Guam").input_ids[0]
    nan = Spoil(word, float("nan"))
    first, second = (score(model, path, probes=[nan]) for _ in range(2))
    spoilt = set(first.skipped["case_id"])
    assert 0 < len(spoilt) < 10
    assert first.skipped["reason"].str.contains("no finite log-probability").all()
    assert set(first.items["case_id"]).isdisjoint(spoilt)
    merged = first.items.merge(unbroken.items, on=["case_id", "scheme", "dose"])
    assert (merged["sum_true_x"] - merged["sum_true_y"]).abs().max() < 1e-5
    pd.testing.assert_frame_equal(second.items, first.items)
    pd.testing.assert_frame_equal(second.skipped, first.skipped)
    # Only what was not finite is computed again, every time.
    assert 0 < counts(second)[1] < counts(first)[1]
    assert counts(score(model, path, probes=[nan])) == counts(second)
    # The probe leaves nothing in what the bare model reads.
    check(score(model, path), unbroken)


def test_when_no_fact_can_be_scored_nothing_is_kept(model, tmp_path):
    path = tmp_path / "s.sqlite"
    nan = HookProbe("nan", [("blocks.0.hook_resid_post", lambda value, hook: value * float("nan"))])
    with pytest.raises(InputError, match=r"none of the 10 facts could be scored.*no finite"):
        score(model, path, probes=[nan])
    assert Store(path).count() == 0


def test_a_run_that_fails_keeps_what_is_done(model, tmp_path):
    path = tmp_path / "s.sqlite"
    probe = Spoil(5, 0.25, fail_after=6)
    calls.clear()
    with pytest.raises(RuntimeError, match="on fire"):
        score(model, path, probes=[probe])
    done = Store(path).count()
    assert done > 0
    calls.clear()
    well = Spoil(5, 0.25)
    result = score(model, path, probes=[well])
    assert counts(result)[0] == done
    check(result, score(model, False, probes=[well]))


def test_probes_and_models_do_not_mix(model, tmp_path):
    path = tmp_path / "s.sqlite"
    double = HookProbe("double", [("blocks.0.hook_mlp_out", lambda value, hook: 2 * value)])
    spans = HookProbe("spans", [], spans=("hijack", "subject"))
    edited = copy.deepcopy(model)
    norm = next(p for name, p in edited.named_parameters() if "ln_f" in name and p.dim() == 1)
    with torch.no_grad():
        norm[3] *= -1
    runs = [
        (model, {}),
        (model, {"probes": [double]}),
        (model, {"probes": [double, double]}),
        (model, {"probes": [spans]}),
        (edited, {}),
        (load(dtype="bfloat16"), {}),
        (load("llama"), {}),
    ]
    expected = [
        score(which, False, doses=[0, 1], facts=sample_facts()[:5], **options)
        for which, options in runs
    ]
    for _ in range(2):
        for (which, options), plain in zip(runs, expected, strict=True):
            result = score(which, path, doses=[0, 1], facts=sample_facts()[:5], **options)
            pd.testing.assert_frame_equal(result.items, plain.items, atol=1e-5, rtol=0)
    assert counts(result)[1] == 0
    assert len(Store(path).contents().rows) == len(runs)


def test_hooks_on_the_model_are_not_stored(model, unbroken, tmp_path):
    path = tmp_path / "s.sqlite"
    score(model, path)
    hook = ("blocks.0.hook_mlp_out", lambda value, hook: 2 * value)
    with (
        model.hooks(fwd_hooks=[hook]),
        pytest.warns(StoreWarning, match=r"no key covers a hook \(<lambda>\) on blocks.0"),
    ):
        hooked = score(model, path)
    assert counts(hooked)[0] == 0
    assert "no key covers a hook" in hooked.settings.models[0].readings.store_off
    assert (hooked.items["sum_true"] - unbroken.items["sum_true"]).abs().max() > 1e-3
    check(score(model, path), unbroken)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "foreign"])
def test_a_broken_store_is_reported_and_the_run_continues(model, unbroken, tmp_path, damage):
    path = tmp_path / "s.sqlite"
    if damage == "foreign":
        with closing(sqlite3.connect(path)) as made:
            made.execute("CREATE TABLE theses (title)")
    else:
        score(model, path)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"\0x" * 5000)
    broken = path.read_bytes()
    with pytest.warns(StoreWarning, match="set aside as 's.sqlite.aside-1'"):
        result = score(model, path)
    check(result, unbroken)
    assert counts(result) == counts(unbroken)
    assert aside_from(path)[0].read_bytes() == broken
    assert counts(score(model, path))[1] == 0  # the new one works


def test_a_full_disk_costs_the_store_and_not_the_result(model, unbroken, tmp_path):
    path = tmp_path / "s.sqlite"

    def work():
        # Files of this process may grow to 32 kB: what is written beyond fails.
        resource.setrlimit(resource.RLIMIT_FSIZE, (32_768, resource.RLIM_INFINITY))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = score(model, path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        result.items.to_pickle(tmp_path / "items.pkl")
        about = [str(one.message) for one in caught if issubclass(one.category, StoreWarning)]
        (tmp_path / "warnings").write_text("\n".join(about))

    assert finish(start(work)) == 0
    items = pd.read_pickle(tmp_path / "items.pkl")
    pd.testing.assert_frame_equal(items, unbroken.items, atol=1e-5, rtol=0)
    messages = (tmp_path / "warnings").read_text().splitlines()
    assert len(messages) == 1
    assert "continues without it" in messages[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", StoreWarning)
        check(score(model, path), unbroken)


def test_a_named_store_that_cannot_be_used_is_refused(model, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "s.sqlite"
    with forward_tokens(model) as passes, pytest.raises(InputError, match="Name another file"):
        score(model, path)
    assert passes == []
    monkeypatch.setenv("HIJACKLENS_STORE", str(path))
    with pytest.warns(StoreWarning, match="continues without it"):
        result = score(model, True)
    assert "cannot be used" in result.settings.models[0].readings.store_off


def test_progress_counts_what_the_store_had(model, tmp_path, monkeypatch):
    steps = []

    class Bar:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def update(self, step):
            steps.append(step)

    monkeypatch.setattr(hijack_module, "bar", lambda **options: Bar())
    for options in ({"facts": sample_facts()[:4]}, {}, {}):
        steps.clear()
        score(model, tmp_path / "s.sqlite", **options)
        assert sum(steps) == pytest.approx(len(options.get("facts", sample_facts())))


def test_stored_readings_that_a_run_does_not_confirm_are_deleted(model, unbroken, tmp_path):
    path = tmp_path / "s.sqlite"
    wrong = {"probes": [HookProbe("kept", [("blocks.0.hook_mlp_out", lambda value, hook: -value)])]}
    right = {"probes": [HookProbe("kept", [])]}  # another probe that has the same name
    score(model, path, **wrong)
    score(model, path)
    with pytest.warns(StoreWarning, match=r"3 stored readings .* differ by up to"):
        result = score(model, path, **right)
    check(result, unbroken)
    assert counts(result) == counts(unbroken)
    for options in (right, {}):  # what replaces them, and those of other fingerprints, are found
        assert counts(score(model, path, **options)) == counts(unbroken)[::-1]


def test_threads_with_different_probes_wait_for_each_other(model, tmp_path):
    path, facts = tmp_path / "s.sqlite", sample_facts()[:4]
    probes = [
        [],
        [HookProbe("double", [("blocks.0.hook_mlp_out", lambda value, hook: 2 * value)])],
        [HookProbe("half", [("blocks.1.hook_attn_out", lambda value, hook: value / 2)])],
    ]

    def run(active, store=path):
        return score(model, store, facts=facts, doses=[0, 2], probes=active, batch_tokens=20)

    expected = [run(active, store=False) for active in probes]
    for _ in range(2):  # computed, and then read
        with ThreadPoolExecutor(len(probes)) as pool, warnings.catch_warnings():
            warnings.simplefilter("error", StoreWarning)
            results = list(pool.map(run, probes))
        for result, alone in zip(results, expected, strict=True):
            check(result, alone)
    assert all(counts(result)[1] == 0 for result in results)
