"""MM-PRM: a question and its steps in one turn, a token behind each, and a list of scores as the reply.

{"id": 0, "image": "a.png", "conversations": [{"from": "human", "value": "Question: Q\\nProcess: s1<prm>\\n\\ns2<prm>"},
 {"from": "gpt", "value": [0.9, 0.2]}]}
"""

from typing import Any

from pydantic import Field

from reweighting.data.readers.base import AnswerFields, Domain, LeftOut, OptionalId, RawRow, ReadingOptions
from reweighting.data.readers.conversations import question_and_step, turns_of

TOKEN = "<prm>"


class MMPRM(RawRow):
    """A row of MM-PRM."""

    name = "mm-prm"
    conversations: list[dict[str, Any]] = Field(description="a turn with question and steps, and one with scores")
    image: Any = None
    id: OptionalId = None
    dataset: Domain = None

    @classmethod
    def matches(cls, raw: Any) -> bool:
        """Return whether the reply is a list."""
        turns = turns_of(raw.get("conversations")) if isinstance(raw, dict) else []
        return len(turns) > 1 and turns[-1][0] == "assistant" and isinstance(turns[-1][1], list)

    def answers(self, options: ReadingOptions) -> list[AnswerFields]:
        """Translate the row into its one answer. Raises LeftOut if it has not one score for each step."""
        (_, text), (_, scores) = turns_of(self.conversations)[-2:]
        first, *rest = str(text).split(options.step_separator or TOKEN)
        if len(rest) != len(scores):
            raise LeftOut("it has not one score for each step")
        question, step = question_and_step(first)
        steps = [step, *(piece.strip() for piece in rest[:-1])]
        return [{"question": question, "steps": steps, "labels": scores,
                 "images": self.image, "dataset": self.dataset, "id": self.id}]  # fmt: skip
