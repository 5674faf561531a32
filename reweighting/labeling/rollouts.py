"""Answers to a question, and of each of their steps how many continuations end in the correct answer.

A step's Monte Carlo label is the share of continuations from there whose final answer is correct (Math-Shepherd,
arXiv 2312.08935). A continuation whose answer cannot be judged counts as neither. Only what is complete is stored: an
answer that came, and the counts of a step all of whose continuations came.
"""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from reweighting.data.answers import final_answer
from reweighting.data.steps import split_response
from reweighting.labeling.checker import Checker
from reweighting.labeling.policy import NoText, Policy, QuestionRefused
from reweighting.labeling.questions import Question
from reweighting.labeling.store import WHOLE, Store

Search = Literal["full", "binary"]
T = TypeVar("T")


@dataclass(frozen=True)
class RolloutSettings:
    """How answers are labelled.

    Attributes:
        answers: to each question.
        rollouts: continuations from each step; 0: the steps stay unlabelled.
        max_steps: of an answer; further steps join the last of them.
        step_separator: what ends a step beside `Step N` markers; None: only markers.
        search: "full" labels every step; "binary" finds the first step from which no continuation is correct (OmegaPRM,
            arXiv 2406.06592), and labels the steps on the way only.
        enough: stop at a step when so many continuations all agree; 0: never.
    """

    answers: int
    rollouts: int
    max_steps: int
    step_separator: str | None
    search: Search
    enough: int


@dataclass(frozen=True)
class LabelledAnswer:
    """An answer of the policy.

    Attributes:
        steps: its steps, [S].
        score, times: of `times` judged continuations of each step, `score` were correct, [S]; None where a step has no
            label.
        correct: whether the answer itself is correct, None if that cannot be judged.
        stated: the final answer that it states.
    """

    steps: tuple[str, ...]
    score: tuple[int | None, ...]
    times: tuple[int | None, ...]
    correct: bool | None
    stated: str | None

    @property
    def labels(self) -> list[float | None]:
        """The share of correct continuations of each step, None where none was judged."""
        counts = zip(self.score, self.times, strict=True)
        return [None if score is None or not times else score / times for score, times in counts]


@dataclass
class Tally:
    """What did not come, so that the user learns of it.

    Attributes:
        failed_answers, failed_continuations, failed_verdicts: calls that failed after all tries; the last are the
            judge's.
        empty_answers: answers without any text.
        empty_continuations: those of steps that have no others.
        refused_continuations: how many the policy refuses, and counts with those that cannot be judged.
        why: the reason for the last of these.
    """

    failed_answers: int = 0
    failed_continuations: int = 0
    failed_verdicts: int = 0
    empty_answers: int = 0
    empty_continuations: int = 0
    refused_continuations: int = 0
    why: str = ""


@asynccontextmanager
async def task_group() -> AsyncGenerator[asyncio.TaskGroup]:
    """Run tasks until all are done; the first error cancels the others, and is raised by itself."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def all_of(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run some calls at once, and return their results in order; see `task_group` for errors."""
    async with task_group() as group:
        tasks = [group.create_task(call) for call in calls]
    return [task.result() for task in tasks]


class Labeller:
    """Asks a policy for answers and continuations, and writes what comes.

    Args:
        policy: answers and continues.
        checker: decides what is correct.
        store: holds what came.
        settings: how answers are labelled.

    Attributes:
        tally: what did not come.
    """

    def __init__(self, policy: Policy, checker: Checker, store: Store, settings: RolloutSettings):
        self.policy, self.checker, self.store, self.settings = policy, checker, store, settings
        self.tally = Tally()

    async def label(self, question: Question) -> None:
        """Ask for all that the store lacks of a question, and write it as it comes. What fails is counted, not written.

        Raises:
            PolicyFailure, JudgeFailure: the policy, or the judge, cannot be used any more.
            QuestionRefused: the policy refuses the question.
        """
        await all_of(self._label_answer(question, place) for place in range(self.settings.answers))

    async def _label_answer(self, question: Question, place: int) -> None:
        """One answer to a question, and its steps."""
        entry = self.store.get(question.key, place, WHOLE)
        if entry is None:
            text = await self.policy.complete(question, number=place)
            if text is NoText.FAILED:
                self.tally.failed_answers += 1
                return
            if isinstance(text, str) and not any(cut_answer(text, self.settings)[0]):
                self.tally.empty_answers += 1
                return
            entry = {"text": text if isinstance(text, str) else None}
            self.store.put(question.key, place, WHOLE, entry)
        text = entry["text"]
        if text is None:
            return
        correct = await self.checker.check(text, question)
        self.tally.failed_verdicts += correct is NoText.FAILED
        prefixes = cut_answer(text, self.settings)[1] if self.settings.rollouts else []
        if self.settings.search == "full":
            await all_of(self._label_step(question, place, step, prefix) for step, prefix in enumerate(prefixes))
        elif correct is False:
            await self._label_by_halves(question, place, prefixes)

    async def _label_by_halves(self, question: Question, place: int, prefixes: list[str]) -> None:
        """Find the first step of an incorrect answer from which no continuation is correct."""
        low, high = -1, len(prefixes)  # from low on, something is still correct; from high on, nothing is
        while high - low > 1:
            middle = (low + high) // 2
            counts = await self._label_step(question, place, middle, prefixes[middle])
            if counts is None:  # where the search goes on is known when its continuations have come
                return
            score, times = counts
            if times and not score:
                high = middle
            else:
                low = middle

    async def _label_step(self, question: Question, place: int, step: int, prefix: str) -> list[int] | None:
        """Continue an answer behind a step, and count: [correct, judged]; None if something is missing."""
        found = self.store.get(question.key, place, step)
        if found is not None:
            return found
        score = times = 0
        rollouts = self.settings.rollouts
        first = min(self.settings.enough or rollouts, rollouts)
        for numbers in (range(first), range(first, rollouts)):
            # Answers that begin alike have continuations of their own.
            rests = await all_of(self._continue(question, prefix, place * rollouts + number) for number in numbers)
            if failed := rests.count(NoText.FAILED):
                self.tally.failed_continuations += failed
                return None
            if rests and all(isinstance(rest, str) and not rest.strip() for rest in rests):
                self.tally.empty_continuations += len(rests)
                return None
            texts = [f"{prefix}{rest}" for rest in rests if isinstance(rest, str)]
            verdicts = await all_of(self.checker.check(text, question) for text in texts)
            if failed := verdicts.count(NoText.FAILED):
                self.tally.failed_verdicts += failed
                return None
            score += verdicts.count(True)
            times += len(verdicts) - verdicts.count(None)
            if times == first and score in (0, times):  # all agree
                break
        self.store.put(question.key, place, step, [score, times])
        return [score, times]

    async def _continue(self, question: Question, prefix: str, number: int) -> str | NoText:
        """One continuation. The policy refuses one whose prefix is too long, and would do so again."""
        try:
            return await self.policy.complete(question, prefix, number)
        except QuestionRefused as error:
            self.tally.refused_continuations += 1
            self.tally.why = str(error)
            return NoText.WITHHELD


def cut_answer(text: str, settings: RolloutSettings) -> tuple[list[str], list[str]]:
    """Cut an answer into its steps; those behind `max_steps` belong to the last one.

    Returns:
        The S steps, and the answer's beginnings up to the end of steps 1 to S - 1, as the policy wrote them.
    """
    text = text.strip()
    steps = split_response(text, settings.step_separator)
    starts, end = [0], len(steps[0])
    for step in steps[1:]:
        starts.append(text.index(step, end))
        end = starts[-1] + len(step)
    if len(steps) > settings.max_steps:
        starts = starts[: settings.max_steps]
        steps = [*steps[: settings.max_steps - 1], text[starts[-1] :]]
    return steps, [text[:start].rstrip() for start in starts[1:]]


def labelled_answers(
    question: Question, settings: RolloutSettings, store: Store, checker: Checker
) -> list[LabelledAnswer]:
    """Return the answers to a question that the store has, with what it knows of their steps.

    The last step of an answer is labelled by the answer itself.
    """
    found = []
    for place in range(settings.answers):
        text = (store.get(question.key, place, WHOLE) or {"text": None})["text"]
        if text is None:
            continue
        steps, correct = cut_answer(text, settings)[0], checker.known(text, question)
        counts = [store.get(question.key, place, step) for step in range(len(steps) - 1)]
        counts.append(None if correct is None else [int(correct), 1])
        score = tuple(None if entry is None else entry[0] for entry in counts)
        times = tuple(None if entry is None else entry[1] for entry in counts)
        found.append(LabelledAnswer(tuple(steps), score, times, correct, final_answer(text)))
    return found
