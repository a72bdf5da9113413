"""Every number equals the plain model's, or is refused: some families, and the page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from rows import ROWS, subject
from special import subjects

from analyses.commands.group import main
from analyses.conformance.cells import CELLS, FACTS, MOVED, OF_NAMED, Check, Outcome
from hijacklens.errors import InputError
from hijacklens.probe import HookProbe
from hijacklens.scoring.execution import Execution
from hijacklens.scoring.hijack import hijack

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "families.md"

FIRST = ("gpt2", "gemma3", "gpt_oss")
"""In the default tests; cells that load the model again are left out."""
QUICK = (
    "gpt2:inverse layer scale", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "codegen", "opt",
    "xglm", "bloom", "mpt", "falcon", "llama:yarn", "mistral", "mixtral", "qwen2_moe:mixed",
    "qwen3:window", "qwen3_next", "gemma2", "phi3", "olmo2", "granite",
    "granitemoehybrid:nope", "cohere", "deepseek_v2", "jamba", "mamba",
)  # fmt: skip
"""In the long tests, with all cells."""
SPECIAL = (
    "adapter on gpt2's c_attn", "adapter on llama's q_proj and v_proj", "hook on llama's v_proj",
    "hook before gpt2's attention", "forward of llama's attention replaced",
    "subclass of llama's norms", "one layer of llama used twice", "parametrised v_proj of llama",
    "embedding smaller than the tokenizer", "llava",
    "weight of gpt_neox's query_key_value changed after loading",
)  # fmt: skip
"""Special cases in the long tests."""
CHEAP = [cell for cell in CELLS if cell not in ("bfloat16", "folder")]


def assert_holds(outcomes: dict[str, Outcome]) -> None:
    """No number is wrong, no error obscure, and every change moved the plain model."""
    for cell, outcome in outcomes.items():
        assert outcome.state not in ("wrong", "obscure"), (cell, outcome)
        if outcome.state == "equal" and outcome.moved is not None:
            assert outcome.moved > MOVED, (cell, outcome)


@pytest.mark.parametrize("name", FIRST)
def test_a_family_is_equal_to_its_plain_model(name):
    outcomes = Check(subject(name)).run(CHEAP)
    assert {outcome.state for outcome in outcomes.values()} == {"equal"}, outcomes
    assert_holds(outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_a_family_is_equal_or_refused(name):
    assert_holds(Check(subject(name)).run())


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECIAL)
def test_a_special_case_is_equal_or_refused(name):
    assert_holds(Check(subjects()[name]).run(CHEAP))


def test_a_hook_that_never_runs_is_refused():
    silent = HookProbe("silent", [("hook_pos_embed", lambda value, hook: value)])
    with pytest.raises(InputError, match="does not reach its hook point"):
        hijack(subject("llama").load(), FACTS, probes=[silent], execution=Execution(store=False))


def test_the_command_prints_the_row_of_a_model(tmp_path, capsys):
    subject("llama").make().save_pretrained(tmp_path)
    subject("llama").tokenizer.save_pretrained(tmp_path)
    main(["models", "--check", str(tmp_path), "--json"])
    cells = json.loads(capsys.readouterr().out)["check"]
    assert [cell["cell"] for cell in cells] == list(OF_NAMED)
    assert {cell["state"] for cell in cells} == {"equal"}


def test_the_page_has_every_row_of_the_matrix():
    named = re.findall(r"^\| ([^|]+?) \|", PAGE.read_text(encoding="utf-8"), re.M)
    headings = ("family", "case", "---")
    assert [name for name in named if name not in headings] == [*ROWS, *subjects()]
