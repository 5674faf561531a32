"""Math-Shepherd and OpenRLHF: a question and steps in one text, with a token behind each step.

{"input": "Q Step 1: … ки\\nStep 2: … ки", "label": "Q Step 1: … +\\nStep 2: … -", "task": "GSM8K"}
{"input": "Q Step 1: … ки\\nStep 2: … ки", "label": ["+", "-"]}

In the first, `label` is `input` with labels in the tokens' places; in the second it is the list of labels, or of
numbers. The question is what stands before `Step 1`, or else before the last blank line ahead of the first token.
"""

from typing import Any

from pydantic import Field

from reweighting.data.readers.base import (
    AnswerFields,
    Domain,
    LeftOut,
    OptionalId,
    RawRow,
    ReadingOptions,
    Text,
    first_given,
)
from reweighting.data.readers.conversations import question_and_step

TOKENS = ("ки", "<prm>", "<extra_0>")  # as published; others by --step_separator


def step_token(text: str, options: ReadingOptions) -> str | None:
    """Return the token that ends the steps in a text, --step_separator first, None if there is none."""
    return next((token for token in (options.step_separator, *TOKENS) if token and token in text), None)


class StepTokens(RawRow):
    """A row whose `input` has a token behind each step."""

    input: Text
    task: Domain = None
    dataset: Domain = None
    id: OptionalId = None

    def _pieces(self, options: ReadingOptions) -> list[str]:
        """What stands before each token, and behind the last one."""
        token = step_token(self.input, options)
        if token is None:
            raise LeftOut(f"it has none of the tokens {', '.join(TOKENS)}: name its own with --step_separator")
        return self.input.split(token)

    def _answer(self, pieces: list[str], labels: list[Any]) -> AnswerFields:
        if len(labels) != len(pieces) - 1:
            raise LeftOut("it has not one label for each step")
        question, first = question_and_step(pieces[0])
        steps = [first, *(piece.strip() for piece in pieces[1:-1])]
        return {"question": question, "steps": steps, "labels": labels, "id": self.id,
                "dataset": first_given(self.dataset, self.task)}  # fmt: skip


class MathShepherd(StepTokens):
    """A row of Math-Shepherd."""

    name = "math-shepherd"
    label: Text

    @classmethod
    def matches(cls, raw: Any) -> bool:
        """Return whether the label is a text."""
        return super().matches(raw) and isinstance(raw["label"], str)

    def answers(self, options: ReadingOptions) -> list[AnswerFields]:
        """Translate the row into its one answer. Raises LeftOut if `label` is another text than `input`."""
        pieces = self._pieces(options)
        labels, at = [], 0
        for piece in pieces[:-1]:
            at += len(piece)
            if self.label[at - len(piece) : at] != piece or at >= len(self.label):
                raise LeftOut("its label is not its input with labels in it")
            labels.append(self.label[at])
            at += 1
        return [self._answer(pieces, labels)]


class OpenRLHF(StepTokens):
    """A row for OpenRLHF's trainer."""

    name = "openrlhf"
    label: list[Any] = Field(description="a list of labels, one per step")

    @classmethod
    def matches(cls, raw: Any) -> bool:
        """Return whether the label is a list."""
        return super().matches(raw) and isinstance(raw["label"], list)

    def answers(self, options: ReadingOptions) -> list[AnswerFields]:
        """Translate the row into its one answer."""
        return [self._answer(self._pieces(options), self.label)]
