"""Fuzz: the command line with hostile arguments; status 0, 1 or 2, one line, no traceback."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from campaign import LONG, campaign, tally, writing_only_below
from hostile import HOSTILE, words
from hypothesis import given
from hypothesis import strategies as st
from sample_facts import sample_facts
from tiny_models import tiny_model, tiny_tokenizer
from type_checks import unchecked

from analyses.commands.group import COMMANDS, main
from hijacklens.results.result import load_result

FOLDER, FACTS = "MODEL", "FACTS"
"""In arguments: the folder of a tiny model, and a file of facts."""
VALUES = st.sampled_from(
    words(
        "MODEL FACTS nowhere no/where ./nowhere atlas counterfact do-not-think do-not-thinc "
        "relation 0-1 1-0 99999 -1 0 1 2 x=y never-say=Never never-say={target_false} x={foo} "
        "knock-out:source=last,target=hijack ablate:kind=mean nan inf 1e999 cpu cuda "
        "cuda:9 float64 float16 all "
        "fig3a lemma5 P36 P999 first gaussian wv 0.01 0.1,x --help -- - . / ray"
    )
) | st.sampled_from([text for text in HOSTILE if "\0" not in text])
OPTIONS = words(
    "--model --facts --scheme --template --doses --probe --relation --case --limit --seed --dtype "
    "--device --devices --revision --batch-tokens --sharing --engine --workers --rule --quiet "
    "--dim --way --json --dose --subject --true --false --top --tokens --sentence --bits "
    "--d-model --length --omega --beta --support --freeze --lr --seeds --steps --value-init "
    "--evaluation --size --candidates --split --test-scheme --random-sets --list --scale --yes "
    "--overwrite --nonsense --name --span"
)
GOOD = (
    "hijack --model MODEL --facts FACTS --doses 0-1 --limit 2",
    "ask Rome --model MODEL --tokens 1 --true Rome --false Paris --scheme do-not-think",
    "facts --facts FACTS --show --limit 2",
    "plan --model MODEL --facts FACTS --doses 0-1",
    "train --bits 2 --d-model 2 --length 4 --steps 1 --seeds 1 --evaluation 4",
    "heads --model MODEL --facts FACTS --size 1 --candidates 1 --random-sets 0",
    "trace --model MODEL --facts FACTS --case 3",
    "reproduce lemma5",
    "schemes",
    "probes",
    "models",
    "cache info",
    "cache clear --yes",
    "sweep FACTS",
)
WRITES = ("hijack", "train", "heads", "trace", "reproduce", "sweep")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("commands")
    tiny_model("gpt2").save_pretrained(root / "tiny")
    tiny_tokenizer("gpt2").save_pretrained(root / "tiny")
    table = sample_facts().to_dataframe().drop(columns="prompt")
    table.to_json(root / "facts.jsonl", orient="records", lines=True)
    (root / "work").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIJACKLENS_CACHE", str(root / "cache"))  # for `cache clear`
        yield root


@st.composite
def command_lines(draw: Any) -> list[str]:
    """A command line that works with some of its words changed, or any words at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.lists(st.sampled_from([*COMMANDS, *OPTIONS]) | VALUES, max_size=6))
    line = words(draw(st.sampled_from(GOOD)))
    for _ in range(draw(st.integers(0, 2))):
        i = draw(st.integers(1, len(line)))
        way = draw(st.sampled_from(["replace", "drop", "option", "option"]))
        if way == "option":
            line[i:i] = [draw(st.sampled_from(OPTIONS)), draw(VALUES)]
        elif i < len(line):
            line[i : i + 1] = [draw(VALUES)] if way == "replace" else []
    return line


def run(line: list[str], place: Path) -> tuple[int, str]:
    """Exit status and standard error of a command line in a separate working directory."""
    real = {FOLDER: str(place / "tiny"), FACTS: str(place / "facts.jsonl")}
    arguments = [real.get(word, word) for word in line]
    errors = io.StringIO()
    before = Path.cwd()
    os.chdir(place / "work")
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            main(arguments)
        status: Any = 0
    except SystemExit as stop:
        status = stop.code or 0
    finally:
        os.chdir(before)
    return status, errors.getvalue()


@campaign(12, 600)
@given(line=command_lines(), out=st.booleans())
def test_commands(line, out, place):
    if out and line and line[0] in WRITES:
        line = [*line, "--out", "deep/er/out"]
    with unchecked(), writing_only_below(place):
        status, errors = run(line, place)
    tally("command line", f"status {status}")
    assert status in (0, 1, 2), (status, errors)
    assert "Traceback" not in errors
    if status == 2:
        said = [text for text in errors.splitlines() if not text.startswith("note: ")]
        usage = any(text.startswith(("Usage:", "Error:")) for text in said)
        assert said, line
        # click itself repeats an option that it does not know as it was typed.
        assert usage or said[-1].startswith("hijacklens: "), errors
        assert usage or all(text.isprintable() for text in said), errors
    shutil.rmtree(place / "work")
    (place / "work").mkdir()


# ---------------------------------------------------------------- names that are paths


EVIL = ("../../evil", "/tmp/hijacklens-evil", "..", "a/../../evil", "~/evil", "con\n..", "%2e%2e")


@pytest.mark.parametrize("name", EVIL if LONG else EVIL[:1])
def test_names_in_data_do_not_choose_paths(name, place, tmp_path):
    """Relations, subjects and targets of a facts file; models, facts and cells of a sweep."""
    work = tmp_path / "deep" / "er"
    work.mkdir(parents=True)
    facts = work / "facts.json"
    texts = dict.fromkeys(("relation_id", "subject", "target_true"), name)
    record = {**texts, "template": "{} is", "target_false": "Guam", "case_id": 7}
    facts.write_text(json.dumps([record, {**record, "case_id": name}]))
    sweep = work / "sweep.toml"
    sweep.write_text(
        f"[scoring]\nmodels = [{json.dumps(str(place / 'tiny'))}]\ndoses = [1]\n"
        f"facts = [{{ source = {json.dumps(str(facts))}, name = {json.dumps(name)} }}]\n"
    )
    model = str(place / "tiny")
    common = ["--model", model, "--facts", str(facts), "--out", str(work / "out"), "--quiet"]
    with unchecked(), writing_only_below(work):
        assert run(["hijack", *common, "--doses", "1"], place)[0] == 0
        assert load_result(work / "out").items["subject"].tolist() == [name.strip()] * 2
        assert run(["trace", *common, "--case", "7", "--overwrite"], place)[0] == 0
        assert run(["sweep", str(sweep), "--out", str(work / "sweep"), "--quiet"], place)[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"deep"}
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"er"}
    assert not Path("/tmp/hijacklens-evil").exists()
    assert not (Path.home() / "evil").exists()
    assert list((place / "work").iterdir()) == []
