"""DreamPRM-1.5's meta and test sets: whole answers that are correct or not, with images.

{"id": "…", "response": "…", "true_false": true, "image": "a.png", "conversations": [{"from": "human", "value": "Q"},
 {"from": "human", "value": "s1"}, {"from": "gpt", "value": "+"}, …]}
{"question": "Q", "image_path": "a.png", "candidate": ["…"], "true_false": [true]}

In the meta set each reply is `+`, a place to score and no label. Its training set has VisualPRM's form.
"""

from typing import Any

from pydantic import Field

from reweighting.data.readers.base import AnswerFields, Domain, LeftOut, OptionalId, RawRow, ReadingOptions, Text
from reweighting.data.readers.conversations import judged_steps, turns_of
from reweighting.data.steps import split_response


class DreamPRMMeta(RawRow):
    """A row of the meta set."""

    name = "dreamprm-1.5-meta"
    conversations: list[dict[str, Any]] = Field(description="a list of turns")
    true_false: bool = Field(description="true or false")
    image: Any = None
    id: OptionalId = None
    dataset: Domain = None

    def answers(self, options: ReadingOptions) -> list[AnswerFields]:
        """Translate the row into its one answer."""
        question, steps, _ = judged_steps(turns_of(self.conversations))
        return [{"question": question, "steps": steps, "final_answer_correct": self.true_false,
                 "images": self.image, "dataset": self.dataset, "id": self.id}]  # fmt: skip


class DreamPRMTest(RawRow):
    """A row of the test set: a question with several answers."""

    name = "dreamprm-1.5-test"
    question: Text
    candidate: list[Text] = Field(min_length=1, description="a list of texts, none blank")
    true_false: list[bool] = Field(description="a list of bools, one per candidate")
    image_path: Any = None
    id: OptionalId = None
    dataset: Domain = None

    def answers(self, options: ReadingOptions) -> list[AnswerFields]:
        """Translate the row into its answers. Raises LeftOut if they have not a label each."""
        if len(self.true_false) != len(self.candidate):
            raise LeftOut("it has not one true_false for each candidate")
        return [
            {"question": self.question, "steps": split_response(text, options.step_separator), "id": self.id,
             "final_answer_correct": correct, "images": self.image_path, "dataset": self.dataset}
            for text, correct in zip(self.candidate, self.true_false, strict=True)
        ]  # fmt: skip
