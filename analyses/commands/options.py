"""Options that several commands share, and the records that carry their values to a command.

>>> @click.command()
... @facts_options
... def count(facts: FactsChoice) -> None:
...     click.echo(f"{len(facts.load())} facts")
>>> count.main(["--relation", "P36", "--limit", "5"], standalone_mode=False)
5 facts
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from analyses.commands import names
from analyses.commands.resumption import is_unfinished, usual_folder
from analyses.texts import choose_facts, read_doses
from hijacklens.errors import InputError, unknown
from hijacklens.files import check_folder

if TYPE_CHECKING:
    from hijacklens.facts.fact import Fact, FactSet
    from hijacklens.prompts.schemes import Scheme
    from hijacklens.scoring.execution import Execution
    from probes.specification import Specification

Command = TypeVar("Command", bound=Callable[..., Any])

option = partial(click.option, show_default=True)
"""`click.option` with the default in the help."""


class RenamedOption(click.Option):
    """An option whose old name works for one release; `group` prints a note when it is used."""

    def __init__(self, *arguments: Any, formerly: str, **settings: Any) -> None:
        """Take the arguments of `click.Option` and the old name, such as `--way`."""
        super().__init__(*arguments, **settings)
        self.formerly = formerly


def collected(
    name: str, kind: type, *options: Callable[[Command], Command]
) -> Callable[[Command], Command]:
    """Return a decorator that adds options and passes their values to the command as one record.

    Args:
        name: The parameter of the command that takes the record.
        kind: A dataclass whose fields are named as the options. Options that a command does not
            offer keep the default of their field.
        options: Made by `click.option`, in the order of the help.
    """

    def decorate(command: Command) -> Command:
        @wraps(command)
        def call(*context: Any, **values: Any) -> Any:
            offered = [field.name for field in fields(kind) if field.name in values]
            record = kind(**{key: values.pop(key) for key in offered})
            return command(*context, **values, **{name: record})

        for add in reversed(options):
            add(call)  # type: ignore[type-var]
        return call  # type: ignore[return-value]

    return decorate


@dataclass(frozen=True, slots=True, kw_only=True)
class FactsChoice:
    """A set of facts: where it comes from, which of its facts, and a seed."""

    source: str
    relations: tuple[str, ...]
    cases: tuple[int, ...]
    limit: int | None
    seed: int

    def load(self) -> FactSet:
        """Read the facts and draw the sample."""
        return choose_facts(self.source, self.relations, self.cases, self.limit, self.seed)


facts_options = collected(
    "facts",
    FactsChoice,
    option(
        "--facts",
        "source",
        default="atlas",
        metavar="SOURCE",
        shell_complete=names.facts,
        help="atlas (embedded), counterfact, a file (.json, .jsonl, .csv, .parquet), or a hub id.",
    ),
    option(
        "--relation",
        "relations",
        multiple=True,
        metavar="P",
        shell_complete=names.relations,
        help="Only facts of this relation, such as P190. Repeatable.",
    ),
    option("--case", "cases", type=int, multiple=True, help="Only this case id. Repeatable."),
    option("--limit", type=int, metavar="N", help="A seeded sample of N facts."),
    option(
        "--seed",
        type=int,
        default=0,
        help="Seed for the sample of --limit and for the random sentences of some schemes.",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFact:
    """A fact written as options."""

    prompt: str | None
    subject: str | None
    target_true: str | None
    target_false: str | None
    relation: str

    def require(self, what: str, needed: Iterable[str]) -> None:
        """Refuse a fact that lacks some of its parts.

        Args:
            what: What needs them, for the message.
            needed: Names of fields.
        """
        options = {"target_true": "--true", "target_false": "--false"}
        missing = [options.get(name, f"--{name}") for name in needed if not getattr(self, name)]
        if missing:
            raise InputError(f"{what} needs {' and '.join(missing)}.")

    def fact(self) -> Fact:
        """Return the fact. A missing target becomes a placeholder text.

        Raises:
            InputError: The subject does not occur exactly once in the prompt.
        """
        from hijacklens.facts.fact import Fact
        from hijacklens.facts.relations import country_of_language

        prompt, subject = self.prompt or "", self.subject
        if subject and prompt.count(subject) != 1:
            raise InputError(
                f"the subject {subject!r} occurs {prompt.count(subject)} times in the prompt; it "
                "must occur once."
            )
        countries = country_of_language()
        return Fact(
            case_id=0,
            relation_id=self.relation,
            subject=subject or prompt,
            template=prompt.replace(subject, "{}") if subject else "{}",
            target_true=self.target_true or "(no true target)",
            target_false=self.target_false or "(no false target)",
            near_true=countries.get(self.target_true or ""),
            near_false=countries.get(self.target_false or ""),
        )


written_fact_options = collected(
    "written",
    WrittenFact,
    option("--subject", metavar="TEXT", help="The subject, which must occur once in the prompt."),
    option("--true", "target_true", metavar="TEXT", help="The true target."),
    option("--false", "target_false", metavar="TEXT", help="The false target."),
    option(
        "--relation",
        metavar="P",
        default="",
        shell_complete=names.relations,
        help="The relation id, for the scheme `relation`.",
    ),
)
"""The parts of a fact other than its prompt, which a command takes as its own parameter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemesChoice:
    """Schemes and doses."""

    schemes: tuple[str, ...]
    templates: tuple[str, ...]
    doses: str

    def load(self) -> list[Scheme]:
        """Return the schemes; by default `do-not-think`.

        Raises:
            InputError: A scheme is unknown, or a template has no name or a taken one.
        """
        from hijacklens.prompts.schemes import Scheme, get_scheme, schemes

        written = [
            Scheme(name=name, template=text) for name, text in map(read_template, self.templates)
        ]
        for scheme in written:
            if scheme.name in schemes():
                raise InputError(f"--template: scheme {scheme.name!r} exists; choose another name.")
        return [*map(get_scheme, self.schemes), *written] or [get_scheme("do-not-think")]

    @property
    def counts(self) -> tuple[int, ...]:
        """The doses as numbers."""
        return read_doses(self.doses)


schemes_options = collected(
    "prompts",
    SchemesChoice,
    option(
        "--scheme",
        "schemes",
        multiple=True,
        metavar="S",
        shell_complete=names.schemes,
        help="A scheme (`hijacklens schemes`). Repeatable.  [default: do-not-think]",
    ),
    option(
        "--template",
        "templates",
        multiple=True,
        metavar="NAME=TEXT",
        help="A scheme of your own: 'never-say=Never say {target_false}.' Repeatable.",
    ),
    option(
        "--doses",
        default="0-5",
        help="How many sentences precede the query: a range or a list. 0 is always scored.",
    ),
)


def read_template(text: str) -> tuple[str, str]:
    """Return the name and the template of a scheme written as `name=template`.

    >>> read_template("never-say=Never say {target_false}.")
    ('never-say', 'Never say {target_false}.')
    """
    name, equals, template = text.partition("=")
    if not equals:
        raise InputError(
            f"--template {text!r} has no name; write it as 'never-say=Never say {{target_false}}.'"
        )
    return name.strip(), template.strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChoice:
    """How a model is loaded."""

    dtype: str
    device: str | None
    devices: int
    revision: str | None
    trust_remote_code: bool = False

    def load(self, name: str) -> Any:
        """Load a model."""
        from hijacklens.models.loading import load_model

        return load_model(name, **asdict(self))

    def loader(self, name: str) -> Any:
        """Return what loads a model later, in this process or on a worker."""
        from hijacklens.workers.replica import ModelLoader

        return ModelLoader(name, **asdict(self))


model_options = collected(
    "loading",
    ModelChoice,
    option(
        "--dtype",
        default="float32",
        help="float32, bfloat16 or float16. The softmax is always float32.",
    ),
    option("--device", help="cpu, cuda, cuda:1, ...  [default: a GPU if there is one]"),
    option("--devices", type=int, default=1, help="Spread the layers over this many GPUs."),
    option("--revision", metavar="REV", help="Branch, tag or commit of a hub model."),
    option(
        "--trust-remote-code",
        is_flag=True,
        help="Run code that comes with the model. Read it first.",
    ),
)

_MODEL: dict[str, Any] = {
    "required": True,
    "metavar": "M",
    "shell_complete": names.models,
    "help": "A packaged model (`hijacklens models`), a folder, or a hub id.",
}
model_option = option("--model", "name", **_MODEL)
models_option = option(
    "--model", "models", multiple=True, **{**_MODEL, "help": f"{_MODEL['help']} Repeatable."}
)


def _read_probes(*click_arguments: Any) -> list[Specification]:
    """Read the texts of --probe, and check them as far as possible without a model."""
    texts = click_arguments[-1]
    if not texts:
        return []
    from probes.specification import parse

    return [parse(text) for text in texts]


probes_option = option(
    "--probe",
    "probes",
    multiple=True,
    callback=_read_probes,
    metavar="KIND:OPTIONS",
    shell_complete=names.probes,
    help="Change the model while it is scored: `hijacklens probes` lists the kinds with an "
    "example of each. Repeatable; probes act in order.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionChoice:
    """How scores are computed; see `hijacklens.scoring.execution.Execution`."""

    batch_tokens: int | None = None
    sharing: Any = "auto"
    engine: str = "local"
    workers: int | None = None
    ray_address: str | None = None
    no_cache: bool = False

    def load(self) -> Execution:
        """Return the record that the library takes.

        Raises:
            InputError: The engine is unknown, or the local one is given options of Ray.
        """
        if self.engine not in ("local", "ray"):
            raise unknown("engine", self.engine, ("local", "ray"))
        if self.engine == "local":
            for option, value in (("--workers", self.workers), ("--ray-address", self.ray_address)):
                if value is not None:
                    raise InputError(f"{option} {value} needs --engine ray; the engine is local.")
        from hijacklens.scoring.execution import Execution
        from hijacklens.workers.workers import RayEngine

        return Execution(
            sharing=self.sharing,
            engine=RayEngine(workers=self.workers, address=self.ray_address)
            if self.engine == "ray"
            else "local",
            store=not self.no_cache,
            batch_tokens=self.batch_tokens,
        )


batch_tokens_option = option(
    "--batch-tokens",
    type=int,
    metavar="N",
    help="Tokens in a batch, padding included; a smaller batch needs less memory.",
)
sharing_option = option(
    "--sharing",
    cls=RenamedOption,
    formerly="--way",
    type=click.Choice(["auto", "plain", "packed", "cached"]),
    default="auto",
    help="How prompts share computed prefixes; auto takes the cheapest.",
)
_engine = (
    option(
        "--engine",
        default="local",
        help="local, or ray: many GPUs or machines (pip install 'hijacklens[ray]').",
    ),
    option(
        "--workers",
        type=int,
        metavar="N",
        help="Workers of --engine ray.  [default: one per GPU, or per four cores]",
    ),
    option(
        "--ray-address",
        metavar="ADDRESS",
        help="Join this Ray cluster (auto, or host:port).  [default: one on this machine]",
    ),
    option(
        "--no-cache",
        is_flag=True,
        help="Do not use the store of finished readings (`hijacklens cache`); compute everything.",
    ),
)
engine_options = collected("execution", ExecutionChoice, *_engine)
execution_options = collected(
    "execution", ExecutionChoice, batch_tokens_option, sharing_option, *_engine
)
batch_options = collected("execution", ExecutionChoice, batch_tokens_option)


rule_option = option(
    "--rule",
    type=click.Choice(["first", "sum", "mean"]),
    default="first",
    help="How targets are scored in the printed tables; the files hold all three rules.",
)
overwrite_option = option("--overwrite", is_flag=True, help="Replace an existing result.")


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderChoice:
    """The folder for the files of a command."""

    out: Path | None
    overwrite: bool

    def check(self, label: str, *, models: tuple[str, ...] = ()) -> Path:
        """Return the folder after checking that the command may write into it.

        Args:
            label: Names the folder if no --out is given.
            models: The models of a run that may have been interrupted; it is resumed.

        Raises:
            InputError: The folder holds a result, or is a file.
        """
        folder = self.out or usual_folder(label, overwrite=self.overwrite, models=models)
        unfinished = is_unfinished(folder, models)
        return check_folder(folder, overwrite=self.overwrite or unfinished)


def folder_options(label: str) -> Callable[[Command], Command]:
    """Return the options --out and --overwrite.

    Args:
        label: What the default folder is called, after the date.
    """
    return collected(
        "folder",
        FolderChoice,
        option(
            "--out",
            type=click.Path(path_type=Path),
            help=f"Folder for the files.  [default: runs/<date>-{label}, then -2, ...]",
        ),
        overwrite_option,
    )
