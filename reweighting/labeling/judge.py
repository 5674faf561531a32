"""A judge model on an OpenAI-compatible server: whether two answers to a question mean the same.

    async with Judge(ChatClient(["http://localhost:8001/v1"], "Qwen/Qwen3-8B")) as judge:
        await judge.prepare(question, print)
        verdict = await judge.compare(question, "a dozen")  # with the question's correct answer

The judge reads no images: the correct answer is known, so it has to compare texts only.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Self

from reweighting.data.placeholders import without_placeholders
from reweighting.errors import UserError
from reweighting.labeling.chat import Body, ChatClient, TryAgain
from reweighting.labeling.policy import NoText, PolicyFailure, QuestionRefused, Sampling
from reweighting.labeling.questions import Question

JUDGE_PROMPT = """Below are a question, its correct answer and an answer that was given. Do not solve the question: \
compare the two answers only.

Question:
{question}

Correct answer:
{correct}

Given answer:
{given}

Does the given answer mean the same as the correct answer? Reply with one word: yes or no. Reply with unknown if the \
given answer settles on no result."""
SAMPLING = Sampling(temperature=0.0, max_tokens=1024)  # room for a model that thinks first
NO_ANSWER = "I do not know."
VERDICTS = {"yes": True, "no": False}


class JudgeFailure(Exception):
    """The judge cannot be used at all."""


class Judge:
    """A model that compares answers.

    Args:
        client: makes the calls.
    """

    def __init__(self, client: ChatClient):
        self.client = client

    async def __aenter__(self) -> Self:
        await self.client.__aenter__()
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the connections."""
        await self.client.__aexit__(kind, error, trace)

    async def prepare(self, question: Question, notify: Callable[[str], None]) -> str:
        """Find out, with one question, that each server can be relied on in the two plainest cases.

        Args:
            question: the question.
            notify: is called with a line for the user, here and later, when a server has to be waited for.

        Returns:
            What was found out, as a line for the user.

        Raises:
            UserError: one cannot; the message names the remedy.
        """
        self.client.notify = notify
        self.client.known = self._body(question, question.ground_truth)
        for url in self.client.urls:
            for given, allowed in ((question.ground_truth, (True,)), (NO_ANSWER, (False, None))):
                try:
                    text = await self.client.ask_at(url, self._body(question, given))
                except (PolicyFailure, QuestionRefused, TryAgain) as error:
                    raise UserError(f"--judge {url}: {error}") from error
                if read_verdict(text) not in allowed:
                    raise UserError(f"--judge {url}: the judge replies {text[:60]!r} when it compares the correct "
                                    f"answer {question.ground_truth[:60]!r} with {given[:60]!r}. Name a stronger "
                                    "model, or leave --judge out.")  # fmt: skip
        return f"{self.client.model} judges where comparing does not decide"

    async def compare(self, question: Question, given: str) -> bool | NoText | None:
        """Return whether a given answer means the same as the correct one.

        Args:
            question: the question, with its correct answer.
            given: the answer.

        Returns:
            True or False; None where the judge does not say, or refuses; `NoText.FAILED` where it may say so later.

        Raises:
            JudgeFailure: no further call can succeed.
        """
        try:
            text = await self.client.ask(lambda: self._body(question, given))
        except QuestionRefused:
            return None
        except PolicyFailure as error:
            raise JudgeFailure(str(error)) from error
        if text is NoText.FAILED:
            return NoText.FAILED
        return read_verdict(text) if isinstance(text, str) else None

    def _body(self, question: Question, given: str) -> Body:
        """The request."""
        asked = without_placeholders(question.text)
        text = JUDGE_PROMPT.format(question=asked, correct=question.ground_truth, given=given)
        return self.client.request([{"role": "user", "content": text}], SAMPLING)


def read_verdict(reply: str) -> bool | None:
    """Return what a reply says: True for `yes`, False for `no`, None for anything else.

    Args:
        reply: the judge's text; its thoughts before `</think>` do not count.
    """
    return VERDICTS.get(reply.rpartition("</think>")[2].strip().rstrip(".").casefold())
