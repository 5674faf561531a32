"""Responses of a model to questions, one a row, as benchmarks store them. MATH-Vision's outputs are of this form.

{"id": "4", "question": "…", "options": [], "image": "images/4.jpg", "response": "…", "answer": "6", "correct": true}

Where the question stands in another file, `--questions_json_file` names it: its row with the same `id` is joined.
"""

from typing import Any

from pydantic import Field

from reweighting.data.readers.base import (
    AnswerFields,
    Domain,
    LeftOut,
    OptionalId,
    OptionalText,
    RawRow,
    ReadingOptions,
    Scalar,
    first_given,
)
from reweighting.data.schema import AnyText
from reweighting.data.steps import split_response

OTHERS = {"conversations", "steps_with_score"}  # formats with these keep the response beside what they are read from


class Responses(RawRow):
    """A response and what is known about it."""

    name = "responses"
    joins_questions = True
    response: AnyText
    question: OptionalText = None
    options: list[AnyText] | None = Field(None, description="a list of texts, or null")
    image: Any = None
    images: Any = None
    id: OptionalId = None
    correct: bool | None = Field(None, description="true, false or null")
    is_correct: bool | None = Field(None, description="true, false or null")
    true_false: bool | None = Field(None, description="true, false or null")
    model_answer: Scalar = None
    answer: Scalar = None
    ground_truth: Scalar = None
    subject: Domain = None
    data_source: Domain = None
    dataset: Domain = None

    @classmethod
    def matches(cls, raw: Any) -> bool:
        """Return whether the row is a response to a question that it holds or names."""
        if not super().matches(raw) or not isinstance(raw["response"], str) or OTHERS & set(raw):
            return False
        return "id" in raw or "question" in raw

    def answers(self, options: ReadingOptions) -> list[AnswerFields]:
        """Translate the row into its one answer. Raises LeftOut if question or response is missing."""
        if not self.question or not self.question.strip():
            raise LeftOut("it has no question: name the file of the questions with --questions_json_file")
        if not self.response.strip():
            raise LeftOut("its response is blank")
        return [{"question": self._asked(), "steps": split_response(self.response, options.step_separator),
                 "final_answer_correct": first_given(self.correct, self.is_correct, self.true_false),
                 "answer": None if self.model_answer is None else str(self.model_answer),
                 "ground_truth": first_given(self.ground_truth, self.answer), "id": self.id,
                 "images": self.images or self.image,
                 "dataset": first_given(self.dataset, self.subject, self.data_source)}]  # fmt: skip

    def _asked(self) -> str:
        """The question with its options, unless they only name what stands in the image: A, B, C."""
        shown = [option for option in self.options or () if option.strip()]
        if all(len(option.strip()) == 1 and option.strip().isalpha() for option in shown):
            return str(self.question)
        letters = (f"({chr(ord('A') + place)}) {option}" for place, option in enumerate(shown))
        return "\n".join([str(self.question), *letters])
