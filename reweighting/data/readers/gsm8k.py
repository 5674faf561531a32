"""GSM8K: questions with their solutions, and with those of models; a line of a solution is a step.

{"question": "…", "answer": "…\\n#### 18"}
{"question": "…", "ground_truth": "…\\nA: 18", "175b_verification": {"is_correct": true, "solution": "…\\nA: 18"}, …}
"""

from typing import Any

from pydantic import ConfigDict, Field, model_validator

from reweighting.data.answers import final_answer
from reweighting.data.readers.base import AnswerFields, LeftOut, RawRow, ReadingOptions, Text
from reweighting.data.schema import AnyText, FromFile


class GSM8K(RawRow):
    """A question with its solution, which is correct."""

    name = "gsm8k"
    question: Text
    answer: Text

    @classmethod
    def matches(cls, raw: Any) -> bool:
        """Return whether the answer ends in `#### …`."""
        return super().matches(raw) and isinstance(raw["answer"], str) and "\n####" in raw["answer"]

    def answers(self, options: ReadingOptions) -> list[AnswerFields]:
        """Translate the row into its one answer."""
        return [{"question": self.question, "steps": _lines(self.answer), "final_answer_correct": True,
                 "ground_truth": final_answer(self.answer)}]  # fmt: skip


class Solution(FromFile):
    """A model's solution."""

    solution: AnyText
    is_correct: bool = Field(description="true or false")


class GSM8KSolutions(RawRow):
    """A question with the solutions of several models, in fields of any names."""

    model_config = ConfigDict(extra="allow")
    name = "gsm8k-solutions"
    question: Text
    ground_truth: Text
    solutions: list[Solution] = Field(default_factory=list, description="solutions")

    @classmethod
    def matches(cls, raw: Any) -> bool:
        """Return whether a field holds a solution and says whether it is correct."""
        return super().matches(raw) and any(map(_is_solution, raw.values()))

    @model_validator(mode="before")
    @classmethod
    def _collect(cls, raw: Any) -> Any:
        return raw | {"solutions": list(filter(_is_solution, raw.values()))} if isinstance(raw, dict) else raw

    def answers(self, options: ReadingOptions) -> list[AnswerFields]:
        """Translate the row into one answer for each model that has one. Raises LeftOut if none has."""
        rows = [
            {"question": self.question, "steps": _lines(found.solution), "final_answer_correct": found.is_correct,
             "ground_truth": self.ground_truth.rpartition("A:")[2].strip()}
            for found in self.solutions
            if found.solution.strip()
        ]  # fmt: skip
        if not rows:
            raise LeftOut("all its solutions are blank")
        return rows


def _is_solution(value: Any) -> bool:
    return isinstance(value, dict) and {"solution", "is_correct"} <= set(value)


def _lines(solution: str) -> list[str]:
    """The steps of a solution: its lines, of which the last one states the answer."""
    return [line for line in map(str.strip, solution.splitlines()) if line]
