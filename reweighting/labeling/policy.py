"""What a policy model is to the labeller: something that answers a question, or continues an answer that was begun."""

from types import TracebackType
from typing import Protocol, Self

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
    """The policy cannot be used at all: a refused key, an unknown model, a server that is gone."""


class Policy(Protocol):
    """A model that answers questions.

    Attributes:
        name: of the model, as the rows will say it.
    """

    name: str

    async def __aenter__(self) -> Self:
        """Start it."""
        ...

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close it."""
        ...

    async def prepare(self, question: Question) -> str:
        """Find out, with one question, that it answers and that it continues what was begun.

        Returns:
            What was found out, as a line for the user.

        Raises:
            UserError: it does not; the message names the remedy.
        """
        ...

    async def complete(self, question: Question, prefix: str = "") -> str | None:
        """Sample the rest of one answer.

        Args:
            question: what is asked.
            prefix: how the answer begins, "" for all of it.

        Returns:
            What follows the prefix; None if this call failed, which says nothing about the prefix.

        Raises:
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
    return text
