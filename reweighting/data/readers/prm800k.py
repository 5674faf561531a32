"""PRM800K: steps with alternatives, each rated by people.

{"question": {"problem": "…", "ground_truth_answer": "…"},
 "label": {"steps": [{"completions": [{"text": "…", "rating": 1}], "human_completion": null, "chosen_completion": 0}]}}

The chosen completions are one answer. Each alternative is an answer of its own: the steps before it, unlabelled there
so that no rating counts twice, and itself.
"""

from typing import Any

from pydantic import Field

from reweighting.data.labels import rating_label
from reweighting.data.readers.base import AnswerFields, LeftOut, OptionalText, Rating, RawRow, ReadingOptions, Text
from reweighting.data.schema import AnyText, FromFile


class Completion(FromFile):
    """A text that a step could be, and its rating."""

    text: AnyText
    rating: Rating = None


class Step(FromFile):
    """The completions of a step, of which one was chosen, or none where a person wrote a better one."""

    completions: list[Completion] | None = Field(None, description="a list of completions, or null")
    human_completion: Completion | None = Field(None, description="a completion or null")
    chosen_completion: int | None = Field(None, description="the index of a completion, or null")


class Question(FromFile):
    """A problem and its answer."""

    problem: Text
    ground_truth_answer: OptionalText = None


class Label(FromFile):
    """What people made of an answer."""

    steps: list[Step]


class PRM800K(RawRow):
    """A row of PRM800K."""

    name = "prm800k"
    question: Question
    label: Label

    @classmethod
    def matches(cls, raw: Any) -> bool:
        """Return whether question and label are objects."""
        return super().matches(raw) and isinstance(raw["question"], dict) and isinstance(raw["label"], dict)

    def answers(self, options: ReadingOptions) -> list[AnswerFields]:
        """Translate the row into the chosen answer and one for each alternative."""
        chosen: list[tuple[str, float | None]] = []  # text and label of each step
        alternatives: list[tuple[list[str], float | None]] = []  # the steps of an answer, and the label of the last
        for step in self.label.steps:
            completions = step.completions or []
            place = step.chosen_completion
            if place is not None and not 0 <= place < len(completions):
                raise LeftOut("its chosen_completion is none of a step's completions")
            taken = completions[place] if place is not None else step.human_completion
            ends = taken is None
            if ends and completions:  # no completion was good enough to go on with
                taken = completions[0]
            prefix = [text for text, _ in chosen]
            for completion in completions:
                if completion is not taken and completion.text.strip():
                    alternatives.append(([*prefix, completion.text], rating_label(completion.rating, options.neutral)))
            if taken is not None:
                chosen.append((taken.text, rating_label(taken.rating, options.neutral)))
            if ends:
                break
        if not chosen:
            raise LeftOut("it has no step")
        common = {"question": self.question.problem, "ground_truth": self.question.ground_truth_answer}
        texts, labels = zip(*chosen, strict=True)
        return [
            common | {"steps": list(texts), "labels": list(labels)},
            *(
                common | {"steps": steps, "labels": [None] * (len(steps) - 1) + [label]}
                for steps, label in alternatives
            ),
        ]
