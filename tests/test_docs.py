"""What the pages say works: every command and snippet is run, every link leads somewhere.

The default run has tiny stand-ins for the models that are named and few facts; the tests marked
`packaged` run the same pages on the real packaged models.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import yaml
from documentation import (
    FEWER,
    ROOT,
    SMALL,
    Reader,
    assert_like,
    blocks,
    check_command,
    commands,
    steps,
)
from packaged_standins import StandIns

from hijacklens.errors import InputError
from hijacklens.models.packaged import PACKAGED, PackagedModel

DOCS = ROOT / "docs"
STUDIES = {
    "hijacking": "hours on real models; its commands are checked, not run",
    "circuits": "hours on real models; its commands are checked, not run",
    "one-layer": "trains for hours; its commands are checked, not run",
    "reproduction": "hours; its commands are checked, not run",
    "counterfact": "hours on real models; its commands are checked, not run",
    "defence": "hours on real models; its commands are checked, not run",
    "law": "an hour on real models; its commands are checked, not run",
    "world": "trains for an hour; its commands are checked, not run",
    "robustness.md": "a report of what was tried",
}
"""Pages that say what was done once, with the reason why it is not done again here."""


def _is_study(page: Path) -> bool:
    return page.relative_to(DOCS).parts[0] in STUDIES


ALL = sorted(DOCS.rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "AGENTS.md", *(page for page in ALL if not _is_study(page))]
RUN = [page for page in PAGES if any(steps(page))]
REPORTS = [page for page in ALL if _is_study(page)]
NOT_RUN = [block for page in PAGES for block in blocks(page) if "not run" in block.marks]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def standins(tmp_path_factory):
    return StandIns(tmp_path_factory.mktemp("standins"))


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder to work in, with a store and a registry of schemes of its own."""
    matplotlib.use("agg")
    schemes = importlib.import_module("hijacklens.prompts.schemes")
    monkeypatch.setattr(schemes, "REGISTRY", schemes.schemes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HIJACKLENS_STORE", str(tmp_path / "readings.sqlite"))
    return tmp_path


@pytest.fixture
def hub_of_pages(hub_server, standins):
    """The hub with the repositories that pages name; blocks with the mark `hub` reach it."""
    standins.serve(hub_server)


def read(page: Path, reader: Reader, *, slow: bool = False) -> None:
    """Run the blocks of a page in their order; slow ones only if asked to, with what they need."""
    for block, expected in steps(page):
        if file := block.marks.get("file"):
            Path(file).write_text(block.text, encoding="utf-8")
        elif "not run" in block.marks or ("slow" in block.marks and not slow):
            _check(block)
        else:
            reader.run(block, expected)


def _check(block) -> None:
    if block.language == "python":
        compile(block.text, block.place, "exec")
    else:
        for words in commands(block.text):
            check_command(words)


@pytest.mark.parametrize(
    "page",
    # The other pages run on the real models, in the long session.
    [p for p in RUN if p.stem == "getting-started"],
    ids=name,
)
def test_page_runs_as_it_stands(page, standins, hub_of_pages, elsewhere, monkeypatch):
    standins.install(monkeypatch)
    read(page, Reader(monkeypatch, SMALL))


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in RUN if any("slow" in b.marks for b in blocks(p))], ids=name
)
def test_long_commands_run_as_they_stand(page, standins, hub_of_pages, elsewhere, monkeypatch):
    standins.install(monkeypatch)
    read(page, Reader(monkeypatch, SMALL), slow=True)


@pytest.mark.packaged
@pytest.mark.parametrize("page", RUN, ids=name)
def test_page_runs_on_the_real_models(page, standins, hub_of_pages, elsewhere, monkeypatch):
    monkeypatch.setenv("HIJACKLENS_COUNTERFACT", str(standins.counterfact))
    read(page, Reader(monkeypatch, FEWER))


@pytest.mark.parametrize("page", REPORTS, ids=name)
def test_what_a_study_ran_still_exists(page):
    for block in blocks(page):
        if block.language in ("python", "sh"):
            _check(block)


def test_the_reference_lists_every_public_name(monkeypatch):
    """Run `python docs/site/names.py` if it does not."""
    monkeypatch.syspath_prepend(str(DOCS / "site"))
    names = importlib.import_module("names")
    _, _, listed = names.PAGE.read_text(encoding="utf-8").partition(names.START)
    sections = dict(re.findall(r"^### `([^`]+)`\n(.*?)(?=^###|\Z)", listed, re.M | re.S))
    assert list(sections) == list(names.DOORS.values())
    for door, statement in names.DOORS.items():
        rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", sections[statement], re.M)
        assert [name for name, _ in rows] == names.names(door), statement
        assert all(line.endswith((".", ":")) for _, line in rows), statement


def test_what_is_not_run_says_why():
    """A list to read with `pytest -rP`: nothing is left out without a reason."""
    for block in NOT_RUN:
        print(f"{block.place}: {block.marks['not run']}")
        assert len(block.marks["not run"]) > 10, block.place
    ran = sum(1 for page in RUN for block, _ in steps(page) if "not run" not in block.marks)
    assert ran > 5 * len(NOT_RUN)


def test_a_packaged_model_that_is_not_installed(monkeypatch):
    """The one message of the errors page that no block can bring about: the models are there."""
    monkeypatch.setattr(PackagedModel, "installed", False)
    with pytest.raises(InputError) as raised:
        PACKAGED["smollm2-135m"].folder()
    (shown,) = [
        block.text
        for block in blocks(DOCS / "reference" / "errors.md")
        if block.language == "text" and "is not installed" in block.text
    ]
    assert_like(str(raised.value), shown, "docs/reference/errors.md")


@pytest.mark.parametrize("page", [*PAGES, *REPORTS], ids=name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def site(tmp_path: Path) -> Path:
    """The site: the one `make docs` built if it is newer than its sources, else a new one."""
    built = ROOT / "build" / "site"
    sources = [path for path in (ROOT / "docs").rglob("*") if path.is_file()]
    newest = max(path.stat().st_mtime for path in [*sources, ROOT / "mkdocs.yml"])
    if (built / "index.html").exists() and (built / "index.html").stat().st_mtime > newest:
        return built
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    done = subprocess.run(
        [*build, "--site-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return tmp_path


@pytest.mark.slow
def test_the_site_asks_for_nothing_outside(tmp_path):
    folder = site(tmp_path)
    pages = list(folder.rglob("*.html"))
    assert len(pages) > len(PAGES) / 2
    assert (folder / "search" / "search_index.js").exists()  # the search of pages on the disk
    for page in pages:
        text = page.read_text(encoding="utf-8")
        # Scripts, styles, pictures and frames; a link that a reader follows may lead anywhere.
        loaded = re.findall(r"<(?:script|img|iframe|source)\b[^>]*?\bsrc=[\"']?([^\s\"'>]+)", text)
        loaded += re.findall(r"<link\b[^>]*?\bhref=[\"']?([^\s\"'>]+)", text)
        assert any("iframe-worker.js" in place for place in loaded), page
        outside = [place for place in loaded if re.match(r"(https?:)?//", place)]
        assert not outside, f"{page.name}: {outside}"
    for style in folder.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert not re.search(r"@import|url\([\"']?(?:https?:)?//", text), style


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_says_what_it_is(page):
    known = {"python", "sh", "text", "toml", "csv", "json", "pycon", "yaml"}
    for block in blocks(page):
        assert block.language in known, f"{block.place}: {block.language!r}"
        if block.language == "yaml":  # a workflow of GitHub Actions
            (job,) = yaml.safe_load(block.text)["jobs"].values()
            lines = [line for step in job["steps"] for line in commands(step.get("run", ""))]
            for words in lines:
                check_command(words if words[0] == "hijacklens" else [])
            assert ["hijacklens", "compare"] in [words[:2] for words in lines]
