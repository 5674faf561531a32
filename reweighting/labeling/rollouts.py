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

from reweighting.data.answer_values import answers_match
from reweighting.data.answers import final_answer
from reweighting.data.steps import split_response
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
        failed_answers, failed_continuations: calls that failed after all tries.
        empty_answers: answers without any text.
        empty_continuations: those of steps that have no others.
        refused_continuations: how many the policy refuses, and counts with those that cannot be judged.
        why: the reason for the last of these.
    """

    failed_answers: int = 0
    failed_continuations: int = 0
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


async def label_question(
    policy: Policy, question: Question, settings: RolloutSettings, store: Store, tally: Tally
) -> None:
    """Ask for all that the store lacks of a question, and write it as it comes. What fails is counted, not written.

    Raises:
        PolicyFailure: the policy cannot be used any more.
        QuestionRefused: the policy refuses the question.
    """
    await all_of(_label_answer(policy, question, place, settings, store, tally) for place in range(settings.answers))


async def _label_answer(
    policy: Policy, question: Question, place: int, settings: RolloutSettings, store: Store, tally: Tally
) -> None:
    """One answer to a question, and its steps."""
    entry = store.get(question.key, place, WHOLE)
    if entry is None:
        text = await policy.complete(question, number=place)
        if text is NoText.FAILED:
            tally.failed_answers += 1
            return
        if isinstance(text, str) and not any(cut_answer(text, settings)[0]):
            tally.empty_answers += 1
            return
        entry = {"text": text if isinstance(text, str) else None}
        store.put(question.key, place, WHOLE, entry)
    text = entry["text"]
    if text is not None and settings.rollouts:
        label = _label_all if settings.search == "full" else _label_by_halves
        await label(policy, question, place, text, settings, store, tally)


async def _label_all(
    policy: Policy, question: Question, place: int, text: str, settings: RolloutSettings, store: Store, tally: Tally
) -> None:
    _, prefixes = cut_answer(text, settings)
    await all_of(
        _label_step(policy, question, place, step, prefix, settings, store, tally)
        for step, prefix in enumerate(prefixes)
    )


async def _label_by_halves(
    policy: Policy, question: Question, place: int, text: str, settings: RolloutSettings, store: Store, tally: Tally
) -> None:
    """Find the first step from which no continuation is correct. The end of the answer counts by its own answer."""
    _, prefixes = cut_answer(text, settings)
    if judge(text, question) is not False:
        return
    low, high = -1, len(prefixes)  # from low on, something is still correct; from high on, nothing is
    while high - low > 1:
        middle = (low + high) // 2
        counts = await _label_step(policy, question, place, middle, prefixes[middle], settings, store, tally)
        if counts is None:  # where the search goes on is known when its continuations have come
            return
        score, times = counts
        if times and not score:
            high = middle
        else:
            low = middle


async def _label_step(
    policy: Policy, question: Question, place: int, step: int, prefix: str, settings: RolloutSettings, store: Store,
    tally: Tally,
) -> list[int] | None:  # fmt: skip
    """Continue an answer behind a step, and count: [correct, judged]; None if one failed, or all are empty."""
    found = store.get(question.key, place, step)
    if found is not None:
        return found
    score = times = 0
    first = min(settings.enough or settings.rollouts, settings.rollouts)
    for numbers in (range(first), range(first, settings.rollouts)):
        # Answers that begin alike have continuations of their own.
        calls = (place * settings.rollouts + number for number in numbers)
        rests = await all_of(_continue(policy, question, prefix, number, tally) for number in calls)
        if failed := rests.count(NoText.FAILED):
            tally.failed_continuations += failed
            return None
        if rests and all(isinstance(rest, str) and not rest.strip() for rest in rests):
            tally.empty_continuations += len(rests)
            return None
        verdicts = [judge(f"{prefix}{rest}", question) for rest in rests if isinstance(rest, str)]
        score += verdicts.count(True)
        times += len(verdicts) - verdicts.count(None)
        if times == first and score in (0, times):  # all agree
            break
    store.put(question.key, place, step, [score, times])
    return [score, times]


async def _continue(policy: Policy, question: Question, prefix: str, number: int, tally: Tally) -> str | NoText:
    """One continuation. The policy refuses one whose prefix is too long, and would do so again."""
    try:
        return await policy.complete(question, prefix, number)
    except QuestionRefused as error:
        tally.refused_continuations += 1
        tally.why = str(error)
        return NoText.WITHHELD


def judge(answer: str, question: Question) -> bool | None:
    """Return whether an answer ends in the correct final answer, None if that cannot be decided."""
    return answers_match(final_answer(answer), question.ground_truth)


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


def labelled_answers(question: Question, settings: RolloutSettings, store: Store) -> list[LabelledAnswer]:
    """Return the answers to a question that the store has, with what it knows of their steps.

    The last step of an answer is labelled by the answer itself.
    """
    found = []
    for place in range(settings.answers):
        text = (store.get(question.key, place, WHOLE) or {"text": None})["text"]
        if text is None:
            continue
        steps, correct = cut_answer(text, settings)[0], judge(text, question)
        counts = [store.get(question.key, place, step) for step in range(len(steps) - 1)]
        counts.append(None if correct is None else [int(correct), 1])
        score = tuple(None if entry is None else entry[0] for entry in counts)
        times = tuple(None if entry is None else entry[1] for entry in counts)
        found.append(LabelledAnswer(tuple(steps), score, times, correct, final_answer(text)))
    return found
