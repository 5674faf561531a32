"""LLaVA and ShareGPT: a conversation whose last turn is the answer, without step labels.

{"id": "…", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nQ"},
 {"from": "gpt", "value": "…"}]}
{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "…"}]}

The turns before the answer are the question. `true_false` or `correct`, where given, says whether the answer is
correct.
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
    Scalar,
    first_given,
)
from reweighting.data.readers.conversations import are_judged, turns_of
from reweighting.data.steps import split_response

NAMES = {"user": "User", "assistant": "Assistant"}


class Llava(RawRow):
    """A conversation that ends in an answer."""

    name = "llava"
    conversations: Any = None
    messages: Any = None
    image: Any = None
    images: Any = None
    id: OptionalId = None
    dataset: Domain = None
    true_false: bool | None = Field(None, description="true, false or null")
    correct: bool | None = Field(None, description="true, false or null")
    ground_truth: Scalar = None

    @classmethod
    def matches(cls, raw: Any) -> bool:
        """Return whether the row is a conversation of texts."""
        turns = turns_of(raw.get("conversations") or raw.get("messages")) if isinstance(raw, dict) else []
        return bool(turns) and all(isinstance(content, str) for _, content in turns) and not are_judged(turns)

    def answers(self, options: ReadingOptions) -> list[AnswerFields]:
        """Translate the row into its one answer. Raises LeftOut if it does not end in one."""
        turns = [turn for turn in turns_of(self.conversations or self.messages) if turn[0] != "system"]
        if len(turns) < 2 or turns[-1][0] != "assistant":
            raise LeftOut("it does not end in an answer")
        *asked, (_, answer) = turns
        question = asked[0][1] if len(asked) == 1 else "\n".join(f"{NAMES[role]}: {text}" for role, text in asked)
        return [{"question": question, "steps": split_response(answer, options.step_separator),
                 "final_answer_correct": first_given(self.true_false, self.correct), "id": self.id,
                 "images": self.images or self.image, "dataset": self.dataset,
                 "ground_truth": self.ground_truth}]  # fmt: skip
