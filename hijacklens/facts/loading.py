"""Reading facts of any layout (`hijacklens.facts.layouts`) from a file or from the hub.

facts = load_facts("mine.csv")                             # your own facts, or pairs of answers
facts = load_facts("popQA.tsv")                            # a published data set
facts = load_facts("NeelNanda/counterfact-tracing")        # the hub, through `datasets`
facts.where(relation="P190").sample(200, seed=0)
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from hijacklens.errors import InputError, strict
from hijacklens.facts.atlas import atlas
from hijacklens.facts.fact import FactSet
from hijacklens.facts.joining import Joining
from hijacklens.facts.layouts import Record
from hijacklens.facts.records import facts_from_records
from hijacklens.files import MOST_ROWS, check_size, named_path, variable
from hijacklens.hub import commit_of, hub_problem

EXPANDED = 100
"""A gzipped text is at most this many times as large as its file; texts of facts reach 20 times."""
HUB_ID = "NeelNanda/counterfact-tracing"
PATH_VARIABLE = "HIJACKLENS_COUNTERFACT"
"""Environment variable with the file that the source `counterfact` names."""
ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
ENDINGS += tuple(f"{ending}.gz" for ending in ENDINGS[:-1])


@strict
def load_facts(
    source: str | Path,
    *,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    joining: Joining = "auto",
    seed: int = 0,
    paraphrases: bool = False,
) -> FactSet:
    """Read facts from a file or from a data set on the hub.

    Files may be JSON (an array, or one record per line), CSV, TSV or parquet, all but the last also
    gzipped, in any layout of `hijacklens.facts.layouts`. White space around subjects and targets
    is dropped, with a note where scoring does not put it back. In language relations, the near
    word of a language is filled in: its country.

    Args:
        source: A file, a hub id `owner/name`, `atlas`, or `counterfact` (the file in the variable
            HIJACKLENS_COUNTERFACT, else the hub's NeelNanda/counterfact-tracing).
        config: The configuration of a hub data set that has several.
        split: The split of a hub data set; by default the only one, or `train`.
        revision: The revision of a hub data set.
        joining: How targets join their prompts: with a space (`space`), directly (`none`), or by
            the end of the prompt (`auto`, see `hijacklens.facts.joining`).
        seed: Seeds the false targets of a data set that has none; the note says so.
        paraphrases: Return a fact for every template or question of a record (LRE, ParaRel,
            MQuAKE), not only for the first; their case ids differ by multiples of a million.

    Raises:
        InputError: The file is missing, empty, of an unknown format or layout, or the hub cannot
            be reached or has no such data set.
    """
    name = str(source)
    if name == "atlas":
        return replace(atlas(), joining=joining)
    if name == "counterfact":
        name = variable(PATH_VARIABLE) or HUB_ID
    path = named_path(name, "facts file or data set")
    options: Any = {"joining": joining, "seed": seed, "paraphrases": paraphrases}
    if path.is_file():
        try:
            return facts_from_records(_file_records(path), name=path.name, **options)
        except OSError as error:
            raise InputError(f"facts file {name!r} cannot be read: {error}.") from error
    hub_id = name.count("/") == 1 and not name.endswith(ENDINGS) and name[0] not in ".~"
    if not hub_id or path.exists():
        state = "is not a file" if path.exists() else "does not exist"
        state = "is a folder" if path.is_dir() else state
        raise InputError(
            f"facts file {name!r} {state}. Give a file that ends in "
            f"{', '.join(ENDINGS)}, a hub id such as {HUB_ID}, or use the embedded atlas."
        )
    return facts_from_records(_hub_records(name, config, split, revision), name=name, **options)


def counterfact(source: str | Path | None = None, **options: Any) -> FactSet:
    """Read CounterFact; equal to `load_facts`, with `counterfact` as the default source."""
    return load_facts("counterfact" if source is None else source, **options)


def _file_records(path: Path) -> Iterable[Any]:
    stem = path.name.removesuffix(".gz")
    if path.suffix == ".parquet":
        return _parquet_records(path)
    if stem.endswith((".csv", ".tsv")):
        return _csv_records(_text(path), path, "," if stem.endswith(".csv") else "\t")
    if stem.endswith((".json", ".jsonl")):
        return _with_patterns(_json_records(_text(path), path), path)
    raise InputError(
        f"facts file {str(path)!r} has an unknown ending; allowed are {', '.join(ENDINGS)}."
    )


def _with_patterns(records: list[Any], path: Path) -> list[Any]:
    """Give triples of ParaRel their patterns, which its repository keeps in another folder."""
    if not (records and isinstance(records[0], Mapping) and "sub_label" in records[0]):
        return records
    patterns = path.parent.parent / "pattern_data" / "graphs_json" / path.name
    lines = _json_records(_text(patterns), patterns) if patterns.is_file() else []
    found = [line["pattern"] for line in lines if isinstance(line, Mapping) and "pattern" in line]
    more = {"predicate_id": path.name.partition(".")[0], "patterns": found}
    return [more | dict(each) if isinstance(each, Mapping) else each for each in records]


@contextmanager
def _reading(path: Path, problem: str, *errors: type[Exception], hint: str = "") -> Iterator[None]:
    """Turn the errors of a decoder into one that names the file and the problem."""
    try:
        yield
    except errors as error:
        raise InputError(f"facts file {str(path)!r}{problem}: {error}.{hint}") from error


def _text(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix == ".gz":
        decoding = _reading(path, " is not a complete gzip file", OSError, EOFError, zlib.error)
        with decoding, gzip.open(path) as stream:
            data = stream.read(max(MOST_ROWS, EXPANDED * len(data)) + 1)
        check_size(path, len(data), "bytes of text", most_per_byte=EXPANDED)
    with _reading(path, " is not UTF-8 text", UnicodeDecodeError, hint=" Save it as UTF-8."):
        return data.decode("utf-8-sig")


def _csv_records(text: str, path: Path, separator: str) -> Iterator[Record | InputError]:
    """Yield a record per row, or the reason why a row has none.

    A comma without quotes splits a cell and moves all later ones to wrong columns. First columns
    without a name are the index that pandas and R write.
    """
    reader = csv.reader(io.StringIO(text), delimiter=separator)
    rows = (row for row in reader if row)
    try:
        header = next(rows, [])
        repeated = [name for name, count in Counter(header).items() if count > 1 and name]
        if repeated:
            raise InputError(
                f"facts file {str(path)!r} has several columns called {repeated[0]!r}; keep one."
            )
        named = sum(map(bool, header))
        index = next((i for i, name in enumerate(header) if name), 0)
        header = header[index:]
        for row in (row[index:] for row in rows):
            record = dict(zip(header, row, strict=False))
            unnamed = any(cell for name, cell in zip(header, row, strict=False) if not name)
            record.pop("", None)
            if len(row) == len(header) and not unnamed:
                yield record
            else:
                yield InputError(
                    f"line {reader.line_num} has {len(row)} cells for the {named} named "
                    'columns. A text with a comma needs quotes around it: "Washington, D.C.".'
                )
    except csv.Error as error:
        raise InputError(
            f"facts file {str(path)!r}, line {reader.line_num + 1}, is not valid CSV: {error}. "
            "A quote that is never closed turns the rest of the file into one cell."
        ) from error


def _json_records(text: str, path: Path) -> list[Any]:
    errors = (ValueError, RecursionError)
    if text.lstrip().startswith("["):
        with _reading(path, " is not valid JSON", *errors):
            return _json(text)
    with suppress(*errors):
        return [_json(text)]  # one record, perhaps over several lines
    records, hint = [], " A .json or .jsonl file holds one array, or one record per line."
    # splitlines() would also split at Unicode line ends inside a text.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            with _reading(path, f", line {number}, is not valid JSON", *errors, hint=hint):
                records.append(_json(line))
    return records


def _json(text: str) -> Any:
    """Return a JSON value; of two fields with one name, Python would silently keep the last."""
    return json.loads(text, object_pairs_hook=_distinct)


def _distinct(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(fields)
    if len(record) < len(fields):
        name, _ = Counter(name for name, _ in fields).most_common(1)[0]
        raise ValueError(f"an object has several fields called {name!r}")
    return record


def _parquet_records(path: Path) -> Iterable[Record]:
    import pyarrow
    import pyarrow.parquet

    with _reading(path, " is not a complete parquet file", OSError, pyarrow.ArrowException):
        file = pyarrow.parquet.ParquetFile(path)
        check_size(path, file.metadata.num_rows, "rows")
        return file.read().to_pylist()


def _hub_records(
    name: str, config: str | None, split: str | None, revision: str | None
) -> Iterable[Record]:
    import datasets

    instead = "Name a local file, or use the embedded atlas (--facts atlas, hl.atlas())."
    version = f" at the revision {revision!r}" if revision else ""
    try:
        commit = commit_of(name, revision, "dataset")
        try:
            loaded = datasets.load_dataset(name, config, revision=commit)
        except ValueError:  # without a default configuration, or with an unknown one
            configs = datasets.get_dataset_config_names(name, revision=commit)
            if config in configs or (config is None and len(configs) < 2):
                raise
            state = f"has no configuration {config!r}" if config else "has several configurations"
            raise InputError(f"{name} {state}; give config= one of {', '.join(configs)}.") from None
    except InputError:
        raise
    except Exception as error:  # datasets raises a different type for each way to fail
        text = " ".join(str(error.__cause__ or error).split()).rstrip(".")
        reason = hub_problem(error, instead) or f"{text}. {instead}"
        raise InputError(f"cannot read the data set {name!r}{version}: {reason}") from error
    files = next(iter(loaded.values())).cache_files
    if commit and files and commit not in files[0]["filename"]:
        raise InputError(
            f"cannot read the data set {name!r}{version}: without the hub, only the version of the "
            "data set that was read last can be read again, and that is another one. Check the "
            f"network (and HF_HUB_OFFLINE). {instead}"
        )
    splits = [str(name) for name in loaded]
    split = split or (splits[0] if len(splits) == 1 else "train")
    if split not in splits:
        raise InputError(f"{name} has no split {split!r}; it has {', '.join(splits)}.")
    return cast(Iterable[Record], loaded[split])
