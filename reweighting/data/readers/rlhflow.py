"""RLHFlow: a conversation with a step a turn, each judged by the reply; and its tests, with several answers.

{"conversations": [{"role": "user", "content": "Q Step 1: …"}, {"role": "assistant", "content": "+"}, …]}
{"prompt": "Q", "answers": ["Step 1: … ки\\nStep 2: … ки"], "labels": [1, 0]}

The row may also be the list of turns itself. In tests, a label says whether the final answer is correct.
"""

from typing import Any

from pydantic import Field, model_validator

from reweighting.data.canonical import CORRECT, Label
from reweighting.data.readers.base import (
    AnswerFields,
    Domain,
    LeftOut,
    OptionalId,
    RawRow,
    ReadingOptions,
    Scalar,
    Text,
)
from reweighting.data.readers.conversations import are_judged, judged_steps, turns_of
from reweighting.data.readers.math_shepherd import step_token
from reweighting.data.steps import split_response


class RLHFlow(RawRow):
    """A judged conversation of roles and contents."""

    name = "rlhflow"
    conversations: list[dict[str, Any]] = Field(description="a list of turns")
    dataset: Domain = None
    id: OptionalId = None

    @classmethod
    def matches(cls, raw: Any) -> bool:
        """Return whether all turns of the assistant are labels."""
        turns = raw if isinstance(raw, list) else raw.get("conversations") if isinstance(raw, dict) else None
        return isinstance(turns, list) and all(isinstance(turn, dict) and "role" in turn for turn in turns) and (
            are_judged(turns_of(turns))
        )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _list_of_turns(cls, raw: Any) -> Any:
        return {"conversations": raw} if isinstance(raw, list) else raw

    def answers(self, options: ReadingOptions) -> list[AnswerFields]:
        """Translate the row into its one answer."""
        question, steps, labels = judged_steps(turns_of(self.conversations))
        return [{"question": question, "steps": steps, "labels": labels, "dataset": self.dataset, "id": self.id}]


class RLHFlowTest(RawRow):
    """A question with several answers."""

    name = "rlhflow-test"
    prompt: Text
    answers_: list[Text] = Field(alias="answers", min_length=1, description="a list of texts, none blank")
    labels: list[Label] = Field(description="a list of labels, one per answer")
    ground_truth: Scalar = None
    id: OptionalId = None
    dataset: Domain = None

    def answers(self, options: ReadingOptions) -> list[AnswerFields]:
        """Translate the row into its answers. Raises LeftOut if they have not a label each."""
        if len(self.labels) != len(self.answers_):
            raise LeftOut("it has not one label for each answer")
        rows = []
        for text, label in zip(self.answers_, self.labels, strict=True):
            steps = split_response(text, step_token(text, options))
            rows.append({"question": self.prompt, "steps": steps, "id": self.id,
                         "dataset": self.dataset, "ground_truth": self.ground_truth,
                         "final_answer_correct": None if label is None else label >= CORRECT})  # fmt: skip
        return rows
