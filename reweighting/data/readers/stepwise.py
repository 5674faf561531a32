"""Stepwise supervision, as TRL had it and axolotl reads it: a prompt, its completions (the steps), a label for each.

{"prompt": "…", "completions": ["…", "…"], "labels": [true, false]}

A prompt may be a list of messages.
"""

from typing import Any

from pydantic import Field

from reweighting.data.readers.base import AnswerFields, Domain, OptionalId, RawRow, ReadingOptions, Steps
from reweighting.data.readers.conversations import text_of
from reweighting.data.schema import AnyText, FromFile


class Message(FromFile):
    """A message of a prompt."""

    content: AnyText | list[dict[str, Any]] = Field(description="text, or a list of parts")


class Stepwise(RawRow):
    """A row of stepwise supervision."""

    name = "stepwise"
    prompt: AnyText | list[Message] = Field(description="text, or a list of messages")
    completions: Steps
    labels: list[Any] = Field(description="a list of labels, one per step")
    id: OptionalId = None
    dataset: Domain = None
    image: Any = None
    images: Any = None

    def answers(self, options: ReadingOptions) -> list[AnswerFields]:
        """Translate the row into its one answer."""
        prompt = self.prompt
        if not isinstance(prompt, str):
            prompt = "\n".join(text_of(message.content) for message in prompt)
        return [{"question": prompt, "steps": self.completions, "labels": self.labels,
                 "dataset": self.dataset, "id": self.id, "images": self.images or self.image}]  # fmt: skip
