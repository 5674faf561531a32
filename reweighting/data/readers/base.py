"""What readers share: a reader is a pydantic model of one format's row, with its translation into canonical rows.

A new format is a class here in a file of its own, registered in `readers/__init__.py`:

    class MyRow(RawRow):
        name = "my-set"
        problem: Text
        solution: Steps

        def answers(self, options):
            return [{"question": self.problem, "steps": self.solution}]

Its fields are checked before `answers` is called, so that a wrong one is reported with row, field and what is allowed.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from reweighting.data.canonical import LeftOut
from reweighting.data.labels import RATINGS, AfterFirstError, Neutral, check_rating
from reweighting.data.schema import AnyText, FromFile, OptionalId, Scalar, Text

AnswerFields = dict[str, Any]  # fields of a `CanonicalRow`
OptionalText = Annotated[AnyText | None, Field(description="text or null")]
Steps = Annotated[list[AnyText], Field(min_length=1, description="a list of texts, at least one")]
Rating = Annotated[int | None, BeforeValidator(check_rating), Field(description=RATINGS)]
Domain = Annotated[AnyText | int | None, Field(description="text, a whole number, or null")]

__all__ = ["AnswerFields", "Domain", "LeftOut", "OptionalId", "OptionalText", "Rating", "RawRow", "ReadingOptions",
           "Scalar", "Steps", "Text", "first_given"]  # fmt: skip


@dataclass(frozen=True)
class ReadingOptions:
    """How rows are read, where they leave it open.

    Attributes:
        neutral: what a rating of 0 between -1 and 1 counts as.
        after_first_error: the label of the steps behind the first wrong one.
        step_separator: a text that ends a step, beside `Step N` markers; None: only the markers.
        domain_field: the field that names the domain, `a.b` for one inside another; None: what the format has.
        ignore_images: read the rows as if they named no images.
        questions_json_file: where rows that hold only an answer find their question, by `id`.
    """

    neutral: Neutral = "unlabelled"
    after_first_error: AfterFirstError = "unlabelled"
    step_separator: str | None = None
    domain_field: str | None = None
    ignore_images: bool = False
    questions_json_file: str | None = None

    @property
    def domain_columns(self) -> list[str]:
        """The column of a table that holds the domain, if one is named."""
        return [] if self.domain_field is None else [self.domain_field.partition(".")[0]]


class RawRow(FromFile):
    """One row of a public format, as it stands in the file.

    Attributes:
        name: the format's.
        joins_questions: whether a row may hold an answer only, whose question is in `--questions_json_file`.
    """

    name: ClassVar[str]
    joins_questions: ClassVar[bool] = False

    @classmethod
    def matches(cls, raw: Any) -> bool:
        """Return whether a row is of this format: whether it has all required fields."""
        names = [field.alias or name for name, field in cls.model_fields.items() if field.is_required()]
        return isinstance(raw, Mapping) and all(name in raw for name in names)

    @abstractmethod
    def answers(self, options: ReadingOptions) -> list[AnswerFields]:
        """Translate the row.

        Args:
            options: what the row leaves open.

        Returns:
            The fields of one `CanonicalRow` for each answer in the row.

        Raises:
            LeftOut: none of it can be used.
        """


def first_given(*values: Any) -> Any:
    """Return the first value that is neither None nor a blank text, None if there is none."""
    return next((value for value in values if value is not None and not (isinstance(value, str) and not value.strip())),
                None)  # fmt: skip
