"""VisualPRM400K, as a conversation and in its raw form, and VisualProcessBench.

{"id": 1, "image": "a.png", "conversations": [{"from": "system", "value": "…"},
 {"from": "human", "value": "### Question:\\nQ\\n\\n### Solution Process:\\ns1"}, {"from": "gpt", "value": "+"}, …]}
{"image": "a.png", "question": "Q", "answer": "4", "response": "…", "num_mc_sequences": 16,
 "steps_with_score": [{"step": "s1", "score": 0.5, "num_mc_correct": 8, "num_mc_total": 16}]}
{"image": ["a.png"], "question": "Q", "answer": "4", "policy_model": "…", "data_source": "MMMU",
 "response": {"steps": ["s1"], "process_correctness": [1, 0, -1]}}

In VisualProcessBench, 0 is a neutral step.
"""

from typing import Any

from pydantic import Field

from reweighting.data.labels import rating_label
from reweighting.data.readers.base import (
    AnswerFields,
    Domain,
    LeftOut,
    OptionalId,
    Rating,
    RawRow,
    ReadingOptions,
    Scalar,
    Steps,
    Text,
)
from reweighting.data.readers.conversations import are_judged, judged_steps, turns_of
from reweighting.data.schema import AnyText, FromFile, OptionalCount


class VisualPRM(RawRow):
    """A judged conversation about images. DreamPRM-1.5 trains on the same form."""

    name = "visualprm"
    conversations: list[dict[str, Any]] = Field(description="a list of turns")
    image: Any = None
    images: Any = None
    id: OptionalId = None
    dataset: Domain = None

    @classmethod
    def matches(cls, raw: Any) -> bool:
        """Return whether all turns of the assistant are labels."""
        if not isinstance(raw, dict) or "true_false" in raw or "conversations" not in raw:
            return False
        turns = raw["conversations"]
        return are_judged(turns_of(turns)) and all("from" in turn for turn in turns)

    def answers(self, options: ReadingOptions) -> list[AnswerFields]:
        """Translate the row into its one answer."""
        question, steps, labels = judged_steps(turns_of(self.conversations))
        return [{"question": question, "steps": steps, "labels": labels, "images": self.images or self.image,
                 "dataset": self.dataset, "id": self.id}]  # fmt: skip


class ScoredStep(FromFile):
    """A step with the outcome of its rollouts."""

    step: AnyText
    score: float | None = Field(None, description="a number from 0 to 1, or null")
    num_mc_correct: OptionalCount = None
    num_mc_total: OptionalCount = None


class VisualPRMRaw(RawRow):
    """A row of VisualPRM400K as its Monte Carlo tool wrote it."""

    name = "visualprm-raw"
    question: Text
    steps_with_score: list[ScoredStep] = Field(description="a list of steps with their scores")
    image: Any = None
    answer: Scalar = None
    id: OptionalId = None
    dataset: Domain = None

    def answers(self, options: ReadingOptions) -> list[AnswerFields]:
        """Translate the row into its one answer."""
        scored = self.steps_with_score
        if not scored:
            raise LeftOut("it has no step")
        return [{"question": self.question, "steps": [step.step for step in scored],
                 "labels": [step.score for step in scored], "score": [step.num_mc_correct for step in scored],
                 "times": [step.num_mc_total for step in scored], "images": self.image, "dataset": self.dataset,
                 "ground_truth": self.answer, "id": self.id}]  # fmt: skip


class JudgedResponse(FromFile):
    """The steps of a response and their ratings."""

    steps: Steps
    process_correctness: list[Rating] = Field(description="a list of ratings, one per step")


class VisualProcessBench(RawRow):
    """A row of VisualProcessBench."""

    name = "visualprocessbench"
    question: Text
    response: JudgedResponse
    image: Any = None
    answer: Scalar = None
    data_source: Domain = None
    id: OptionalId = None

    @classmethod
    def matches(cls, raw: Any) -> bool:
        """Return whether the response is an object."""
        return super().matches(raw) and isinstance(raw["response"], dict)

    def answers(self, options: ReadingOptions) -> list[AnswerFields]:
        """Translate the row into its one answer."""
        labels = [rating_label(rating, options.neutral) for rating in self.response.process_correctness]
        return [{"question": self.question, "steps": self.response.steps, "labels": labels, "images": self.image,
                 "dataset": self.data_source, "ground_truth": self.answer, "id": self.id}]  # fmt: skip
