"""Every number equals the plain model's, or is refused: some families."""

from __future__ import annotations

import json

import pytest
from rows import subject

from analyses.commands.group import main
from analyses.conformance.cells import CELLS, MOVED, OF_NAMED, Check, Outcome

FIRST = ("gpt2", "gemma3", "gpt_oss")
"""In the default tests; cells that load the model again are left out."""
QUICK = (
    "gpt2:inverse layer scale", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "codegen", "opt",
    "xglm", "bloom", "mpt", "falcon", "llama:yarn", "mistral", "mixtral", "qwen2_moe:mixed",
    "qwen3:window", "qwen3_next", "gemma2", "phi3", "olmo2", "granite", "cohere", "deepseek_v2",
    "jamba", "mamba",
)  # fmt: skip
"""In the long tests, with all cells."""
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


def test_the_command_prints_the_row_of_a_model(tmp_path, capsys):
    subject("llama").make().save_pretrained(tmp_path)
    subject("llama").tokenizer.save_pretrained(tmp_path)
    main(["models", "--check", str(tmp_path), "--json"])
    cells = json.loads(capsys.readouterr().out)["check"]
    assert [cell["cell"] for cell in cells] == list(OF_NAMED)
    assert {cell["state"] for cell in cells} == {"equal"}
