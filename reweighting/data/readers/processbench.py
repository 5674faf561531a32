"""ProcessBench: step lists whose first wrong step experts marked.

{"id": "gsm8k-0", "generator": "…", "problem": "…", "steps": ["…"], "final_answer_correct": false, "label": 1}

`label` counts from 0; -1: no step is wrong.
"""

from pydantic import Field

from reweighting.data.readers.base import AnswerFields, OptionalId, RawRow, ReadingOptions, Steps, Text


class ProcessBench(RawRow):
    """A row of ProcessBench."""

    name = "processbench"
    problem: Text
    steps: Steps
    label: int = Field(description="the index of the first wrong step from 0, or -1")
    final_answer_correct: bool | None = Field(None, description="true, false or null")
    id: OptionalId = None

    def answers(self, options: ReadingOptions) -> list[AnswerFields]:
        """Translate the row into its one answer."""
        return [{"question": self.problem, "steps": self.steps, "first_error": self.label, "id": self.id,
                 "final_answer_correct": self.final_answer_correct}]  # fmt: skip
