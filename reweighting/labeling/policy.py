"""What a policy model is to the labeller: something that answers a question, or continues an answer that was begun."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Protocol, Self

from reweighting.data.placeholders import PLACEHOLDER, question_parts
from reweighting.errors import UserError
from reweighting.labeling.questions import Question

# The five steps of DreamPRM's policy (arXiv 2505.20241), in our words.
FIVE_STEPS = """{question}

Answer in five steps. Begin each of them with `Step N:` on a line of its own.
Step 1: say in your own words what is asked.
Step 2: say what the image or the text shows that matters for it.
Step 3: recall what knowledge it needs.
Step 4: reason from these to the result.
Step 5: conclude.
End with a last line `Final answer: ` and the answer alone."""
PLACE = "{question}"


class PolicyFailure(Exception):
    """The policy cannot be used at all: a refused key, an unknown model, a server that is gone, a model of NaN."""


class QuestionRefused(Exception):
    """The policy refuses this request, as one that is too long for it; others may succeed. Its text is the reason."""


class NoText(Enum):
    """Why a call gives no text: it failed after all tries, and may succeed later; or the server withholds the text."""

    FAILED = "failed"
    WITHHELD = "withheld"


@dataclass(frozen=True)
class Sampling:
    """How the policy answers.

    Attributes:
        temperature: of the sampling; 0 is greedy.
        max_tokens: of one answer or continuation.
    """

    temperature: float
    max_tokens: int


class Policy(Protocol):
    """A model that answers questions.

    Attributes:
        name: of the model, as the rows will say it.
    """

    name: str

    @property
    def calls(self) -> int:
        """How many calls were answered."""
        ...

    @property
    def tokens(self) -> int:
        """How many tokens these answers have."""
        ...

    async def __aenter__(self) -> Self:
        """Start it."""
        ...

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close it."""
        ...

    async def prepare(self, question: Question, notify: Callable[[str], None]) -> str:
        """Find out, with one question, that it answers and that it continues what was begun.

        Args:
            question: the question.
            notify: is called with a line for the user, here and later, when the policy has to be waited for.

        Returns:
            What was found out, as a line for the user.

        Raises:
            UserError: it does not; the message names the remedy.
        """
        ...

    async def complete(self, question: Question, prefix: str = "", number: int = 0) -> str | NoText:
        """Sample the rest of one answer.

        Args:
            question: what is asked.
            prefix: how the answer begins, "" for all of it.
            number: tells the calls with this question and prefix apart. A policy with a seed gives the same text to
                the same call.

        Returns:
            What follows the prefix, or why there is none, which says nothing about the prefix.

        Raises:
            QuestionRefused: this call cannot succeed, others may.
            PolicyFailure: no further call can succeed.
        """
        ...


def read_prompt(path: str | None) -> str:
    """Return the text that asks for an answer, with `{question}` in it.

    Args:
        path: a text file; None: the five steps of the paper.

    Raises:
        UserError: it cannot be read, or does not hold `{question}`.
    """
    if path is None:
        return FIVE_STEPS
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt_file {path}: cannot be read as text: {error}") from error
    if PLACE not in text:
        raise UserError(f"--prompt_file {path}: has no {PLACE}. Put it where the question belongs.")
    if PLACEHOLDER in text:
        raise UserError(f"--prompt_file {path}: holds {PLACEHOLDER}. Take it out: images stand where the question has "
                        "them.")  # fmt: skip
    return text


def fill_prompt(prompt: str, question: Question) -> str:
    """Return the text that asks a question, with an `<image>` for each of its images.

    Args:
        prompt: holds `{question}`.
        question: the question.
    """
    parts = question_parts(question.text, len(question.images))
    return prompt.replace(PLACE, "".join(PLACEHOLDER if part is None else part for part in parts))
