"""Mr-Ben: solutions of several models to exam questions, whose first wrong step experts marked.

{"Question": "…", "Options": "A: …\\nB: …", "Subject": "college_biology", "Model_Solution_Steps": ["Step 1: …"],
 "Model_Solution_Correctness": "incorrect", "Model_Solution_First_Error_Step": "2"}

The first wrong step is named by its `Step N` marker ("N/A": none), and the list has lines without one, which continue
the step before: steps are cut at the markers.
"""

from typing import Literal

from pydantic import Field

from reweighting.data.readers.base import (
    AnswerFields,
    Domain,
    LeftOut,
    OptionalId,
    OptionalText,
    RawRow,
    ReadingOptions,
    Steps,
    Text,
)
from reweighting.data.steps import first_step_number, split_response


class MrBen(RawRow):
    """A row of Mr-Ben. Its files hold an object, {question's id: [answers]}, whose answers are the rows."""

    name = "mr-ben"
    Question: Text
    Model_Solution_Steps: Steps
    Model_Solution_Correctness: Literal["correct", "incorrect"] = Field(description="correct or incorrect")
    Model_Solution_First_Error_Step: int | Text = Field(description="a step's number from 1, or N/A")
    Options: OptionalText = None
    Subject: Domain = None
    Question_UUID: OptionalId = None
    Ground_Truth_Answer: OptionalText = None
    Ground_Truth_Answer_Modified: OptionalText = None

    def answers(self, options: ReadingOptions) -> list[AnswerFields]:
        """Translate the row into its one answer. Raises LeftOut if the first wrong step is not there."""
        question = f"{self.Question}\n{self.Options}" if self.Options and self.Options.strip() else self.Question
        steps = split_response("\n".join(self.Model_Solution_Steps))
        return [{"question": question, "steps": steps, "first_error": self._first_error(steps),
                 "final_answer_correct": self.Model_Solution_Correctness == "correct", "dataset": self.Subject,
                 "id": self.Question_UUID,
                 "ground_truth": self.Ground_Truth_Answer_Modified or self.Ground_Truth_Answer}]  # fmt: skip

    def _first_error(self, steps: list[str]) -> int:
        named = str(self.Model_Solution_First_Error_Step).strip()
        if self.Model_Solution_Correctness == "correct" and named.upper() == "N/A":
            return -1
        numbers = [first_step_number(step) for step in steps]
        if not named.isdecimal() or numbers.count(int(named)) != 1:
            raise LeftOut("its first wrong step is none of its numbered steps")
        return numbers.index(int(named))
