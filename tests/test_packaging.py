"""What is built: a wheel and a source archive that hold what is needed, and a wheel that works."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from sample_facts import sample_facts
from tiny_models import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow  # two builds, in separate processes

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("hijacklens", "probes", "analyses")


def build(source: Path, out: Path, *what: str) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *what]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the source archive, and the wheel built from that."""
    out = tmp_path_factory.mktemp("dist")
    build(ROOT, out)
    return out


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (path,) = built.glob("*.whl")
    return path


def contents(path: Path) -> dict[str, bytes]:
    """The files of a wheel; RECORD apart, which lists the others."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith("RECORD")]
        return {name: archive.read(name) for name in names}


def test_the_wheel_holds_every_file_of_the_three_packages_and_no_other(wheel):
    there = {
        str(path.relative_to(ROOT))
        for floor in FLOORS
        for path in (ROOT / floor).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    held = {name for name in contents(wheel) if ".dist-info/" not in name}
    assert held == there
    assert {f"{floor}/py.typed" for floor in FLOORS} <= held  # type information ships
    assert {"hijacklens/facts/atlas.csv", "hijacklens/__init__.pyi"} <= held
    assert {"hijacklens/report/page.html", "hijacklens/views/page.html"} <= held  # templates


def test_the_wheel_says_what_it_is(wheel):
    found = contents(wheel)
    (info,) = {name.split("/")[0] for name in found if ".dist-info/" in name}
    text = found[f"{info}/METADATA"].decode()
    assert found[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    for line in ("License-Expression: MIT", "Classifier: Typing :: Typed", "Name: hijacklens"):
        assert line in text
    assert re.search(r"^Requires-Dist: transformer-lens<5,>=3\.9$", text, re.MULTILINE)
    assert (ROOT / "README.md").read_text(encoding="utf-8") in text
    points = found[f"{info}/entry_points.txt"].decode()
    assert "hijacklens = analyses.commands:main" in points
    assert "[inspect_ai]\nhijacklens = analyses.adapters.inspect_ai" in points


def test_the_source_archive_holds_what_the_readme_shows_and_the_tests(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    shown = {link for link in links if not link.startswith("http")}
    assert shown
    assert shown <= names
    assert {
        "Makefile",
        "constraints.txt",
        "inspect.txt",
        "models.txt",
        "tests/conftest.py",
    } <= names
    assert not {name for name in names if name.startswith(("runs/", ".venv", "dist/", ".git/"))}


def test_the_wheel_of_the_source_archive_is_that_of_the_checkout(built, wheel, tmp_path):
    build(ROOT, tmp_path, "--wheel")
    (other,) = tmp_path.glob("*.whl")
    assert other.name == wheel.name
    assert contents(other) == contents(wheel)


def test_the_wheel_does_the_main_job_in_an_environment_of_its_own(wheel, tmp_path):
    """The dependencies are those of this environment; the project comes from the wheel alone."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    python, program = home / "bin" / "python", home / "bin" / "hijacklens"

    def run(*command: object) -> str:
        done = subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", wheel)
    # Folders named there are searched, but their own .pth files (an editable project) are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    places = run(
        python, "-c", "import hijacklens, probes, analyses as a\n"
        "print(hijacklens.__file__, probes.__file__, a.__file__, hijacklens.atlas(), sep='\\n')"
    ).splitlines()  # fmt: skip
    assert all(place.startswith(str(site)) for place in places[:3])
    assert "958 facts" in places[3]
    assert "Score how often recall of facts fails" in run(program, "--help")
    tiny_model("gpt2").save_pretrained(tmp_path / "tiny")
    tiny_tokenizer("gpt2").save_pretrained(tmp_path / "tiny")
    table = sample_facts().to_dataframe().drop(columns="prompt")
    table.to_json(tmp_path / "facts.jsonl", orient="records", lines=True)
    options = ["--facts", "facts.jsonl", "--doses", "0-1", "--quiet", "--no-cache", "--out", "out"]
    printed = run(program, "hijack", "--model", "tiny", *options)
    assert "tiny · facts.jsonl, 10 facts · do-not-think · rule first" in printed
    assert (tmp_path / "out" / "result.json").exists()
    (tmp_path / "typed.py").write_text(
        "import hijacklens as hl\nmodel, facts = hl.load_model('tiny'), hl.atlas()\n"
        "reveal_type(hl.hijack(model, facts, doses=[1]))\n"
        "reveal_type(hl.hijack(model, facts, chat=hl.Chat()))\nreveal_type(facts.sample)\n"
    )
    types = run(sys.executable, "-m", "pyright", "--pythonpath", python, tmp_path / "typed.py")
    assert types.count('is "HijackResult"') == 2
    assert "-> FactSet" in types
