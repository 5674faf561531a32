"""The rows of a file one after the other: a file of any size takes the memory of a few rows.

    for raw in iterate_rows(Path("data/test.json")): ...

A file named `.jsonl` holds an object a line, one named `.parquet` is a table with a column for each field, any other
holds a JSON list of objects, an object of such lists, or an object a line too. JSON may be compressed with gzip.
Nothing is checked here but that the file can be read.
"""

import gzip
import io
import json
import re
import reprlib
import zlib
from collections.abc import Collection, Iterator
from io import TextIOBase
from pathlib import Path
from typing import Any

from reweighting.errors import UserError
from reweighting.files import regular_file
from reweighting.terminal import printable

CHUNK = 2**20  # characters
TABLE_ROWS = 1024  # of a Parquet file at a time,
TABLE_BYTES = 2**24  # or fewer where they are large
HALF_A_TOKEN = 16  # characters: what a cut may leave of a literal or of a pair of \u escapes
SHOWN_CHARACTERS = 60  # of a value in a message
SPACE = re.compile(r"[ \t\n\r]*")
DECODER = json.JSONDecoder()
GZIP = b"\x1f\x8b"
PARQUET = b"PAR1"
# What else a file may begin with, and what to do about it.
OTHER_KINDS = {
    PARQUET: "a Parquet file. Give it a name that ends in .parquet",
    b"PK\x03\x04": "a zip archive. Unpack it",
    b"\xfd7zXZ\x00": "compressed with xz. Unpack it, or compress it with gzip",
    b"BZh": "compressed with bzip2. Unpack it, or compress it with gzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd. Unpack it, or compress it with gzip",
}


def iterate_rows(path: Path, columns: Collection[str] | None = None) -> Iterator[Any]:
    """Read a file's rows one after the other, not yet checked.

    Args:
        path: the file, or a pipe such as `<(zcat rows.json.gz)`, which is read once however often this is called.
        columns: the columns of a table that are read; the others are None in every row. None: all of them.

    Yields:
        What stands at each row's place, an object or not; at least one.

    Raises:
        UserError: the file cannot be read, is not of its kind, or has no rows.
    """
    name = printable(f"{path!s:.200}", one_line=True)
    count = 0
    try:
        file = regular_file(path)
        for row in _table(file, columns) if path.suffix.lower() == ".parquet" else _json_rows(path, file):
            count += 1
            yield row
    except FileNotFoundError:
        raise UserError(f"{name}: no such file. Check the path.") from None
    except IsADirectoryError:
        raise UserError(f"{name}: this is a folder. Name the JSON file in it.") from None
    except UnicodeDecodeError:
        line = _first_bad_line(file)
        raise UserError(f"{name}: not UTF-8 (line {line}). Save it as UTF-8, for example with iconv.") from None
    except RecursionError:
        raise UserError(f"{name}: nested too deeply. A row is an object of plain values.") from None
    # EOFError and zlib.error: a damaged gzip file. ValueError: a NUL character in the path, or no Parquet file.
    except (OSError, ValueError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name}: cannot be read ({reason!s:.200}). Check the path and the file.") from None
    if not count:
        raise UserError(f"{name}: no rows in it. Check that writing it was not cut off.")


_short = reprlib.Repr()
_short.maxstring = _short.maxlong = _short.maxother = SHOWN_CHARACTERS


def short_repr(value: Any) -> str:
    """Return the value's repr on one line, at most 60 characters, however deep or long the value is."""
    text = _short.repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


class _Window:
    """The part of a file that is in memory: `text`, the place `at` in it, and where in the file it begins."""

    def __init__(self, path: Path, file: TextIOBase):
        self.path, self.file = path, file
        self.text, self.at, self.line, self.column = "", 0, 1, 1

    def more(self) -> bool:
        """Read on, and forget what stands before `at`; False at the end of the file, where nothing changes."""
        # As much again as is kept: a long row is then parsed a few times only, not once for each chunk.
        chunk = self.file.read(max(CHUNK, len(self.text) - self.at))
        if not chunk:
            return False
        passed, self.text, self.at = self.text[: self.at], self.text[self.at :] + chunk, 0
        lines = passed.count("\n")
        self.line += lines
        self.column = len(passed) - passed.rfind("\n") if lines else self.column + len(passed)
        return True

    def next_character(self) -> str:
        """Skip white space; the character there, "" at the end of the file."""
        while True:
            if blank := SPACE.match(self.text, self.at):
                self.at = blank.end()
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def value(self) -> Any:
        """Read the value that begins here, and go behind it."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                length = end - self.at
                if end < len(self.text) or not self.more():  # a number may go on behind the window
                    self.at += length
                    return value
            except json.JSONDecodeError as error:
                at_the_edge = error.pos >= len(self.text) - HALF_A_TOKEN or error.msg.startswith("Unterminated")
                if not at_the_edge or not self.more():
                    raise self.not_json(error) from None
            except ValueError as error:
                raise _too_many_digits(self.path, self.line + self.text.count("\n", 0, self.at)) from error

    def not_json(self, error: json.JSONDecodeError) -> UserError:
        """The error, which names a place in `text`, with its place in the file."""
        column = error.colno + (self.column - 1 if error.lineno == 1 else 0)
        return _not_json(self.path, error.msg, self.line + error.lineno - 1, column)


def _json_rows(path: Path, file: Path) -> Iterator[Any]:
    """The rows of a JSON file. path: its name, for messages; file: where its content is."""
    with _open_bytes(file) as stream:
        start = stream.peek(8)
        for magic, what in OTHER_KINDS.items():
            if start.startswith(magic):
                raise UserError(f"{path}: this is {what}.")
        # newline="\n": lines end nowhere else, and no character is changed.
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n")
        by_lines = path.suffixes[-2:] == [".jsonl", ".gz"] or path.suffix.lower() == ".jsonl"
        # A pipe has no name that could tell.
        by_lines = by_lines or (file != path and start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{")
        yield from _lines(path, text) if by_lines else _elements(_Window(path, text))


def _elements(window: _Window) -> Iterator[Any]:
    """The members of the list that a JSON file holds, of all lists in an object of lists, or objects a line."""
    path = window.path
    first = window.next_character()
    if not first:
        return
    if first != "[":
        value = window.value()
        following = window.next_character()
        if following == "{" and isinstance(value, dict):  # JSON lines in a file that is not named .jsonl
            yield value
            while window.next_character():
                yield window.value()
            return
        if following:
            raise window.not_json(json.JSONDecodeError("Extra data", window.text, window.at))
        yield from _all_lists(path, value)
        return
    window.at += 1
    if window.next_character() != "]":
        while True:
            window.next_character()
            yield window.value()
            if (separator := window.next_character()) == "]":
                break
            if separator != ",":
                raise window.not_json(json.JSONDecodeError("Expecting ',' delimiter", window.text, window.at))
            window.at += 1
    window.at += 1
    if window.next_character():
        raise window.not_json(json.JSONDecodeError("Extra data", window.text, window.at))


def _all_lists(path: Path, value: Any) -> Iterator[Any]:
    """The rows of an object of lists, such as {"data": [...]} or {question: [answers]}."""
    lists = list(value.values()) if isinstance(value, dict) else []
    if not any(lists) or not all(
        isinstance(rows, list) and all(isinstance(row, dict) for row in rows) for rows in lists
    ):
        raise UserError(
            f"{path}: found {short_repr(value)}, allowed: a list of objects, [{{...}}, {{...}}]. "
            "Put the rows in square brackets, or one per line in a file named .jsonl."
        )
    for rows in lists:
        yield from rows


def _lines(path: Path, text: TextIOBase) -> Iterator[Any]:
    """The value on each line that is not blank."""
    for number, line in enumerate(text, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise _not_json(path, error.msg, number, error.colno) from None
            except ValueError as error:
                raise _too_many_digits(path, number) from error


def _table(file: Path, columns: Collection[str] | None) -> Iterator[dict]:
    """The rows of a Parquet file, as {column: value}. Columns that are not wanted are not read, whatever is in them."""
    import pyarrow.parquet  # half a second that no other file needs to wait for

    # Read as it comes: the default would hold all of the columns in memory.
    options: dict[str, Any] = {"pre_buffer": False, "buffer_size": 2**20}
    with open(file, "rb") as stream, pyarrow.parquet.ParquetFile(stream, **options) as table:
        names = table.schema_arrow.names
        wanted = [name for name in names if columns is None or name in columns]
        blank = dict.fromkeys(names)
        for batch in table.iter_batches(_rows_at_a_time(table.metadata), columns=wanted):
            for row in batch.to_pylist():
                yield blank | row


def _rows_at_a_time(metadata: Any) -> int:
    """So many rows of a table that they take about `TABLE_BYTES`, `TABLE_ROWS` at most: they may hold images."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    row = max((group.total_byte_size / max(group.num_rows, 1) for group in groups), default=1)
    return int(max(1, min(TABLE_ROWS, TABLE_BYTES / max(row, 1))))


def _open_bytes(file: Path) -> io.BufferedReader | gzip.GzipFile:
    """The file's bytes, unpacked if they are compressed with gzip."""
    with open(file, "rb") as start:
        packed = start.read(2) == GZIP
    return gzip.open(file, "rb") if packed else open(file, "rb")


def _not_json(path: Path, what: str, line: int, column: int) -> UserError:
    remedy = "Fix that place; `python -m json.tool FILE` checks a file."
    if what == "Extra data" and ".jsonl" not in path.suffixes:
        remedy = "If every line holds one object, name the file .jsonl."
    return UserError(f"{path}: not JSON: {what} at line {line} column {column}. {remedy}")


def _too_many_digits(path: Path, line: int) -> UserError:
    """Python refuses to read whole numbers of more than 4300 digits. line: where the row begins."""
    return UserError(f"{path}: line {line}: a number with too many digits to be read. Shorten or remove it.")


def _first_bad_line(file: Path) -> int:
    """The number of the first line that is not UTF-8."""
    with _open_bytes(file) as stream:
        return next(number for number, line in enumerate(stream, 1) if not _is_utf8(line))


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True
