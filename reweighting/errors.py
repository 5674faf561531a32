"""The one exception for what the user can fix, and the form of a message about many places."""

from collections.abc import Hashable
from dataclasses import dataclass, field

LISTED_PROBLEMS = 20  # of different kinds that a message names
LISTED_PLACES = 5  # of one kind


class UserError(Exception):
    """Something in the user's files, flags or folders is wrong.

    The message names the place and the remedy. The commands print it to stderr and exit with code 2;
    library callers may catch it as any other exception.
    """


class UnreadableImage(UserError):
    """An image file cannot be read, now at least."""


class ChainTooLong(UserError):
    """A chain has more tokens than the model takes."""


class ProcessLost(UserError):
    """Another process of the run has ended: its own error, if it has printed one, is the one to report."""


class Problems:
    """Collects the problems of a file: one that comes up in many places becomes one line with their number.

        problems = Problems()
        problems.add("row 3", "accuracy: found 9, allowed: a number from 0 to 1")
        if problems.count:
            raise UserError("\\n".join([f"{path}: {problems.count} problems", *problems.lines()]))

    The memory does not grow with the number of problems.
    """

    def __init__(self):
        self.count = 0
        self._groups: dict[Hashable, _Group] = {}

    def add(self, place: str, text: str, kind: Hashable = None) -> None:
        """Count one problem.

        Args:
            place: where it is, as a message names it: "row 3".
            text: what is wrong, and the remedy.
            kind: problems of equal kind share a line, which shows the first one's text; default: the text itself.
        """
        self.count += 1
        kind = text if kind is None else kind
        group = self._groups.get(kind)
        if group is None and len(self._groups) < LISTED_PROBLEMS:
            group = self._groups[kind] = _Group(text)
        if group is not None:
            group.count += 1
            if len(group.places) < LISTED_PLACES:
                group.places.append(place)

    def lines(self) -> list[str]:
        """Return a line for each kind, in the order in which they came up, at most `LISTED_PROBLEMS` and a last one."""
        unlisted = self.count - sum(group.count for group in self._groups.values())
        return [group.line() for group in self._groups.values()] + ([f"... and {unlisted} more"] if unlisted else [])

    def message(self, path: object, rows: int) -> str:
        """Return the text of the error for a file with problems.

        Args:
            path: the file's name.
            rows: how many rows it has.
        """
        head = f"{path}: {self.count} problem{'s' * (self.count > 1)} in {rows} row{'s' * (rows > 1)}"
        return "\n".join([head, *(f"{path}: {line}" for line in self.lines())])


@dataclass
class _Group:
    """Problems of one kind: the first one's text, the first places, and how many there are."""

    text: str
    places: list[str] = field(default_factory=list)
    count: int = 0

    def line(self) -> str:
        first, *others = self.places
        if not others:
            return f"{first}: {self.text}"
        more = f" and {self.count - len(self.places)} more" if self.count > len(self.places) else ""
        return f"{first}: {self.text} (likewise {'; '.join(others)}{more})"
