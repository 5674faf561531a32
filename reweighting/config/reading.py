"""The flags that say how rows are read: the same for all commands."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reweighting.config.parsing import flag
from reweighting.data.labels import AfterFirstError, Neutral
from reweighting.data.load_answers import FORMATS
from reweighting.data.readers.base import ReadingOptions
from reweighting.data.sources import Source, expand
from reweighting.errors import UserError

FILES = "files, folders, globs, or hub:owner/name[:config][:split]; domain=FILE names a domain"


@dataclass(frozen=True)
class ReadingConfig:
    """How rows are read."""

    format: str | None = flag(
        default=None, help=f"format of all files (default: found by the fields of their rows): {', '.join(FORMATS)}"
    )
    domain_field: str | None = flag(
        default=None, help="the field that names the domain, `a.b` for one inside another (default: the format's own)"
    )
    neutral: Neutral = flag(default="unlabelled", help="what a step counts as whose rating is neutral, 0 of -1 to 1")
    after_first_error: AfterFirstError = flag(
        default="unlabelled",
        help="what the steps count as behind the first wrong one, where only that is labelled; ProcessBench's measure "
        "is the same either way",
    )
    step_separator: str | None = flag(
        default=None,
        help="a text that ends a step, beside `Step N` markers: \\n\\n for a blank line, or a token such as <extra_0>",
    )
    questions_json_file: str | None = flag(
        default=None, help="rows with `id` and `question`, for rows that hold only an answer and the question's `id`"
    )
    ignore_images: bool = flag(default=False, help="read all rows as if they had no images")

    def __post_init__(self) -> None:
        if self.format is not None and self.format not in FORMATS:
            raise UserError(f"--format: found {self.format!r:.60}, allowed: {', '.join(FORMATS)}")

    def options(self) -> ReadingOptions:
        """Return the options for the readers."""
        separator = self.step_separator
        if separator is not None:
            separator = separator.replace("\\n", "\n").replace("\\t", "\t")  # as a shell passes them
        return ReadingOptions(
            self.neutral,
            self.after_first_error,
            separator,
            self.domain_field,
            self.ignore_images,
            self.questions_json_file,
        )

    def sources(self, files: Sequence[str] | None, mixture: str | None = None) -> list[Source]:
        """Find the files that a flag names.

        Args:
            files: as the command line gives them.
            mixture: a JSON list of objects with the fields of a `Source`, which come after the files.

        Raises:
            UserError: one of them stands for no file.
        """
        entries: list[Any] = list(files or ())
        if mixture is not None:
            try:
                more = json.loads(mixture)
            except (ValueError, RecursionError):
                more = None
            if not more or not isinstance(more, list) or not all(isinstance(entry, dict) for entry in more):
                raise UserError(
                    "--mixture: allowed: a list of objects with path, domain, format and max_rows, at least one"
                )
            entries += more
        sources = expand(entries)
        return [Source(one.path, one.domain, one.format or self.format, one.max_rows) for one in sources]
