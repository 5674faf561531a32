"""The rows of the three kinds of files: fields, types and what is allowed."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from reweighting.data.labels import accuracy_from_counts, agree
from reweighting.data.steps import split_answer

# A field's description is also what an error message shows after "allowed:".
# Encoding fails, as it should, on half of a surrogate pair, which JSON can carry.
AnyText = Annotated[str, AfterValidator(lambda text: text.encode().decode())]


Text = Annotated[AnyText, Field(pattern=r"\S", description="text that is not blank")]


Domain = Annotated[Text, AfterValidator(str.strip)]


Finite = Annotated[float, Field(allow_inf_nan=False)]


OptionalId = Annotated[int | Text | None, Field(description="a whole number, non-blank text, or null")]


OptionalCount = Annotated[Finite | None, Field(ge=0, description="a number from 0 up, or null")]


Scalar = Annotated[AnyText | bool | int | Finite | None, Field(description="finite number, text, bool, null")]


class FromFile(BaseModel):
    """What a file holds: types as they stand there, fields that nobody asked for left out."""

    # Rust's regular expressions count fewer characters as blank than `str.strip`, which later code uses.
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, regex_engine="python-re")


class Row(FromFile):
    """What all rows have. `image_files` and `index` are not read from the file: the loader sets them."""

    input: Text
    image_path: list[Any] | AnyText | None = Field(description='the path of an image file, a list of paths, null or ""')
    image_files: tuple[Path, ...] = Field((), description="the checked image files, in order, symlinks resolved")
    index: int = Field(0, description="position in the file, from 0")

    def asked(self, separator: str | None) -> str:
        """Return the text that holds the question.

        Args:
            separator: what ends a step, beside the markers.
        """
        return self.input


class TrainingRow(Row):
    """One reasoning step with its Monte Carlo accuracy, in [0, 1].

    `score` of `times` continuations were correct; `accuracy` is their quotient, and may be left out beside them.
    """

    add: Text
    dataset: Domain
    accuracy: float = Field(ge=0, le=1, allow_inf_nan=False, description="a number from 0 to 1")
    id: OptionalId = None
    sid: OptionalId = None
    ground_truth: Scalar = None
    score: OptionalCount = None
    times: OptionalCount = None

    @model_validator(mode="before")
    @classmethod
    def _accuracy_from_counts(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("accuracy") is None:
            quotient = accuracy_from_counts(fields.get("score"), fields.get("times"))
            if quotient is not None:
                return fields | {"accuracy": quotient}
        return fields

    @field_validator("times")
    @classmethod
    def _agrees_with_accuracy(cls, times: float | None, info: ValidationInfo) -> float | None:
        score, accuracy = info.data.get("score"), info.data.get("accuracy")  # absent with an error of their own
        quotient = accuracy_from_counts(score, times)
        if quotient is not None and accuracy is not None and not agree(accuracy, quotient):
            found = f"found {times:g} beside a score of {score:g}, whose quotient is {quotient:.3g}"
            text = f"{found}, and an accuracy of {accuracy:.3g}, allowed: equal ones"
            raise PydanticCustomError("accuracy", "{text}", {"text": text})
        return times


class EvaluationRow(TrainingRow):
    """A training row that may also say whether its last step is correct, which its accuracy only suggests."""

    correct: bool | None = Field(None, description="true, false or null")


class MetaRow(Row):
    """One whole response and whether its final answer is correct."""

    true_false: bool = Field(description="true or false")
    id: OptionalId = None

    def asked(self, separator: str | None) -> str:
        """See `Row.asked`: the answer stands in the same text."""
        return split_answer(self.input, separator)[0]


class CandidateRow(Row):
    """One question with the responses to choose from; `answers` and `true_false` have one entry for each response.

    `candidate_steps` is set by the loader where the steps of the responses are known, and not found at their markers.
    """

    id: int | Text = Field(description="a whole number, or text that is not blank")
    candidates: list[Text] = Field(min_length=1, description="a list of texts, at least one, none blank")
    # An answer may be blank: not every response states one.
    answers: list[AnyText] | None = Field(None, description="a list of texts, one per candidate, or null")
    true_false: list[bool | None] | None = Field(None, description="a list of bools, one per candidate, or null")
    ground_truth: Scalar = None
    candidate_steps: list[list[str]] | None = Field(None, description="the steps of each response")

    @field_validator("answers", "true_false")
    @classmethod
    def _one_per_candidate(cls, value: list | None, info: ValidationInfo) -> list | None:
        candidates = info.data.get("candidates")  # absent when it has an error of its own
        if value is not None and candidates is not None and len(value) != len(candidates):
            allowed = f"one per candidate, that is {len(candidates)}"
            text = f"found {len(value)} of them, allowed: {allowed}"
            raise PydanticCustomError("one_per_candidate", "{text}", {"text": text})
        return value
