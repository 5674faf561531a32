"""PRMBench: step lists into which one kind of error was written.

{"idx": "…", "modified_question": "…", "modified_process": ["…"], "error_steps": [3, 4], "classification": "circular"}

`error_steps` count from 1; all other steps are correct. The answer before the change (`original_process`) stands in
several files, so it is not read.
"""

from pydantic import Field

from reweighting.data.readers.base import AnswerFields, Domain, LeftOut, OptionalId, RawRow, ReadingOptions, Steps, Text


class PRMBench(RawRow):
    """A row of PRMBench."""

    name = "prmbench"
    modified_question: Text
    modified_process: Steps
    error_steps: list[int] = Field(description="a list of whole numbers from 1")
    idx: OptionalId = None
    classification: Domain = None

    def answers(self, options: ReadingOptions) -> list[AnswerFields]:
        """Translate the row into its one answer. Raises LeftOut for error steps behind the last step."""
        count, wrong = len(self.modified_process), set(self.error_steps)
        if not wrong <= set(range(1, count + 1)):
            raise LeftOut("its error_steps name a step that it does not have")
        labels = [float(step not in wrong) for step in range(1, count + 1)]
        return [{"question": self.modified_question, "steps": self.modified_process, "labels": labels,
                 "dataset": self.classification, "id": self.idx}]  # fmt: skip
