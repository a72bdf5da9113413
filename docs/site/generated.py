"""Content that is added when the site is built: lists of options and names, and the notebooks.

A comment on a separate line of a page, such as `<!-- generated: commands -->`, is replaced by a list
that is read from the commands and registries, so it is always current. Text in italics before it is
for readers of the plain file, and is replaced too. Every study (a folder of
docs/ with a README.md) and every rendered notebook of examples/ is added to the navigation.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

DOCS = Path(__file__).resolve().parents[1]
NOTEBOOKS = DOCS.parent / "examples" / "rendered"
COLAB = "https://colab.research.google.com/github/{}/blob/main/examples/colab/{}"
ASKED = re.compile(r"^(?:\*.*\* )?<!-- generated: ([a-z-]+) -->$", re.M)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add pages to the navigation that are missing in it; MkDocs calls this first."""
    assert config.nav is not None
    sections = {name: pages for entry in config.nav for name, pages in entry.items()}
    listed = str(config.nav)
    for page in sorted([*DOCS.glob("*/README.md"), *DOCS.glob("*.md")]):
        place = page.relative_to(DOCS).as_posix()
        if place not in listed:
            sections["Studies"].append({_title(page): place})
    notebooks = [{_title(page): f"notebooks/{page.name}"} for page in _notebooks()]
    if notebooks:
        config.nav.insert(-1, {"Notebooks": notebooks})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the notebooks with their pictures; MkDocs calls this with the files of the site."""
    for page in _notebooks():
        for path in (page, *sorted(page.with_suffix("").glob("*.png"))):
            name = f"notebooks/{path.relative_to(NOTEBOOKS).as_posix()}"
            files.append(File.generated(config, name, abs_src_path=str(path)))
        colab = NOTEBOOKS.with_name("colab") / f"{page.stem}.ipynb"
        name = f"notebooks/{colab.name}"
        files.append(File.generated(config, name, abs_src_path=str(colab)))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, **kwargs: Any) -> str:
    """Replace the comments by their lists; MkDocs calls this for every page."""
    if page.file.src_uri.startswith("notebooks/"):
        name = f"{page.file.name}.ipynb"
        title, rest = markdown.split("\n", 1)
        links = f"[Download the notebook]({name}){{ .md-button download }}"
        if repository := config.extra.get("repository"):
            links += f" [Open in Colab]({COLAB.format(repository, name)}){{ .md-button }}"
        markdown = f"{title}\n\n{links}\n{rest}"

    def put(match: re.Match[str]) -> str:
        return MAKERS[match[1]]()

    return ASKED.sub(put, markdown)


def commands() -> str:
    """Return every command with its options, from click."""
    from analyses.commands.group import group

    context = click.Context(group, info_name="hijacklens")
    parts = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        parts.append("\n".join(_command(command, context, name)))
    return "\n\n".join(parts)


def schemes() -> str:
    """Return the table of the built-in schemes."""
    from hijacklens.prompts.schemes import schemes as registered

    return _table(
        ("scheme", "direction", "sentence", "what it is"),
        [
            (
                f"`{scheme.name}`",
                scheme.direction,
                scheme.template or "one per relation",
                scheme.summary,
            )
            for scheme in registered().values()
        ],
    )


def placeholders() -> str:
    """Return the table of the placeholders of a template."""
    from hijacklens.prompts.schemes import PLACEHOLDERS

    rows = [(f"`{{{name}}}`", meaning) for name, meaning in PLACEHOLDERS.items()]
    return _table(("placeholder", "replaced by"), rows)


def probes() -> str:
    """Return the table of the kinds of probes that can be written as text."""
    from probes.specification import KINDS

    return _table(
        ("kind", "what it does", "example"),
        [(f"`{kind.name}`", kind.summary, f"`--probe {kind.example}`") for kind in KINDS.values()],
    )


def methods() -> str:
    """Return the table of the registered methods against the hijack."""
    from analyses.defence import METHODS

    return _table(
        ("method", "changes", "needs to know", "source"),
        [(f"`{x.name}`", x.changes, x.needs, x.source) for x in METHODS.values()],
    )


def analyses() -> str:
    """Return the table of the figures and statements that can be reproduced."""
    from analyses.reproduction.catalogue import CATALOGUE

    return _table(
        ("id", "reference", "what", "quick", "full"),
        [
            (f"`{item.id}`", item.reference, item.title, item.quick, item.full)
            for item in CATALOGUE.values()
        ],
    )


def ours() -> str:
    """Return the table of the settings of a recipe that the paper does not state."""
    from hijacklens.one_layer.recipe import OUR_DEFAULTS

    items = OUR_DEFAULTS.items() if isinstance(OUR_DEFAULTS, dict) else enumerate(OUR_DEFAULTS)
    return _table(("setting", "our default"), [(f"`{name}`", str(text)) for name, text in items])


def _notebooks() -> list[Path]:
    return sorted(NOTEBOOKS.glob("*.md"))


def _title(page: Path) -> str:
    """Return the first heading of a page, without the kind of page ("Study: ")."""
    first = next(line for line in page.read_text(encoding="utf-8").splitlines() if line[:2] == "# ")
    title = first.removeprefix("# ").removeprefix("Study: ").strip()
    return title[:1].upper() + title[1:]


def _command(command: click.Command, parent: click.Context, name: str) -> Iterator[str]:
    context = click.Context(command, info_name=name, parent=parent)
    yield f"## {context.command_path}\n"
    yield f"```text\n{' '.join(command.get_usage(context).removeprefix('Usage: ').split())}\n```\n"
    yield from _help(command.help or "")
    rows = [
        _option(option, context)
        for option in command.get_params(context)
        if isinstance(option, click.Option) and not option.hidden and option.name != "help"
    ]
    if rows:
        yield _table(("option", "default", "meaning"), rows) + "\n"
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            assert found is not None
            for line in _command(found, context, child):
                yield line.replace("## ", "### ", 1) if line.startswith("## ") else line


def _help(text: str) -> Iterator[str]:
    r"""Return the paragraphs of a command's help; indented lines after \b become code."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        kept, _, body = paragraph.rpartition("\b\n")
        lines = (body or kept).splitlines()
        code = [line for line in lines if line.startswith("  ")]
        words = [line for line in lines if not line.startswith("  ")]
        if words:
            yield _escaped(" ".join(words)) + "\n"
        if code:
            yield "```sh\n" + inspect.cleandoc("\n".join(code)) + "\n```\n"


def _option(option: click.Option, context: click.Context) -> tuple[str, str, str]:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    kind = "" if option.is_flag else option.make_metavar(context)
    record = option.get_help_extra(context)
    default = "required" if option.required else str(record.get("default", ""))
    text = re.sub(r"\s*\[default: (.*?)\]$", "", option.help or "")
    if said := re.search(r"\[default: (.*?)\]$", option.help or ""):
        default = said[1]
    return f"{names} {_escaped(kind)}".strip(), _escaped(default), _escaped(text)


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _escaped(text: str) -> str:
    """Escape angle brackets, which would be read as markup, except in backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else part.replace("<", "&lt;").replace(">", "&gt;")
        for part in parts
    )


MAKERS: dict[str, Callable[[], str]] = {
    maker.__name__: maker
    for maker in (commands, schemes, placeholders, probes, methods, analyses, ours)
}
"""Name in a comment -> what makes the text."""
