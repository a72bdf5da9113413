"""Models and data sets of the hub over HTTP: the same as from a folder, or one clear error."""

from __future__ import annotations

import _thread
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from hub_server import TOKEN, HubServer
from huggingface_hub import constants
from safetensors.torch import load_file, save
from sample_facts import sample_facts
from tiny_models import tiny_model, tiny_tokenizer

import hijacklens as hl
from analyses.commands.group import main
from hijacklens.facts.loading import HUB_ID, PATH_VARIABLE
from hijacklens.models.identity import identify
from hijacklens.models.naming import resolve

IDS = torch.tensor([tiny_tokenizer("gpt2")("Do not think of Guam. Rome is in").input_ids])
PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "errors.md"
GATED = "it is gated. Accept its licence on its page of the hub, then log in with `hf auth login`"
ABSENT = "the hub has none of that name that this account may read"
REVISION = "it has no such revision. Its page of the hub lists its branches, tags and commits."
REFUSED = "the hub refuses the access token (HTTP 401). Log in with `hf auth login`"
BROKEN_OFF = "the hub fails (the connection broke off). Try again later; complete files are kept."
UNREACHABLE = "it is not in the local cache and the hub cannot be reached."


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two versions of a model: in one file, and in several with an index."""
    found = []
    for seed, shard in enumerate(("1GB", "40KB")):
        folder = tmp_path_factory.mktemp("version")
        tiny_model("gpt2", seed=seed).save_pretrained(folder, max_shard_size=shard)
        tiny_tokenizer("gpt2").save_pretrained(folder)
        found.append(folder)
    assert len([*found[1].glob("*.safetensors")]) > 2
    return found


@pytest.fixture(scope="module")
def logits(folders):
    """The logits of both versions, loaded from their folders."""
    return [hl.load_model(folder)(IDS) for folder in folders]


def records(targets: str = "Rome") -> str:
    """Facts as a data set has them; the version shows in a target."""
    rows = [
        {
            "case_id": fact.case_id,
            "relation_id": fact.relation_id,
            "subject": fact.subject,
            "template": fact.template,
            "target_true": targets if fact.case_id == 1 else fact.target_true,
            "target_false": fact.target_false,
        }
        for fact in sample_facts()
    ]
    return "\n".join(map(json.dumps, rows))


def refused(load, *args, **options) -> str:
    with pytest.raises(hl.InputError) as caught:
        load(*args, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


def check(name: str, revision: str | None = None) -> None:
    """What commands do before they load a model."""
    resolve(name, revision)


# ---------------------------------------------------------------- models


def test_a_model_of_the_hub_is_that_of_its_folder_at_every_revision(hub, folders, logits):
    first = hub.add("user/versions", folders[0], tags=["v1"])
    hub.add("user/versions", folders[0], branch="refs/pr/1")
    last = hub.add("user/versions", folders[1])
    for revision, version in (None, 1), ("v1", 0), ("refs/pr/1", 0), (first, 0), ("main", 1):
        model = hl.load_model("user/versions", revision=revision)
        assert torch.equal(model(IDS), logits[version]), revision
        assert identify(model).revision == (last if version else first)
        assert identify(model).name == "user/versions"
    whole = [r for r in hub.requests if r.method == "GET" and "/resolve/" in r.path]
    assert len(whole) == len({r.path for r in whole})  # no file is downloaded twice


def test_all_files_come_from_one_commit_if_the_branch_moves_meanwhile(hub, folders, logits):
    first = hub.add("user/moving", folders[0])
    hub.fail("tokenizer.json", call=lambda: hub.add("user/moving", folders[1]))
    model = hl.load_model("user/moving")
    assert torch.equal(model(IDS), logits[0])
    assert identify(model).revision == first


def test_a_token_goes_to_the_hub_and_not_to_its_storage(hub, folders, logits, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.add("user/new-name", folders[0], private=True)
    hub.moved["user/old-name"] = "user/new-name"
    assert torch.equal(hl.load_model("user/old-name")(IDS), logits[0])
    tokens = {r.path.startswith("/storage/"): r.token for r in hub.requests if r.status != 307}
    assert tokens == {True: "", False: TOKEN}


def test_a_download_that_is_cut_resumes_where_it_stopped(hub, folders, logits):
    files = {path.name: path.read_bytes() for path in folders[0].iterdir()}
    # Clients write blocks of 10 MiB, and fetch again what follows the last complete one.
    block = constants.DOWNLOAD_CHUNK_SIZE
    weights = load_file(folders[0] / "model.safetensors")
    files["model.safetensors"] = save(weights, {"format": "pt", "filling": "." * 2 * block})
    hub.add("user/large", files)
    for after in block + 10, block + 20:
        hub.fail("model.safetensors", after=after)
    assert torch.equal(hl.load_model("user/large")(IDS), logits[0])
    parts = [(r.range, r.status) for r in hub.requests if r.path.startswith("/storage/")]
    assert parts == [("", 200), (f"bytes={block}-", 206), (f"bytes={2 * block}-", 206)]


@pytest.mark.parametrize("load", [hl.load_model, check], ids=["load", "check"])
def test_a_model_that_the_hub_refuses(load, hub, folders, monkeypatch):
    hub.add("user/gated", folders[0], gated=True)
    hub.add("user/private", folders[0], private=True)
    hub.add("user/public", folders[0])
    for token in ("", TOKEN):
        monkeypatch.setenv("HF_TOKEN", token)
        assert GATED in refused(load, "user/gated")
        assert ABSENT in refused(load, "user/irrigated")
        text = refused(load, "user/public", revision="v9")
        assert text == f"cannot load the model 'user/public' at the revision 'v9': {REVISION}"
    monkeypatch.setenv("HF_TOKEN", "expired")
    assert REFUSED in refused(load, "user/public")
    monkeypatch.delenv("HF_TOKEN")
    assert ABSENT in refused(load, "user/private")
    assert ABSENT in refused(load, "not a name!")


def test_an_adapter_on_the_hub_is_refused(hub):
    hub.add("user/adapter", {"adapter_config.json": '{"base_model_name_or_path": "gpt2"}'})
    check("user/adapter")
    with pytest.raises(hl.InputError, match=r"'user/adapter' holds an adapter"):
        hl.load_model("user/adapter")


def test_the_code_of_a_model_on_the_hub_is_run_only_if_the_user_trusts_it(hub, folders):
    config = {"model_type": "odd", "auto_map": {"AutoConfig": "odd.Config"}}
    files = {path.name: path.read_bytes() for path in folders[0].glob("tokenizer*")}
    files |= {"config.json": json.dumps(config), "odd.py": "raise OSError('was run')"}
    hub.add("user/odd", files)
    assert "trust_remote_code=True" in refused(hl.load_model, "user/odd")
    assert "was run" in refused(hl.load_model, "user/odd", trust_remote_code=True)


def test_a_hub_that_fails_in_the_middle(hub, folders):
    for name, ending, how, reason in (
        ("one", "model.safetensors", {"status": 503}, "the hub fails (HTTP 503). Try again later"),
        ("two", "config.json", {"methods": ["HEAD"]}, BROKEN_OFF),
        ("three", "config.json", {"methods": ["HEAD"], "status": 403}, "HTTP 403"),
    ):
        hub.add(f"user/{name}", folders[0])
        hub.fail(ending, **how)
        assert reason in refused(hl.load_model, f"user/{name}")
        hl.load_model(f"user/{name}")


def test_a_rate_limit_is_waited_out(hub, folders, logits):
    hub.add("user/limited", folders[0])
    hub.fail("model.safetensors", status=429, headers={"Retry-After": "0"})
    assert torch.equal(hl.load_model("user/limited")(IDS), logits[0])


def test_ctrl_c_ends_a_download(hub, folders):
    hub.add("user/long", folders[0])
    hub.fail("model.safetensors", call=_thread.interrupt_main)
    with pytest.raises(KeyboardInterrupt):
        hl.load_model("user/long")


# ---------------------------------------------------------------- data sets


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_facts_of_the_hub_are_those_of_the_file(ending, hub, tmp_path):
    (tmp_path / "facts.jsonl").write_text(records())
    table = datasets.Dataset.from_list([json.loads(line) for line in records().splitlines()])
    path = tmp_path / f"train.{ending}"
    {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[ending](path)
    files = {path.name: path.read_bytes(), "README.md": "# Facts"}
    hub.add(f"user/facts-{ending}", files, kind="datasets")
    read = hl.load_facts(f"user/facts-{ending}")
    assert read.name == f"user/facts-{ending}"
    assert read.content_hash() == hl.load_facts(tmp_path / "facts.jsonl").content_hash()


def test_without_a_source_the_published_data_set_is_read(hub, monkeypatch):
    monkeypatch.delenv(PATH_VARIABLE, raising=False)
    hub.add(HUB_ID, {"train.jsonl": records()}, kind="datasets")
    assert len(hl.counterfact()) == len(sample_facts())
    assert HUB_ID == "NeelNanda/counterfact-tracing"


def test_the_configuration_of_a_data_set(hub):
    head = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in "ab"
    )
    files = {"README.md": head + "---\n", "a.jsonl": records("a"), "b.jsonl": records("b")}
    hub.add("user/configs", files, kind="datasets")
    for name in "ab":
        assert hl.load_facts("user/configs", config=name)[1].target_true == name
    several, none = (refused(hl.load_facts, "user/configs", config=name) for name in (None, "c"))
    assert several == "user/configs has several configurations; give config= one of a, b."
    assert none == "user/configs has no configuration 'c'; give config= one of a, b."


def test_the_split_and_the_revision_of_a_data_set(hub):
    hub.add("user/splits", {"train.jsonl": records("v1")}, kind="datasets", tags=["v1"])
    files = {"train.jsonl": records("a"), "test.jsonl": records("b")}
    hub.add("user/splits", files, kind="datasets")
    hub.add("user/no-train", {"test.jsonl": records(), "dev.jsonl": records()}, kind="datasets")
    for target, options in ("v1", {"revision": "v1"}), ("a", {}), ("b", {"split": "test"}):
        assert hl.load_facts("user/splits", **options)[1].target_true == target
    text = refused(hl.load_facts, "user/splits", revision="v1", split="dev")
    assert text == "user/splits has no split 'dev'; it has train."
    assert "it has validation, test." in refused(hl.load_facts, "user/no-train")


def test_without_the_hub_only_the_version_that_was_meant_is_read(hub, monkeypatch):
    hub.add("user/kept", {"train.jsonl": records("v1")}, kind="datasets", tags=["v1"])
    hub.add("user/kept", {"train.jsonl": records("v2")}, kind="datasets", tags=["v2"])
    hl.load_facts("user/kept", revision="v1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert hl.load_facts("user/kept", revision="v1")[1].target_true == "v1"
    for revision in (None, "v2"):
        assert UNREACHABLE in refused(hl.load_facts, "user/kept", revision=revision)
    monkeypatch.undo()


def test_a_data_set_that_the_hub_refuses(hub, monkeypatch):
    hub.add("user/gated", {"train.jsonl": records()}, kind="datasets", gated=True)
    hub.add("user/plain", {"train.jsonl": records()}, kind="datasets")
    load = hl.load_facts
    for token in ("", TOKEN):
        monkeypatch.setenv("HF_TOKEN", token)
        assert GATED in refused(load, "user/gated")
        assert ABSENT in refused(load, "user/absent")
    text = refused(load, "user/plain", revision="v9")
    assert text == f"cannot read the data set 'user/plain' at the revision 'v9': {REVISION}"
    hub.fail("README.md", methods=["HEAD"])
    assert BROKEN_OFF in refused(load, "user/plain")
    hub.add("user/damaged", {"train.jsonl": "{"}, kind="datasets")
    assert "JSON parse error" in refused(load, "user/damaged")
    monkeypatch.setenv("HF_TOKEN", "expired")
    assert REFUSED in refused(load, "user/plain")
    assert "hl.atlas()" in refused(load, "user/absent ")


# ---------------------------------------------------------------- the command line


@pytest.mark.slow
def test_a_run_on_the_hub_is_the_run_on_files(hub, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("facts.jsonl").write_text(records())
    commit = hub.add("user/run", folders[0], tags=["v1"])
    hub.add("user/run", folders[1])
    hub.add("user/facts", {"train.jsonl": records()}, kind="datasets")
    same = ["--scheme", "think", "--doses", "1"]
    model, facts = ["--model", "user/run", "--revision", "v1"], ["--facts", "user/facts"]
    main(["hijack", *model, *facts, *same, "--out", "hub"])
    main(["hijack", "--model", str(folders[0]), "--facts", "facts.jsonl", *same, "--out", "files"])
    one, two = hl.load_result("hub"), hl.load_result("files")
    assert one.items.drop(columns="model").equals(two.items.drop(columns="model"))
    (scored,) = one.settings.models
    assert (scored.name, scored.revision) == ("user/run", commit)


SCRIPT = """
import hijacklens as hl
for load, name in (hl.load_model, "user/none"), (hl.load_facts, "user/none"):
    try:
        load(name)
    except hl.InputError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_hub_that_is_down_is_reported_within_a_minute(tmp_path):
    """Three hubs at once, as their clients wait and try again."""
    reasons = {
        None: UNREACHABLE,
        429: "too many requests",
        503: "the hub fails (HTTP 503)",
    }
    running, start = {}, time.monotonic()
    for status in reasons:
        server = HubServer()
        server.fail("", methods=["GET", "HEAD"], times=100, status=status)
        endpoint = "http://127.0.0.1:1" if status is None else server.url
        online = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / str(status))}
        running[status] = subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, **online, "HF_HUB_OFFLINE": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    for status, process in running.items():
        out, noise = process.communicate()
        assert [reasons[status] in line for line in out.splitlines()] == [True, True]
        assert "Retrying in 1s [Retry 1/5]" in noise
        assert "Traceback" not in noise
    assert time.monotonic() - start < 150  # both calls of each


def test_the_page_of_errors_shows_what_the_hub_says():
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    for text in (
        GATED,
        ABSENT,
        REVISION,
        REFUSED,
        BROKEN_OFF,
        UNREACHABLE,
        "(HTTP 429)",
        "(HTTP 503)",
    ):
        assert text in page
