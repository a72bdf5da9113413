"""A command with a mistake answers before large libraries are imported.

Every group of command lines runs in one process in which the import of those libraries fails.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pandas as pd
import pytest

PROCESS = """
import io, json, sys, time
from contextlib import redirect_stderr, redirect_stdout
from analyses.commands.group import main

calls, heavy = json.load(sys.stdin)
sys.modules.update(dict.fromkeys(heavy))  # the import of None fails
outcomes, start = [], time.process_time()
for call in calls:
    errors, status = io.StringIO(), 0
    with redirect_stderr(errors), redirect_stdout(io.StringIO()):
        try:
            main(call)
        except SystemExit as stop:
            status = stop.code
        except ImportError as error:
            errors.write(f"imports {error.name}")
    outcomes.append((status, errors.getvalue()))
print(json.dumps([outcomes, time.process_time() - start]))
"""
MODEL = "--model {model}"
TRAIN = "train --bits 3 --d-model 4 --out {out}"
MISTAKES = {
    "hijak": "did you mean 'hijack'?",
    "hijack": "Missing option '--model'",
    "hijack --nonsense": "No such option '--nonsense'",
    "hijack --model smollm2-135": "did you mean the packaged 'smollm2-135m'?",
    "hijack --model ./nowhere": "the model folder './nowhere' does not exist",
    "hijack --model {empty}": "holds no model",
    "hijack --model owner/nowhere": "the hub cannot be reached",
    f"hijack {MODEL} {MODEL}": "two models have the same name",
    f"hijack {MODEL} --scheme do-not-thinc": "did you mean 'do-not-think'?",
    f"hijack {MODEL} --template never": "has no name",
    f"hijack {MODEL} --template x={{{{foo}}}}": "unknown placeholder",
    f"hijack {MODEL} --doses 1-x": "--doses '1-x'",
    f"hijack {MODEL} --probe knock-outt:source=last": "unknown kind of probe",
    f"hijack {MODEL} --probe knock-out:source=last": "lacks target",
    f"hijack {MODEL} --probe zero-value:layers=8..x": "layers=8..x cannot be read",
    f"hijack {MODEL} --probe low-rank-value:rank=0": "rank=0 cannot be read",
    f"hijack {MODEL} --probe zero-value:layer=1": "unknown option of zero-value",
    f"hijack {MODEL} --probe knock-out:source=last,target=bos,renormalise=no": "when=",
    f"hijack {MODEL} --probe ablate:site=mlp_out,heads=1": "is not split into heads",
    f"hijack {MODEL} --facts {{out}}.json": "does not exist",
    f"hijack {MODEL} --facts {{malformed}}": "is not valid JSON",
    f"hijack {MODEL} --relation P999": "P999",
    f"hijack {MODEL} --case 99999": "no case 99999",
    "law --bits 3 --doses 0-1 --limit 20 --chat user": "--bits makes no use of --doses, --chat, "
    "--limit; leave that out",
    "law --model ./nowhere": "does not exist",
    f"law {MODEL} --revision zzz": "has no revisions",
    "law --world nowhere --scheme think": "--world makes no use of --scheme",
    "law --world nowhere": "'nowhere' holds no finished pocket world",
    f"hijack {MODEL} --limit 0": "--limit is 0; give a whole number of at least 1",
    f"hijack {MODEL} --seed -1": "--seed is -1",
    f"hijack {MODEL} --dtype float33": "--dtype",
    f"hijack {MODEL} --batch-tokens 0": "--batch-tokens is 0",
    f"hijack {MODEL} --sharing foo": "--sharing",
    f"hijack {MODEL} --engine foo": "--engine",
    f"hijack {MODEL} --workers 2": "needs --engine ray",
    f"hijack {MODEL} --rule foo": "--rule",
    f"hijack {MODEL} --generate --samples 0": "--samples is 0",
    f"hijack {MODEL} --generate --answer-tokens 0": "--answer-tokens is 0",
    f"hijack {MODEL} --generate --temperature -1": "--temperature is -1",
    f"hijack {MODEL} --generate --samples 3": "such as --temperature 1",
    f"hijack {MODEL} --temperature 1": "need --generate",
    f"hijack {MODEL} --query assistant": "--query needs --chat user",
    f"hijack {MODEL} --out {{result}}": "already contains a result",
    f"hijack {MODEL} --out {{malformed}}": "cannot write results",
    f"hijack {MODEL} --revision zzz": "has no revisions",
    "ask Rome --model ./nowhere": "does not exist",
    f"ask Rome {MODEL} --scheme foo --true a --false b": "unknown scheme",
    f"ask Rome {MODEL} --scheme think": "needs --false",
    f"ask '' {MODEL}": "the prompt is empty",
    f"ask Rome {MODEL} --dose 0": "--dose is 0",
    f"ask Rome {MODEL} --tokens -1": "--tokens is -1",
    f"ask Rome {MODEL} --probe foo": "unknown kind of probe",
    "models --check ./nowhere": "does not exist",
    "probes foo": "unknown kind of probe",
    "facts --facts {malformed}": "is not valid JSON",
    "plan": "plan needs --tokenizer",
    "plan --tokenizer ./nowhere": "does not exist",
    f"plan {MODEL} --scheme foo": "unknown scheme",
    f"plan {MODEL} --doses x": "--doses 'x'",
    f"plan {MODEL} --facts {{malformed}}": "is not valid JSON",
    "train --bits 3": "Missing option",
    "train --bits 0 --d-model 4 --out {out}": "--bits is 0",
    f"{TRAIN} --support foo": "--support",
    f"{TRAIN} --freeze foo": "unknown part to freeze",
    f"{TRAIN} --value-init foo": "--value-init",
    f"{TRAIN} --steps 0": "--steps is 0",
    f"{TRAIN} --lr x": "--lr is 'x'",
    f"{TRAIN} --dtype float16": "--dtype",
    "train --bits 3 --d-model 4 --out {result}": "already contains a result",
    "world --out {out} --sharing 2": "--sharing is 2.0; give a number between 0 and 1",
    "world --out {out} --bits 9": "--bits is 9",
    "world --out {out} --family gemma": "unknown family 'gemma'",
    "world --out {out} --vary sharin=0,1": "did you mean 'sharing'?",
    "world --out {out} --vary seed=x": "has no values of seed",
    "world --out {result}": "already contains a result",
    "cache foo": "No such command",
    "cache clear --json": "add --yes",
    "cache clear --model nowhere": "unknown model in the store 'nowhere'",
    "heads --model ./nowhere": "does not exist",
    f"heads {MODEL} --test-scheme foo": "unknown scheme",
    f"heads {MODEL} --test-doses x": "'x'",
    f"heads {MODEL} --dose 0": "--dose is 0",
    f"heads {MODEL} --size 6 --candidates 5": "cannot choose 6 heads from 5 candidates",
    f"heads {MODEL} --limit 1": "needs at least 2",
    f"heads {MODEL} --limit 2": "1 of the facts of atlas can be searched; intervals",
    f"heads {MODEL} --out {{result}}": "already contains a result",
    "defend --model ./nowhere": "does not exist",
    f"defend {MODEL} --method gat": "did you mean 'gate'?",
    f"defend {MODEL} --method nowhere.py:Method": "there is no file nowhere.py",
    f"defend {MODEL} --tune-scheme foo": "unknown scheme",
    f"defend {MODEL} --dose 0-2": "one dose above 0",
    f"defend {MODEL} --scheme think --scheme think": "each once",
    f"defend {MODEL} --out {{result}}": "already contains a result",
    f"trace {MODEL}": "name a fact",
    f"trace {MODEL} --case 99999": "no case 99999",
    f"trace {MODEL} --prompt x --subject y --true a --false b": "occurs 0 times",
    f"trace {MODEL} --case 42 --scheme foo": "unknown scheme",
    f"trace {MODEL} --case 42 --top 0": "--top is 0",
    "trace --model ./nowhere --case 42": "does not exist",
    "compare {empty}": "takes two folders",
    "compare {empty} {empty} --out {result}": "already contains a result",
    "compare {empty} {empty} --max-rise 2": "--max-rise is 2.0; give a number between 0 and 1",
    "compare {empty} {empty} --equivalence 0": "--equivalence is 0.0",
    "report {result} --out {result}": "is a folder",
    "report {result} --out {malformed}": "already exists",
    "report {result} --out {out}/r.html": "there is no folder",
    "sweep nowhere.toml --out {out}": "cannot read the sweep",
    "sweep {malformed} --out {out}": "is not TOML",
    "sweep {sweep} --out {out}": "unknown scheme 'thinc'",
    "reproduce": "name an analysis",
    "reproduce fig33 --out {out}": "did you mean",
    "reproduce lemma5": "--out is missing",
    "reproduce fig1 --out {out} --model ./nowhere": "does not exist",
    "reproduce fig1 --out {out} --facts {malformed}": "is not valid JSON",
    "completion foo": "unknown shell",
}
"""Command line -> part of its message."""
OF_TORCH = {
    f"hijack {MODEL} --device tpu": "device",
    f"hijack {MODEL} --devices 99": "cannot spread the model over 99 GPUs",
    "reproduce lemma5 --out {out} --device tpu": "device",
    f"law {MODEL} --device tpu": "device",
    f"{TRAIN} --device tpu": "device",
    f"{TRAIN} --omega 2": "omega must lie in [0, 1]",
    f"{TRAIN} --lr -1": "lr is -1.0",
}
"""Mistakes that torch has to find, and values of the one-layer task and recipe."""
OF_RESULTS = {
    "report ./nowhere": "no result in './nowhere'",
    "report {empty}": "no result in",
    "compare ./nowhere {empty}": "no result in './nowhere'",
    "compare {run} {empty}": "it has no result.json",
    "compare {run} {trace}": "a TraceResult cannot be compared",
    "compare {run} {run} --dose 7": "unknown dose 7",
    "compare {run} {run} --scheme foo": "unknown scheme 'foo'",
    "compare {run} think 1": "cannot compare 'think' with 1",
    "compare {run} 0 1 --scheme foo": "unknown scheme 'foo'",
    "plan --power --like ./nowhere": "no result in 'nowhere'",
    "plan --power --change 2": "--change is 2.0",
}
"""Mistakes in folders of results, which are read with pandas."""
LARGE = ("transformers", "transformer_lens", "datasets")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("places")
    names = ("model", "empty", "result")
    for name in names:
        (root / name).mkdir()
    (root / "model" / "config.json").write_text("{}")
    (root / "result" / "result.json").write_text("{}")
    (root / "malformed").with_suffix(".json").write_text("{[")
    (root / "sweep.toml").write_text('[scoring]\nmodels = ["gpt2"]\nschemes = ["thinc"]\n')
    for name, kind in {"run": "scoring.result:HijackResult", "trace": "x:TraceResult"}.items():
        (root / name).mkdir()
        (root / name / "result.json").write_text(json.dumps({"type": f"hijacklens.{kind}"}))
    items = pd.DataFrame({"model": "m", "scheme": "do-not-think", "dose": [0, 1]})
    items.to_parquet(root / "run" / "items.parquet")
    paths = {name: root / name for name in (*names, "run", "trace", "out")}
    return {**paths, "malformed": root / "malformed.json", "sweep": root / "sweep.toml"}


@pytest.mark.parametrize(
    ("mistakes", "absent"),
    [
        (MISTAKES, ("torch", "pandas", "scipy", *LARGE)),
        (OF_TORCH, ("pandas", "scipy", *LARGE)),
        (OF_RESULTS, ("torch", *LARGE)),
    ],
    ids=["names, files, options", "devices, one-layer settings", "results"],
)
def test_a_mistake_is_refused_before_large_imports(mistakes, absent, places):
    calls = [[word.format(**places) for word in shlex.split(line)] for line in mistakes]
    done = subprocess.run(
        [sys.executable, "-c", PROCESS],
        input=json.dumps([calls, absent]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcomes, seconds = json.loads(done.stdout)
    wrong = {
        line: outcome
        for line, part, outcome in zip(mistakes, mistakes.values(), outcomes, strict=True)
        if outcome[0] != 2 or part not in outcome[1]
    }
    assert not wrong
    assert seconds < 20  # 2 alone; a hundred mistakes would take ten minutes with the imports
    assert not places["out"].exists()
