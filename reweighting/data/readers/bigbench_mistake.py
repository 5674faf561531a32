"""BIG-Bench-Mistake: step lists whose first mistake people marked.

{"input": "…", "steps": ["…"], "answer": "(A)", "target": "(B)", "mistake_index": 3}

`mistake_index` counts from 0; null: no step is a mistake. The final answer is correct if it equals the target.
"""

from pydantic import Field

from reweighting.data.answer_values import answers_match
from reweighting.data.readers.base import AnswerFields, OptionalText, RawRow, ReadingOptions, Steps, Text


class BigBenchMistake(RawRow):
    """A row of BIG-Bench-Mistake."""

    name = "bigbench-mistake"
    input: Text
    steps: Steps
    mistake_index: int | None = Field(description="the index of the first mistake from 0, or null")
    target: Text
    answer: OptionalText = None

    def answers(self, options: ReadingOptions) -> list[AnswerFields]:
        """Translate the row into its one answer."""
        return [{"question": self.input, "steps": self.steps, "first_error": self.mistake_index,
                 "final_answer_correct": self._is_correct(), "answer": self.answer,
                 "ground_truth": self.target}]  # fmt: skip

    def _is_correct(self) -> bool | None:
        """By the set's own rule, equality, but for what means the same; None if there is no answer."""
        if self.answer is None:
            return None
        return self.answer.split() == self.target.split() or answers_match(self.answer, self.target) is True
