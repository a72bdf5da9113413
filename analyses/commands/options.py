"""What several commands share: options of models and facts, and how their values are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from analyses.commands import names
from hijacklens.errors import InputError, unknown

if TYPE_CHECKING:
    from hijacklens.facts.fact import FactSet
    from hijacklens.probe import Probe
    from hijacklens.prompts.schemes import Scheme
    from hijacklens.workers.workers import RayEngine
    from probes.specification import Specification

Command = TypeVar("Command", bound=Callable[..., Any])

models_option = click.option(
    "--model",
    "models",
    multiple=True,
    required=True,
    metavar="M",
    shell_complete=names.models,
    help="A packaged model (`hijacklens models`), a folder, or a hub id. Repeatable.",
)
"""--model, which may be given several times."""

model_option = click.option(
    "--model",
    "name",
    required=True,
    metavar="M",
    shell_complete=names.models,
    help="A packaged model (`hijacklens models`), a folder, or a hub id.",
)
"""--model, given once."""

probes_option = click.option(
    "--probe",
    "probes",
    multiple=True,
    metavar="KIND:OPTIONS",
    shell_complete=names.probes,
    help="Change the model while it is scored: `hijacklens probes` has the kinds and an "
    "example of each. Repeatable; probes act in order.",
)
"""--probe, which may be given several times."""

batch_tokens_option = click.option(
    "--batch-tokens",
    type=int,
    metavar="N",
    help="Tokens in a batch, padding included; smaller needs less memory.",
)
"""--batch-tokens."""

sharing_option = click.option(
    "--sharing",
    "--way",  # its old name
    "sharing",
    type=click.Choice(["auto", "plain", "packed", "cached"]),
    default="auto",
    show_default=True,
    help="How prompts share computed prefixes; auto takes the cheapest.",
)
"""--sharing."""

rule_option = click.option(
    "--rule",
    type=click.Choice(["first", "sum", "mean"]),
    default="first",
    show_default=True,
    help="How targets are scored in what is printed; the files hold all three.",
)
"""--rule."""

no_cache_option = click.option(
    "--no-cache",
    is_flag=True,
    help="Compute all anew: do not use the store of finished readings (`hijacklens cache`).",
)
"""--no-cache."""

overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace a result that is in the folder."
)
"""--overwrite."""


def schemes_options(command: Command) -> Command:
    """Options that choose prompts: --scheme, --template, --doses."""
    for option in (
        click.option(
            "--doses",
            default="0-5",
            show_default=True,
            help="How many sentences stand before the query: a range or a list. 0 is always "
            "scored.",
        ),
        click.option(
            "--template",
            "templates",
            multiple=True,
            metavar="NAME=TEXT",
            help="A scheme of your own: 'never-say=Never say {target_false}.' Repeatable.",
        ),
        click.option(
            "--scheme",
            "schemes",
            multiple=True,
            metavar="S",
            shell_complete=names.schemes,
            help="A scheme (`hijacklens schemes`). Repeatable.  [default: do-not-think]",
        ),
    ):
        command = option(command)
    return command


def model_options(command: Command) -> Command:
    """Options that say how a model is loaded: --dtype, --device, --devices, --revision, ..."""
    for option in (
        click.option(
            "--trust-remote-code",
            is_flag=True,
            help="Run code that comes with the model. Read it first.",
        ),
        click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub model."),
        click.option(
            "--devices",
            type=int,
            default=1,
            show_default=True,
            help="Spread the layers over this many GPUs.",
        ),
        click.option("--device", help="cpu, cuda, cuda:1, ...  [default: a GPU if there is one]"),
        click.option(
            "--dtype",
            default="float32",
            show_default=True,
            help="float32, bfloat16 or float16. The softmax is float32 in any case.",
        ),
    ):
        command = option(command)
    return command


def facts_options(command: Command) -> Command:
    """Options that choose facts: --facts, --relation, --case, --limit, --seed."""
    for option in (
        click.option(
            "--seed",
            type=int,
            default=0,
            show_default=True,
            help="Seeds what is drawn: the sample of --limit, the sentences of some schemes.",
        ),
        click.option("--limit", type=int, metavar="N", help="A seeded sample of N facts."),
        click.option(
            "--case", "cases", type=int, multiple=True, help="Only this case id. Repeatable."
        ),
        click.option(
            "--relation",
            "relations",
            multiple=True,
            metavar="P",
            shell_complete=names.relations,
            help="Only facts of this relation, such as P190. Repeatable.",
        ),
        click.option(
            "--facts",
            "source",
            default="atlas",
            show_default=True,
            metavar="SOURCE",
            shell_complete=names.facts,
            help="atlas (embedded), counterfact, a file (.json, .jsonl, .csv, .parquet), or a "
            "hub id.",
        ),
    ):
        command = option(command)
    return command


def engine_options(command: Command) -> Command:
    """Options that say where models are run: --engine, --workers, --ray-address."""
    for option in (
        click.option(
            "--ray-address",
            metavar="ADDRESS",
            help="Join this Ray cluster (auto, or host:port).  [default: one on this machine]",
        ),
        click.option(
            "--workers",
            type=int,
            metavar="N",
            help="Workers of --engine ray.  [default: one per GPU, or per four cores]",
        ),
        click.option(
            "--engine",
            default="local",
            show_default=True,
            help="local, or ray: many GPUs or machines (pip install 'hijacklens[ray]').",
        ),
    ):
        command = option(command)
    return command


def choose_engine(engine: str, workers: int | None, ray_address: str | None) -> str | RayEngine:
    """The engine that the options of `engine_options` name."""
    if engine not in ("local", "ray"):
        raise unknown("engine", engine, ("local", "ray"))
    if engine == "local":
        for option, value in (("--workers", workers), ("--ray-address", ray_address)):
            if value is not None:
                raise InputError(f"{option} {value} needs --engine ray; the engine is local.")
        return engine
    from hijacklens.workers.workers import RayEngine

    return RayEngine(workers=workers, address=ray_address)


def choose_schemes(schemes: tuple[str, ...], templates: tuple[str, ...]) -> list[Scheme]:
    """The schemes that the options of `schemes_options` name; by default `do-not-think`."""
    from hijacklens.prompts.schemes import Scheme, get_scheme
    from hijacklens.prompts.schemes import schemes as registered

    own = [Scheme(name=name, template=text) for name, text in map(read_template, templates)]
    for scheme in own:
        if scheme.name in registered():
            raise InputError(f"--template: scheme {scheme.name!r} exists; choose another name.")
    return [*map(get_scheme, schemes), *own] or [get_scheme("do-not-think")]


def read_probes(texts: tuple[str, ...]) -> list[Specification]:
    """The probes of --probe, checked as far as they can be without a model."""
    if not texts:
        return []
    from probes.specification import parse

    return [parse(text) for text in texts]


def make_probes(
    specified: list[Specification], model: Any, facts: FactSet | None, *, quiet: bool
) -> list[Probe]:
    """The probes of --probe for a model.

    Raises:
        InputError: A probe takes means over facts, and there are none.
    """
    for probe in specified:
        if probe.needs_model and facts is None:
            raise InputError(
                f"--probe {probe.text!r} takes means over the bare queries of many facts, which "
                "this command does not have; write kind=zero, or use `hijacklens hijack`."
            )
    return [probe.probe(model=model, facts=facts, quiet=quiet) for probe in specified]


def read_template(text: str) -> tuple[str, str]:
    """Name and template of a scheme that is written as `name=template`.

    >>> read_template("never-say=Never say {target_false}.")
    ('never-say', 'Never say {target_false}.')
    """
    name, found, template = text.partition("=")
    if not found:
        raise InputError(
            f"--template {text!r} has no name; write it as 'never-say=Never say {{target_false}}.'"
        )
    return name.strip(), template.strip()
