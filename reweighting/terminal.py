"""What may reach a terminal: text of data, paths and errors with its control characters shown as escapes."""

import unicodedata

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
