"""Answers to a question, and of each of their steps how many continuations end in the correct answer.

A step's Monte Carlo label is the share of continuations from there whose final answer is correct (Math-Shepherd,
arXiv 2312.08935). A continuation that failed, or whose answer cannot be judged, counts as neither.
"""

import asyncio
from dataclasses import dataclass
from typing import Literal

from reweighting.data.answer_values import answers_match
from reweighting.data.answers import final_answer
from reweighting.data.steps import split_response
from reweighting.labeling.policy import Policy
from reweighting.labeling.questions import Question
from reweighting.labeling.store import WHOLE, Store

Search = Literal["full", "binary"]


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


async def label_question(policy: Policy, question: Question, settings: RolloutSettings, store: Store) -> None:
    """Ask for all that the store lacks of a question, and write it as it comes.

    Raises:
        PolicyFailure: the policy cannot be used any more.
    """
    texts = store.get(question.key, WHOLE, WHOLE)
    if texts is None:
        texts = await asyncio.gather(*(policy.complete(question) for _ in range(settings.answers)))
        store.put(question.key, WHOLE, WHOLE, texts)
    if not settings.rollouts:
        return
    label = _label_all if settings.search == "full" else _label_by_halves
    answers = [(place, text) for place, text in enumerate(texts) if text is not None and text.strip()]
    await asyncio.gather(*(label(policy, question, place, text, settings, store) for place, text in answers))


async def _label_all(
    policy: Policy, question: Question, place: int, text: str, settings: RolloutSettings, store: Store
) -> None:
    _, prefixes = cut_answer(text, settings)
    await asyncio.gather(
        *(_label_step(policy, question, place, step, prefix, settings, store) for step, prefix in enumerate(prefixes))
    )


async def _label_by_halves(
    policy: Policy, question: Question, place: int, text: str, settings: RolloutSettings, store: Store
) -> None:
    """Find the first step from which no continuation is correct. The end of the answer counts by its own answer."""
    _, prefixes = cut_answer(text, settings)
    if judge(text, question) is not False:
        return
    low, high = -1, len(prefixes)  # from low on, something is still correct; from high on, nothing is
    while high - low > 1:
        middle = (low + high) // 2
        score, times = await _label_step(policy, question, place, middle, prefixes[middle], settings, store)
        if times and not score:
            high = middle
        else:
            low = middle


async def _label_step(
    policy: Policy, question: Question, place: int, step: int, prefix: str, settings: RolloutSettings, store: Store
) -> list[int]:
    """Continue an answer behind a step, and count: [correct, judged]."""
    found = store.get(question.key, place, step)
    if found is not None:
        return found
    score = times = 0
    first = min(settings.enough or settings.rollouts, settings.rollouts)
    for count in (first, settings.rollouts - first):
        rests = await asyncio.gather(*(policy.complete(question, prefix) for _ in range(count)))
        verdicts = [judge(f"{prefix}{rest}", question) for rest in rests if rest is not None]
        score += verdicts.count(True)
        times += len(verdicts) - verdicts.count(None)
        if times == first and score in (0, times):  # all agree
            break
    store.put(question.key, place, step, [score, times])
    return [score, times]


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
    for place, text in enumerate(store.get(question.key, WHOLE, WHOLE) or ()):
        if text is None or not text.strip():
            continue
        steps, correct = cut_answer(text, settings)[0], judge(text, question)
        counts = [store.get(question.key, place, step) for step in range(len(steps) - 1)]
        counts.append(None if correct is None else [int(correct), 1])
        score = tuple(None if entry is None else entry[0] for entry in counts)
        times = tuple(None if entry is None else entry[1] for entry in counts)
        found.append(LabelledAnswer(tuple(steps), score, times, correct, final_answer(text)))
    return found
