"""Options that several commands share, as records declared by `analyses.commands.declarations`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from analyses.commands import names
from analyses.commands.declarations import RenamedOption, Whole, option
from analyses.texts import read_doses
from hijacklens.errors import InputError
from hijacklens.files import RECORD, check_folder, expand_home, json_text

if TYPE_CHECKING:
    from hijacklens.facts.chat import Chat
    from hijacklens.facts.fact import FactSet
    from hijacklens.prompts.schemes import Scheme
    from hijacklens.scoring.execution import Execution

scheme_option = partial(option, metavar="S", shell_complete=names.schemes)
model_option = partial(option, metavar="M", shell_complete=names.models)
relation_option = partial(option, metavar="P", shell_complete=names.relations)
source_option = partial(option, metavar="SOURCE", shell_complete=names.facts)


def _check_out(context: Any, parameter: Any, folder: Path | None) -> Path | None:
    """Refuse a folder that cannot be written to, before anything is loaded or computed."""
    if folder is not None and not context.resilient_parsing:
        check_folder(folder, overwrite=True)
    return folder


out_option = partial(option, callback=_check_out)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptForm:
    """How facts are written as prompts."""

    joining: Annotated[
        Literal["auto", "space", "none"],
        option("How a target joins its prompt: auto decides by the end of the prompt."),
    ] = "auto"
    opening: Annotated[
        str,
        option(
            "A neutral text before every prompt, such as 'Well.', or a special token.",
            metavar="TEXT",
        ),
    ] = ""
    hijack: Annotated[
        Literal["user", "system", "earlier"] | None,
        option("Ask in the model's chat template, with the sentences in this turn.", "--chat"),
    ] = None
    query: Annotated[
        Literal["user", "assistant"] | None,
        option(
            "With --chat: whose turn has the query; the assistant's is continued.  [default: user]"
        ),
    ] = None
    system: Annotated[str | None, option("With --chat: the system turn.", metavar="TEXT")] = None
    instruction: Annotated[
        str | None,
        option("With --chat: what precedes the query in the user's turn.", metavar="TEXT"),
    ] = None

    @property
    def chat(self) -> Chat | None:
        """The chat, if there is one.

        Raises:
            InputError: An option of a chat is given without --chat.
        """
        from hijacklens.facts.chat import Chat

        names = ("query", "system", "instruction")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.hijack is not None:
            return Chat(hijack=self.hijack, **given)
        if given:
            name = next(iter(given))
            raise InputError(f"--{name} needs --chat user, --chat system or --chat earlier.")
        return None

    def write(self, facts: FactSet) -> FactSet:
        """Return the facts with this form."""
        return replace(facts, joining=self.joining).with_opening(self.opening).in_chat(self.chat)


@dataclass(frozen=True, slots=True, kw_only=True)
class FactsChoice(PromptForm):
    """A set of facts: where it comes from, which of its facts, and a seed."""

    source: Annotated[
        str,
        source_option(
            "atlas (embedded), counterfact, a file (.json, .jsonl, .csv, .tsv, .parquet), or a hub "
            "id.",
            "--facts",
        ),
    ] = "atlas"
    relations: Annotated[
        tuple[str, ...],
        relation_option(
            "Only facts of this relation, by id or name (P36, capital). Repeatable.", "--relation"
        ),
    ] = ()
    cases: Annotated[tuple[int, ...], option("Only this case id. Repeatable.", "--case")] = ()
    limit: Annotated[
        int | None, option("A seeded sample of N facts.", metavar="N", type=Whole(1))
    ] = None
    seed: Annotated[
        int,
        option(
            "Seed for the sample of --limit, the random sentences of some schemes, and the false "
            "targets of facts that come without.",
            type=Whole(0),
        ),
    ] = 0

    def load(self) -> FactSet:
        """Read the facts and draw the sample."""
        from hijacklens.facts.loading import load_facts

        facts = load_facts(self.source, joining=self.joining, seed=self.seed)
        facts = facts.where(relation=self.relations or None, case_ids=self.cases or None)
        return self.write(facts.limit(self.limit, seed=self.seed))


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemesChoice:
    """Schemes and doses."""

    schemes: Annotated[
        tuple[str, ...],
        scheme_option(
            "A scheme (`hijacklens schemes`). Repeatable.  [default: do-not-think]", "--scheme"
        ),
    ] = ()
    templates: Annotated[
        tuple[str, ...],
        option(
            "A scheme of your own: 'never-say=Never say {target_false}.' Repeatable.",
            "--template",
            metavar="NAME=TEXT",
        ),
    ] = ()
    doses: Annotated[
        str,
        option("How many sentences precede the query: a range or a list. 0 is always scored."),
    ] = "0-5"

    def load(self) -> list[Scheme]:
        """Return the schemes; by default `do-not-think`.

        Raises:
            InputError: A scheme is unknown or repeated, or a template has no name or a taken one.
        """
        from hijacklens.prompts.schemes import Scheme, get_schemes, schemes

        written = [
            Scheme(name=name, template=text) for name, text in map(read_template, self.templates)
        ]
        for scheme in written:
            if scheme.name in schemes():
                raise InputError(f"--template: scheme {scheme.name!r} exists; choose another name.")
        return get_schemes([*self.schemes, *written] or "do-not-think")

    @property
    def counts(self) -> tuple[int, ...]:
        """The doses as numbers."""
        return read_doses(self.doses)


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
    return name.strip(), template


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChoice:
    """How a model is loaded."""

    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], option("The softmax is always float32.")
    ] = "float32"
    device: Annotated[
        str | None, option("cpu, cuda, cuda:1, ...  [default: a GPU if there is one]")
    ] = None
    devices: Annotated[int, option("Spread the layers over this many GPUs.", type=Whole(1))] = 1
    revision: Annotated[
        str | None, option("Branch, tag or commit of a hub model.", metavar="REV")
    ] = None
    trust_remote_code: Annotated[
        bool, option("Run code that comes with the model. Read it first.")
    ] = False

    def check(self, *names: str) -> None:
        """Refuse missing models and devices; imports nothing larger than torch, for a device.

        Raises:
            InputError: As for `load_model`.
        """
        from hijacklens.models.naming import resolve

        for name in names:
            resolve(name, self.revision)
        if self.device is not None or self.devices > 1:
            from hijacklens.models.devices import device_of_model

            device_of_model(self.device, self.devices)

    def load(self, name: str) -> Any:
        """Load a model."""
        from hijacklens.models.loading import load_model

        return load_model(name, **asdict(self))

    def loader(self, name: str) -> Any:
        """Return what loads a model later, in this process or on a worker."""
        from hijacklens.workers.replica import ModelLoader

        return ModelLoader(name, **asdict(self))


_MODEL = "A packaged model (`hijacklens models`), a folder, a GGUF file, or a hub id."


def run_name(
    *words: str, loading: ModelChoice, form: PromptForm, probes: Sequence[Any] = ()
) -> str:
    """Return a name for the folder of a run: words and models, dtype, probes and chat.

    >>> chat = PromptForm(hijack="system")
    >>> run_name("law", "runs/a", "gpt2", loading=ModelChoice(dtype="bfloat16"), form=chat)
    'law-a-gpt2-bfloat16-chat-system'
    """
    named = [Path(word).name for word in words]
    dtype = "" if loading.dtype == "float32" else loading.dtype
    chat = f"chat-{form.hijack}" if form.hijack else ""
    return "-".join(filter(None, [*named, dtype, *(probe.kind.name for probe in probes), chat]))


Model: TypeAlias = Annotated[str, model_option(_MODEL, "--model")]

Models: TypeAlias = Annotated[tuple[str, ...], model_option(f"{_MODEL} Repeatable.", "--model")]


def _read_probes(context: Any, parameter: Any, texts: Sequence[str]) -> list[Any]:
    """Read the texts of --probe, and check them as far as possible without a model."""
    if not texts:
        return []
    from probes.specification import parse

    return [parse(text) for text in texts]


Probes: TypeAlias = Annotated[
    list[Any],
    option(
        "Change the model while it is scored: `hijacklens probes` lists the kinds with an "
        "example of each. Repeatable; probes act in order.",
        "--probe",
        callback=_read_probes,
        metavar="KIND:OPTIONS",
        shell_complete=names.probes,
        required=False,
        type=str,
    ),
]

Sharing: TypeAlias = Annotated[
    Literal["auto", "plain", "packed", "cached"],
    option(
        "How prompts share computed prefixes; auto takes the cheapest.",
        cls=RenamedOption,
        formerly="--way",
    ),
]

Rule: TypeAlias = Annotated[
    Literal["first", "sum", "mean"],
    option("How targets are scored in the printed tables; the files hold all three rules."),
]

Overwrite: TypeAlias = Annotated[bool, option("Replace an existing result.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionChoice:
    """How scores are computed; see `hijacklens.scoring.execution.Execution`."""

    batch_tokens: Annotated[
        int | None,
        option(
            "Tokens in a batch, padding included; a smaller batch needs less memory.",
            metavar="N",
            type=Whole(1),
        ),
    ] = None
    sharing: Sharing = "auto"
    engine: Annotated[
        Literal["local", "ray"],
        option("ray: many GPUs or machines (pip install 'hijacklens[ray]')."),
    ] = "local"
    workers: Annotated[
        int | None,
        option(
            "Workers of --engine ray.  [default: one per GPU, or per four cores]",
            metavar="N",
            type=Whole(1),
        ),
    ] = None
    ray_address: Annotated[
        str | None,
        option(
            "Join this Ray cluster (auto, or host:port).  [default: one on this machine]",
            metavar="ADDRESS",
        ),
    ] = None
    no_cache: Annotated[
        bool,
        option(
            "Do not use the store of finished readings (`hijacklens cache`); compute everything."
        ),
    ] = False

    def load(self) -> Execution:
        """Return the record that the library takes.

        Raises:
            InputError: The local engine is given options of Ray.
        """
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


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderChoice:
    """The folder for the files of a command."""

    out: Annotated[
        Path | None,
        out_option(
            "Folder for the files.  [default: runs/<date>-$label, with the dtype, probes and chat "
            "if given, then -2, ...]"
        ),
    ] = None
    overwrite: Overwrite = False

    def check(self, label: str, *, asked: Mapping[str, Any] | None = None) -> Path:
        """Return the folder after checking that the command may write into it.

        Args:
            label: Names the folder if no --out is given.
            asked: All settings of a run that may have been interrupted; it is resumed.

        Raises:
            InputError: The folder holds a result, or is a file.
        """
        folder = self.out or self._usual(label, asked)
        return check_folder(folder, overwrite=self.may_replace(folder, asked=asked))

    def may_replace(self, folder: Path, *, asked: Mapping[str, Any] | None) -> bool:
        """Return whether a result may be replaced: with --overwrite, or part of the same run."""
        return self.overwrite or _is_unfinished(folder, asked)

    def _usual(self, label: str, asked: Mapping[str, Any] | None) -> Path:
        """Return the first free or unfinished folder of the day, or with --overwrite the first."""
        first = Path("runs") / f"{date.today()}-{label}"
        numbered = (first.with_name(f"{first.name}-{count}") for count in itertools.count(2))
        return next(
            folder
            for folder in itertools.chain([first], numbered)
            if not folder.exists() or self.may_replace(folder, asked=asked)
        )


def _is_unfinished(folder: Path, asked: Mapping[str, Any] | None) -> bool:
    """Return whether a folder holds the first part of a run of exactly these settings."""
    try:
        record = json.loads((expand_home(folder) / RECORD).read_text(encoding="utf-8"))
        there = record.get("settings", record)["unfinished"]["asked"]
        return asked is not None and there == json.loads(json_text(asked))
    except (OSError, ValueError, KeyError, TypeError):
        return False
