"""Where rows come from: files, folders, globs, and Hugging Face data sets.

    expand(["data/*.jsonl", "algebra=more/rows.parquet", "hub:owner/name:train"])   # a Source for each file

A file is a JSON list, JSON lines or a Parquet table (see `row_files.py`). A folder is one that `datasets` saved, or
stands for the files in it.
"""

import glob
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from reweighting.data.row_files import iterate_rows
from reweighting.errors import UserError
from reweighting.files import digest
from reweighting.terminal import printable

HUB = "hub:"
URLS = ("http://", "https://", "ftp://", "s3://", "gs://", "hf://")
ENDINGS = (".json.gz", ".jsonl.gz", ".json", ".jsonl", ".parquet")
SAVED = ("state.json", "dataset_dict.json")  # one of them is in a folder that `datasets` saved
BATCH = 64  # rows of a data set in memory at a time


@dataclass(frozen=True)
class Source:
    """Rows of one format, one after the other.

    Attributes:
        path: a file, a folder that `datasets` saved, or `hub:owner/name[:config][:split]`.
        domain: the domain of all its rows, whatever they say; None: what they say.
        format: the name of their format; None: found by their fields.
        max_rows: read so many rows at most; None: all.
    """

    path: str
    domain: str | None = None
    format: str | None = None
    max_rows: int | None = None

    @property
    def name(self) -> str:
        """The domain of rows that name none: the file's name without its ending, or the data set's name."""
        if self.path.startswith(HUB):
            return self.path[len(HUB) :].split(":")[0]
        name = os.path.basename(os.path.normpath(self.path))
        ending = next(
            (ending for ending in sorted(ENDINGS, key=len, reverse=True) if name.lower().endswith(ending)), ""
        )
        return name[: len(name) - len(ending)] or name

    @property
    def folder(self) -> Path:
        """Where relative paths of images start."""
        return Path() if self.path.startswith(HUB) else Path(self.path).parent

    def domain_of(self, raw: Any, domain_field: str | None) -> str | int | None:
        """Return the domain of a row, as far as the user has said what it is.

        Args:
            raw: the row.
            domain_field: the field that holds it, `a.b` for one inside another; None: not said.

        Returns:
            The domain of the source, or the field's value; None if the row lacks it.
        """
        if self.domain is not None or domain_field is None:
            return self.domain
        value = raw
        for name in domain_field.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        return value

    def rows(self, columns: Collection[str] | None = None) -> Iterator[Any]:
        """Read the rows, not yet checked.

        Args:
            columns: the columns of a table that are read; None: all.

        Raises:
            UserError: they cannot be read.
        """
        if self.path.startswith(HUB) or _is_saved(self.path):
            rows = _dataset_rows(self.path)
        else:
            rows = iterate_rows(Path(self.path), columns)
        return islice(rows, self.max_rows)


def expand(given: Iterable[str | Mapping[str, Any]]) -> list[Source]:
    """Find the files that a user named.

    Args:
        given: paths, globs and hub names, each with `domain=` before it where it is a domain of its own; or objects
            with the fields of a `Source`, as in the `mixture` of a config file.

    Returns:
        One Source for each file, in the order given; those of a folder or glob are sorted.

    Raises:
        UserError: one of them stands for no file, is a URL, or is named twice.
    """
    sources = []
    for entry in given:
        source = _from_text(entry) if isinstance(entry, str) else _from_mapping(entry)
        sources += [replace(source, path=path) for path in _paths(source.path)]
    named: set[tuple[str, str | None]] = set()
    for source in sources:
        own = (source.path if source.path.startswith(HUB) else os.path.realpath(source.path), source.domain)
        if own in named:
            raise UserError(f"{source.path}: is named twice, so each of its rows would count twice. Name it once.")
        named.add(own)
    return sources


def identity(sources: Iterable[Source]) -> str:
    """Return a digest that tells what these sources hold from anything else; hub data sets are known by name only.

    Raises:
        UserError: a file cannot be read.
    """
    files: list[Path] = []
    words: list[str] = []
    for source in sources:
        if source.path.startswith(HUB):
            words.append(source.path)
        elif _is_saved(source.path):
            files += sorted(file for file in Path(source.path).rglob("*") if file.is_file())
        else:
            files.append(Path(source.path))
        words += [f"{name}={value}" for name, value in vars(source).items() if name != "path" and value is not None]
    try:
        return " ".join([digest(*files), *words])
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _from_text(text: str) -> Source:
    domain, equals, path = text.partition("=")
    named = equals and domain and not os.path.exists(text) and not text.startswith((HUB, *URLS))
    return Source(path, domain=domain) if named else Source(text)


def _from_mapping(entry: Mapping[str, Any]) -> Source:
    allowed = {"path": str, "domain": str | None, "format": str | None, "max_rows": int | None}
    for name, value in entry.items():
        if name not in allowed or not isinstance(value, allowed[name]) or isinstance(value, bool):
            raise UserError(f"mixture: found {name!s:.40}: {value!r:.60}, allowed: path, domain, format (texts) and "
                            "max_rows (a number) in each entry")  # fmt: skip
    for name, value in entry.items():
        if isinstance(value, str) and not value.strip():
            raise UserError(f"mixture: found {name}: {value!r:.60}, allowed: text that is not blank")
    if "path" not in entry:
        raise UserError("mixture: an entry has no path. Name a file, folder, glob or hub data set in each.")
    if entry.get("max_rows", 1) is not None and entry.get("max_rows", 1) < 1:
        raise UserError(f"mixture: found a max_rows of {entry['max_rows']}, allowed: a number from 1")
    return Source(**entry)


def _paths(path: str) -> list[str]:
    """The files that a path stands for."""
    if not path.strip():
        raise UserError(f"found {path!r:.60}, allowed: the name of a file, a folder or a data set")
    shown = printable(f"{path:.200}", one_line=True)
    if path.startswith(URLS):
        raise UserError(f"{shown}: URLs are not read. Download the file and name it, or name a Hugging Face data set "
                        "as hub:owner/name.")  # fmt: skip
    if path.startswith(HUB):
        parts = path[len(HUB) :].split(":")
        if len(parts) > 3 or not all(parts) or parts[0].count("/") != 1:
            raise UserError(f"{shown}: allowed: hub:owner/name, hub:owner/name:split or hub:owner/name:config:split")
        return [path]
    if path.startswith("file://"):
        path = path.removeprefix("file://")
    if not os.path.exists(path) and glob.has_magic(path):
        found = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
        if not found:
            raise UserError(f"{shown}: no file has such a name. Check the path.")
        return found
    if os.path.isdir(path) and not _is_saved(path):
        found = sorted(str(file) for file in Path(path).rglob("*") if _holds_rows(file))
        if not found:
            raise UserError(f"{shown}: no {', '.join(ENDINGS)} file in this folder, and `datasets` has not saved it. "
                            "Name the file.")  # fmt: skip
        return found
    if not os.path.exists(path):
        raise UserError(f"{shown}: no such file. Check the path.")
    return [path]


def _is_saved(path: str) -> bool:
    """Whether `datasets` saved this folder."""
    return any(os.path.exists(os.path.join(path, name)) for name in SAVED)


def _holds_rows(file: Path) -> bool:
    return file.name.lower().endswith(ENDINGS) and not file.name.startswith(".") and file.is_file()


def _dataset_rows(path: str) -> Iterator[dict[str, Any]]:
    """The rows of a Hugging Face data set, images as they are stored: {"bytes", "path"}."""
    shown = printable(f"{path:.200}", one_line=True)
    try:
        import datasets  # seconds that no other source needs to wait for
    except ImportError:
        raise UserError(f"{shown}: needs the package datasets: pip install datasets") from None
    try:
        if path.startswith(HUB):
            name, *rest = path[len(HUB) :].split(":")
            config, split = (rest if len(rest) == 2 else [None, *rest]) if rest else (None, "train")
            data = datasets.load_dataset(name, config, split=split, streaming=True)
        else:
            data = datasets.load_from_disk(path)
        if isinstance(data, dict):
            raise UserError(f"{shown}: holds the splits {', '.join(map(str, data))}. Name one of them, as "
                            f"{shown}/{next(iter(data))}.")  # fmt: skip
        for table in data.with_format("arrow").iter(batch_size=BATCH):
            yield from table.to_pylist()
    except UserError:
        raise
    except Exception as error:  # `datasets` and what is below it raise dozens of kinds
        reason = printable(f"{type(error).__name__}: {error}"[:200], one_line=True)
        remedy = "Check its name, split and the network."
        raise UserError(f"{shown}: the data set cannot be read ({reason}). {remedy}") from error
