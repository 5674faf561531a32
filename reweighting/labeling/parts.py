"""The questions shared out over jobs on several machines, and the files of each job.

part = Part.parse("2/8")
part.holds(question)           # the same on every machine, wherever the question stands in its file
part.named(Path("train.jsonl"))  # train.part-2-of-8.jsonl
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from reweighting.labeling.questions import Question


@dataclass(frozen=True)
class Part:
    """One of several parts of the questions.

    Attributes:
        number: of this part, from 1.
        count: of all parts.
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `2/8`, the second of eight parts.

        Raises:
            ValueError: there is no such part.
        """
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        number, count = map(int, found.groups()) if found else (0, 0)
        if not 1 <= number <= count:
            raise ValueError(text)
        return cls(number, count)

    def holds(self, question: Question) -> bool:
        """Return whether a question belongs to this part: its text and images decide, not its place in the file."""
        # Other digits than those that decide between training rows, meta answers and candidates.
        return int(question.asked[-12:], 16) % self.count == self.number - 1

    def named(self, path: Path) -> Path:
        """Return a file's name with the part in it, so that jobs with one command line never write the same file.

        The only part there is leaves the name as it is.
        """
        if self.count == 1:
            return path
        return path.with_name(f"{path.stem}.part-{self.number}-of-{self.count}{path.suffix}")

    def share_of(self, total: int) -> int:
        """Return this part's share of a number; the shares of all parts add up to it."""
        return self.number * total // self.count - (self.number - 1) * total // self.count
