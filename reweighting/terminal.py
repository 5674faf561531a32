"""What reaches a terminal: text with its control characters shown as escapes, and streams that outlive their reader."""

import os
import unicodedata
from typing import Any, TextIO

# Unicode categories: Cc (ESC, BEL, NUL, …), Cf (bidirectional marks, characters without width), Cs (half a surrogate
# pair), Zl and Zp (Unicode's own line ends).
ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}
JOINERS = "\u200c\u200d"  # Persian, Indic scripts and emoji are written with them


def printable(text: object, one_line: bool = False) -> str:
    r"""Escape what a terminal would obey instead of show: `\x1b`, `\x07`, `\u202e`, ….

    Args:
        text: anything that can be made a string: a message, a domain name, a path, an error.
        one_line: escape newlines too, for a name or value inside a line or a table; otherwise they stay.

    Returns:
        The text with each control, format and surrogate character written as Python writes it.
    """
    return "".join(_shown(char, one_line) for char in str(text))


def _shown(char: str, one_line: bool) -> str:
    """One character, or its escape."""
    if unicodedata.category(char) not in ESCAPED or char in JOINERS or (char == "\n" and not one_line):
        return char
    return char.encode("unicode_escape").decode("ascii")


class DetachableStream:
    """A text stream that drops what is written after its reader has gone, as in `| head -1`.

    Args:
        stream: stdout or stderr.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text; its length is returned although nobody may read it."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._detach()
            return len(text)

    def flush(self) -> None:
        """Hand on what is buffered."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._detach()

    def _detach(self) -> None:
        """Point the stream's file descriptor at nothing, so that what it still holds can be flushed at exit."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def first_line(error: BaseException, limit: int = 200) -> str:
    """Shorten an error to one line, since what libraries raise may quote whole files.

    Args:
        error: any exception.
        limit: of the line, in characters.

    Returns:
        The first line of its message, or its kind if it has none.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:limit]
