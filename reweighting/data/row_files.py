"""The rows of a file one after the other: a file of any size takes the memory of a few rows.

    for raw in iterate_rows(Path("data/test.json")): ...

A file named `.jsonl` holds an object a line, one named `.parquet` is a table with a column for each field, any other
holds a JSON list of objects. Nothing is checked here but that the file can be read.
"""

import json
import re
import reprlib
from collections.abc import Iterator
from io import TextIOBase
from pathlib import Path
from typing import Any

from reweighting.errors import UserError

CHUNK = 2**20  # characters
TABLE_ROWS = 1024  # of a Parquet file at a time
HALF_A_TOKEN = 16  # characters: what a cut may leave of a literal or of a pair of \u escapes
SPACE = re.compile(r"[ \t\n\r]*")
DECODER = json.JSONDecoder()


def iterate_rows(path: Path) -> Iterator[Any]:
    """The file's rows, not yet checked; at least one. Raises UserError where the file is not what it should be."""
    count = 0
    try:
        for row in READERS.get(path.suffix.lower(), _elements)(path):
            count += 1
            yield row
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Check the path.") from None
    except IsADirectoryError:
        raise UserError(f"{path}: this is a folder. Name the JSON file in it.") from None
    except UnicodeDecodeError:
        line = _first_bad_line(path)
        raise UserError(f"{path}: not UTF-8 (line {line}). Save it as UTF-8, say with iconv.") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply. A row is an object of plain values.") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{str(path)!r:.200}: cannot be read ({reason}). Check the path.") from None
    if not count:
        raise UserError(f"{path}: no rows in it. Check that writing it was not cut off.")


_short = reprlib.Repr()
_short.maxstring = _short.maxlong = _short.maxother = 60


def shown(value: Any) -> str:
    """The value's repr on one line, at most 60 characters, however deep or long the value is."""
    text = _short.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


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
            self.at = SPACE.match(self.text, self.at).end()
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
                raise _too_many_digits(self.path) from error

    def not_json(self, error: json.JSONDecodeError) -> UserError:
        """The error, which tells a place in `text`, with its place in the file."""
        column = error.colno + (self.column - 1 if error.lineno == 1 else 0)
        return _not_json(self.path, error.msg, self.line + error.lineno - 1, column)


def _elements(path: Path) -> Iterator[Any]:
    """The members of the list that a JSON file holds."""
    with _open(path) as file:
        yield from _members(_Window(path, file))


def _members(window: _Window) -> Iterator[Any]:
    path = window.path
    first = window.next_character()
    if not first:
        return
    if first != "[":
        value = window.value()
        if window.next_character():
            raise window.not_json(json.JSONDecodeError("Extra data", window.text, window.at))
        raise UserError(
            f"{path}: found {shown(value)}, allowed: a list of objects, [{{...}}, {{...}}]. "
            "Put the rows in square brackets, or one per line in a file named .jsonl."
        )
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


def _lines(path: Path) -> Iterator[Any]:
    """The value on each line that is not blank."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise _not_json(path, error.msg, number, error.colno) from None
                except ValueError as error:
                    raise _too_many_digits(path) from error


def _table(path: Path) -> Iterator[Any]:
    """The rows of a Parquet file, as {column: value}."""
    import pyarrow.parquet  # half a second that no other file needs to wait for

    with open(path, "rb") as file, pyarrow.parquet.ParquetFile(file) as table:
        for batch in table.iter_batches(TABLE_ROWS):
            yield from batch.to_pylist()


def _open(path: Path) -> TextIOBase:
    # newline="\n": lines end nowhere else, and no character is changed.
    return open(path, encoding="utf-8-sig", newline="\n")


READERS = {".jsonl": _lines, ".parquet": _table}


def _not_json(path: Path, what: str, line: int, column: int) -> UserError:
    remedy = "Mend that place; `python -m json.tool FILE` checks a file."
    if what == "Extra data" and path.suffix.lower() != ".jsonl":
        remedy = "If every line holds one object, name the file .jsonl."
    return UserError(f"{path}: not JSON: {what} at line {line} column {column}. {remedy}")


def _too_many_digits(path: Path) -> UserError:
    """Python refuses to read whole numbers of more than 4300 digits."""
    return UserError(f"{path}: a number with too many digits to be read. Shorten or remove it.")


def _first_bad_line(path: Path) -> int:
    """The number of the first line that is not UTF-8."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return number
