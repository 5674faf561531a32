"""The canonical row: a question, the steps of one answer, and what is known about them.

    {"question": "…", "steps": ["…", "…"], "labels": [1, 0.25], "images": ["a.png"], "dataset": "geometry",
     "final_answer_correct": false}

One file of such rows serves training and evaluation (`labels` or `first_error`), as meta set (`final_answer_correct`)
and, with several answers to a question, best-of-N. Readers translate every other format into it.
"""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from reweighting.data.labels import (
    ALLOWED,
    AfterFirstError,
    accuracy_from_counts,
    agree,
    label_value,
    labels_up_to,
)
from reweighting.data.row_files import short_repr
from reweighting.data.schema import AnyText, Domain, FromFile, OptionalCount, OptionalId, Scalar, Text

CORRECT = 0.5  # from here up, a label counts as that of a correct step where the whole answer is judged by its steps

Label = Annotated[float | None, BeforeValidator(label_value), Field(description=ALLOWED)]
Counts = Annotated[list[OptionalCount] | None, Field(description="a list of numbers from 0 up, one per step, or null")]


class LeftOut(Exception):
    """A row that is well formed and holds no answer that can be used. Its text is the reason, one for many rows."""


class CanonicalRow(FromFile):
    """One answer to one question.

    Labels come from one of `labels` (one a step), `first_error` (null and -1 mean that no step is wrong) and `score` of
    `times` continuations that were correct; a row without any of them has unlabelled steps. `images` and `image_path`
    name the same thing: a list, one image, or none. `index` is set by the loader.
    """

    question: Text
    steps: list[AnyText] = Field(min_length=1, description="a list of texts, at least one that is not blank")
    labels: list[Label] | None = Field(None, description="a list of labels, one per step, or null")
    first_error: int | None = Field(None, description="a step's index from 0, or -1 or null if no step is wrong")
    score: Counts = None
    times: Counts = Field(None, validate_default=True)
    final_answer_correct: bool | None = Field(None, description="true, false or null")
    images: list[Any] | AnyText | dict[str, Any] | None = Field(None, description="a list of images, one, or null")
    image_path: list[Any] | AnyText | None = Field(None, description="the path of an image file, a list, or null")
    dataset: Domain | int | None = Field(None, description="text that is not blank, a whole number, or null")
    id: OptionalId = None
    answer: AnyText | None = Field(None, description="the final answer, or null")
    ground_truth: Scalar = None
    index: int = Field(0, description="position in the file, from 0")

    @field_validator("steps")
    @classmethod
    def _has_text(cls, steps: list[str]) -> list[str]:
        steps = [step.strip() for step in steps]
        if not any(steps):
            raise _wrong(f"found {len(steps)} blank steps, allowed: at least one with text")
        return steps

    @field_validator("labels", "score", "times")
    @classmethod
    def _one_per_step(cls, value: list | None, info: ValidationInfo) -> list | None:
        steps = info.data.get("steps")  # absent when it has an error of its own
        if value is not None and steps is not None and len(value) != len(steps):
            allowed = f"one per step, that is {len(steps)}"
            raise _wrong(f"found {len(value)} of them, allowed: {allowed}")
        return value

    @field_validator("first_error")
    @classmethod
    def _is_a_step(cls, value: int | None, info: ValidationInfo) -> int | None:
        steps = info.data.get("steps")
        if value is not None and info.data.get("labels") is not None:
            raise _wrong("found beside labels, allowed: one of the two")
        if value is not None and steps is not None and not -1 <= value < len(steps):
            allowed = f"a step's index from 0 to {len(steps) - 1}, or -1 or null if no step is wrong"
            raise _wrong(f"found {short_repr(value)}, allowed: {allowed}")
        return value

    @field_validator("times")
    @classmethod
    def _agrees_with_labels(cls, times: list | None, info: ValidationInfo) -> list | None:
        score, labels = info.data.get("score"), info.data.get("labels")
        if (score is None) != (times is None) and labels is None and "score" in info.data:
            raise _wrong("score and times label the steps together: give both, or leave out both")
        for place, counts in enumerate(zip(score or (), times or (), strict=False)):
            quotient = accuracy_from_counts(*counts)
            label = labels[place] if labels and place < len(labels) else None
            if quotient is not None and (quotient > 1 or not (label is None or agree(label, quotient))):
                found = f"found {counts[1]:g} beside a score of {counts[0]:g} and a label of {label} at step {place}"
                raise _wrong(f"{found}, allowed: counts whose quotient is the label")
        return times

    @field_validator("image_path")
    @classmethod
    def _one_of_two(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("images"):
            raise _wrong("found beside images, allowed: one of the two")
        return value

    @property
    def image_references(self) -> list[Any]:
        """What names its images: paths, or images themselves (see `image_store.py`)."""
        given = self.images or self.image_path or []
        return [image for image in (given if isinstance(given, list) else [given]) if image]

    def labelled_steps(
        self, after_first_error: AfterFirstError
    ) -> tuple[list[str], list[float | None], list[float | None]]:
        """Return the steps that are not blank, and for each a label and its `times`, None where it has none.

        Args:
            after_first_error: the label of the steps behind `first_error`.

        Raises:
            LeftOut: a blank step is labelled incorrect.
        """
        labels = self._all_labels(after_first_error)
        kept = [place for place, step in enumerate(self.steps) if step]
        if any(
            not step and label is not None and label < CORRECT for step, label in zip(self.steps, labels, strict=True)
        ):
            raise LeftOut("a step that is labelled incorrect is blank")
        times = self.times or [None] * len(labels)
        return (
            [self.steps[place] for place in kept],
            [labels[place] for place in kept],
            [times[place] for place in kept],
        )

    def _all_labels(self, after_first_error: AfterFirstError) -> list[float | None]:
        if self.labels is None and "first_error" in self.model_fields_set:
            return labels_up_to(len(self.steps), self.first_error, after_first_error)
        given = self.labels or [None] * len(self.steps)
        if not self.score or not self.times:
            return list(given)
        quotients = map(accuracy_from_counts, self.score, self.times)
        return [quotient if label is None else label for label, quotient in zip(given, quotients, strict=True)]


def _wrong(text: str) -> PydanticCustomError:
    """The error for a field, in whole words."""
    return PydanticCustomError("steps", "{text}", {"text": text})


def is_correct(final_answer_correct: bool | None, labels: list[float | None]) -> bool | None:
    """Judge a whole answer.

    Args:
        final_answer_correct: decides, if it is known.
        labels: of its steps; an answer with a wrong step is incorrect, one whose steps are all labelled correct is
            correct.

    Returns:
        None if it cannot be judged.
    """
    if final_answer_correct is not None:
        return final_answer_correct
    if any(label is not None and label < CORRECT for label in labels):
        return False
    return None if None in labels else True
