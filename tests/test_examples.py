"""Examples run as they are: scripts and notebooks, and what is rendered is what the code says."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import jupytext
import pytest
from tiny_models import tiny_model, tiny_tokenizer

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.py"))
SCRIPTS = sorted((EXAMPLES / "scripts").glob("*.py"))
TITLES = {
    "1": "Hijack a model in five minutes",
    "2": "Which heads did it: from efficacy to heads",
    "3": "The one-layer model: from task to memory",
    "4": "Bring your own model, facts and scheme",
    "5": "From the one-layer model to language models",
    "6": "Which facts give way: laws of the shift",
    "7": "A world whose facts are known: switch the hijack off",
    "8": "What brings recall back, and what it costs",
}
QUICK = {
    "score": ["--limit", "6", "--out", "out"],
    "probe": ["--limit", "4"],
    "trace": ["--case", "76", "--out", "shift.png"],
    "head_search": ["--limit", "16", "--size", "2", "--random-sets", "1"],
    "patching_sweep": ["--limit", "4", "--out", "sweep.svg"],
    "own_scheme_and_facts": [],
    "train_one_layer": ["--bits", "3", "--length", "8", "--steps", "5", "--out", "out"],
    "replace_memory": ["--steps", "3"],
    "reproduce_figure": ["lemma5", "--out", "figure.png"],
    "report": ["--limit", "6"],
    "views_page": ["--picture", "layer.png"],
}
"""Script -> arguments with which it is quick on a tiny model."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model in a folder, as a model of one's own would lie there."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model("llama").save_pretrained(path)
    tiny_tokenizer("llama").save_pretrained(path)
    return path


@pytest.fixture
def own_schemes(monkeypatch):
    """Schemes that an example adds are gone after it."""
    module = import_module("hijacklens.prompts.schemes")  # the name in the package is a function
    monkeypatch.setattr(module, "REGISTRY", dict(module.REGISTRY))


def takes_model(script: Path) -> bool:
    return '"--model"' in script.read_text(encoding="utf-8")


def run_script(script: Path, arguments, monkeypatch, folder: Path | None = None) -> None:
    given = [*arguments, *(["--model", str(folder)] if folder and takes_model(script) else [])]
    monkeypatch.setattr(sys, "argv", [str(script), *given])
    exec(compile(script.read_text(encoding="utf-8"), str(script), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_run_on_a_tiny_model(script, folder, tmp_path, monkeypatch, capsys, own_schemes):
    monkeypatch.chdir(tmp_path)
    run_script(script, QUICK[script.stem], monkeypatch, folder)
    assert capsys.readouterr().out.strip()
    for name in [word for word in QUICK[script.stem] if "." in word or word == "out"]:
        assert (tmp_path / name).exists()


@pytest.mark.packaged
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_run_by_themselves(script, tmp_path):
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_scripts_are_short_and_explained():
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert {script.stem for script in SCRIPTS} == set(QUICK)
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 60, script.name
        assert text.startswith('"""') and "python examples/scripts/" + script.name in text
        assert f"(scripts/{script.name})" in readme


def code_cells(notebook: Path) -> list[str]:
    cells = jupytext.read(notebook).cells
    return [cell.source for cell in cells if cell.cell_type == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_rendered_pages_hold_the_code_of_their_notebooks(notebook):
    page = EXAMPLES / "rendered" / f"{notebook.stem}.md"
    assert page.exists(), f"render it: make notebooks, or python examples/render.py {notebook.stem}"
    text = page.read_text(encoding="utf-8")
    shown = re.findall(r"^```python\n(.*?)\n```$", text, re.DOTALL | re.MULTILINE)
    wanted = [
        "\n".join(line.rstrip() for line in cell.splitlines()) for cell in code_cells(notebook)
    ]
    assert shown == wanted, f"out of date: python examples/render.py {notebook.stem}"
    pictures = re.findall(r"!\[figure\]\((.*?)\)", text)
    assert pictures and all((page.parent / picture).exists() for picture in pictures)
    kept = {f"{notebook.stem}/{path.name}" for path in (page.parent / notebook.stem).iterdir()}
    assert kept == set(pictures)
    assert sum((page.parent / picture).stat().st_size for picture in pictures) < 400_000


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_for_colab_install_first_and_hold_the_same_cells(notebook):
    install, *cells = jupytext.read(EXAMPLES / "colab" / f"{notebook.stem}.ipynb").cells
    assert "%pip install -q hijacklens" in install.source
    wanted = [(cell.cell_type, cell.source) for cell in jupytext.read(notebook).cells]
    assert [(cell.cell_type, cell.source) for cell in cells] == wanted, "python examples/render.py"


def test_notebooks_have_their_titles():
    assert [path.name[0] for path in NOTEBOOKS] == list(TITLES)
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        title = f"# # {path.name[0]} · {TITLES[path.name[0]]}"
        assert title in path.read_text(encoding="utf-8")
        assert f"(rendered/{path.stem}.md)" in readme


@pytest.mark.packaged
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_in_a_kernel(notebook, tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "render.py"), notebook.stem, "--to", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / f"{notebook.stem}.md").stat().st_size > 2000
