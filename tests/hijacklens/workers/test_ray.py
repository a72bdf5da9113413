"""Ray itself, on this machine: the same items as in one process (`make test-ray`)."""

from __future__ import annotations

import os
from contextlib import suppress

import pandas as pd
import pytest
from sample_facts import sample_facts
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer

from hijacklens.errors import InputError
from hijacklens.facts.atlas import atlas
from hijacklens.models.loading import load_model
from hijacklens.models.packaged import PACKAGED
from hijacklens.probe import HookProbe
from hijacklens.scoring.execution import Execution
from hijacklens.scoring.hijack import hijack
from hijacklens.store.contents import Store
from hijacklens.workers.replica import ModelLoader
from hijacklens.workers.workers import RayEngine
from probes import attention

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def ray():
    module = pytest.importorskip("ray", reason="needs the extra ray: pip install 'hijacklens[ray]'")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Room for more than the two workers of `crew`, whatever this machine has.
    module.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield module
    module.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    def save(family):
        path = tmp_path_factory.mktemp("models") / f"tiny-{family}"
        tiny_model(family).save_pretrained(path)
        tiny_tokenizer(family).save_pretrained(path)
        return str(path)

    return save


@pytest.fixture(scope="module")
def crew(ray, folder):
    engine = RayEngine(workers=2, cpus_per_worker=1)
    with engine.replicas(ModelLoader(folder("llama"), device="cpu")) as found:
        yield found


@pytest.fixture(scope="module")
def expected(crew):
    return score(load_model(crew.loader.source, device="cpu"))


def score(model, engine="local", store=False, facts=None, probes=(), **options):
    execution = Execution(engine=engine, store=store, **{"batch_tokens": 100, **options})
    return hijack(
        model,
        facts or sample_facts(),
        doses=(0, 1, 2),
        probes=probes,
        execution=execution,
        quiet=True,
    )


def check(result, expected):
    pd.testing.assert_frame_equal(result.items, expected.items, atol=1e-4, rtol=0)
    pd.testing.assert_frame_equal(result.skipped, expected.skipped)


def test_a_model_that_workers_cannot_load_is_one_clear_error(ray):
    with pytest.raises(InputError, match="does not exist"):
        score(ModelLoader("./no/such/folder", device="cpu"), RayEngine(workers=1))
    with pytest.raises(InputError, match="no room for 5 workers"):
        score(ModelLoader("gpt2"), RayEngine(workers=5))


def test_the_same_items_with_and_without_probes_and_store(crew, expected, tmp_path):
    model = load_model(crew.loader.source, device="cpu")
    store = Store(tmp_path / "s.sqlite")
    check(score(crew.loader, crew, store), expected)
    again = score(model, store=store)  # this process finds what the workers finished
    check(again, expected)
    assert again.settings.models[0].readings.computed == 0
    probes = [attention.knock_out(source="last", target="hijack")]
    check(score(model, crew, probes=probes), score(model, probes=probes))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
def test_the_same_items_on_every_family(ray, folder, family):
    loader = ModelLoader(folder(family), device="cpu")
    plain = score(load_model(loader.source, device="cpu"), sharing="plain")
    check(score(loader, RayEngine(workers=1, cpus_per_worker=1)), plain)


@pytest.mark.parametrize("name", sorted(PACKAGED))
def test_the_same_items_on_the_packaged_models(ray, name):
    facts = atlas().where(relation=["P36"]).limit(4, seed=0)
    plain = score(load_model(name, device="cpu"), facts=facts, sharing="plain", batch_tokens=None)
    for workers in (1, 2):
        engine = RayEngine(workers=workers, cpus_per_worker=1)
        check(score(ModelLoader(name, device="cpu"), engine, facts=facts, batch_tokens=None), plain)


def test_a_worker_that_is_killed_is_replaced(ray, crew, expected, tmp_path):
    before = crew.replaced
    ray.kill(crew.workers[0])
    check(score(crew.loader, crew), expected)
    assert crew.replaced == before + 1
    mark = tmp_path / "died"

    def die_once(value, hook):
        with suppress(FileExistsError):
            mark.touch(exist_ok=False)  # by one worker only
            os._exit(1)

    # A function in a function is sent by value: workers cannot import this module.
    probe = HookProbe("die once", [("blocks.0.hook_resid_pre", die_once)], packs=True)
    store = Store(tmp_path / "s.sqlite")
    check(score(crew.loader, crew, store, probes=[probe]), expected)
    assert crew.replaced == before + 2
