"""What formats of turns share: roles by any name, judged steps, and questions that stand with their first step.

turns = turns_of(raw["conversations"])   # [("user", "Q Step 1: a"), ("assistant", "+"), ("user", "Step 2: b"), ...]
question, steps, labels = judged_steps(turns)
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from reweighting.data.placeholders import PLACEHOLDER
from reweighting.data.readers.base import LeftOut
from reweighting.data.steps import split_answer

Turn = tuple[str, Any]  # role and content
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
         "chatgpt": "assistant", "bot": "assistant", "system": "system"}  # fmt: skip
IMAGE_PARTS = ("image", "image_url")

QUESTION_HEADING = re.compile(r"^\s*(?:#+\s*)?Question:\s*", re.I)
STEPS_HEADING = re.compile(r"^\s*#*\s*(?:Solution Process|Process|Solution):[ \t]*\n?", re.I | re.M)


def turns_of(raw: Any) -> list[Turn]:
    """Return the turns of a conversation, [] if it is none.

    Args:
        raw: a list of `{"from", "value"}` or `{"role", "content"}` objects.
    """
    turns = []
    for turn in raw if isinstance(raw, list) else ():
        if not isinstance(turn, Mapping):
            return []
        role = ROLES.get(str(turn.get("from", turn.get("role"))).lower())
        if role is None or not {"value", "content"} & set(turn):
            return []
        turns.append((role, turn["value"] if "value" in turn else text_of(turn["content"])))
    return turns


def text_of(content: Any) -> Any:
    """Return the text of a message's content, which may be a list of parts, with a placeholder for each image."""
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        texts = (PLACEHOLDER if part.get("type") in IMAGE_PARTS else str(part.get("text", "")) for part in content)
        return "\n".join(texts).strip()
    return content


def are_judged(turns: Sequence[Turn]) -> bool:
    """Return whether the assistant's turns are labels of the user's, and nothing else."""
    replies = [content for role, content in turns if role == "assistant"]
    return bool(replies) and all(isinstance(reply, str) and reply.strip() in ("+", "-") for reply in replies)


def judged_steps(turns: Sequence[Turn]) -> tuple[str, list[str], list[Any]]:
    """Read a conversation in which the user gives a step at a time and the assistant judges it.

    The question is a turn of its own, or stands before the first step.

    Returns:
        The question, the steps and their labels, as they are written.

    Raises:
        LeftOut: question and first step cannot be told apart, or there is no step.
    """
    said: list[str] = []  # by the user since the last label
    question, steps, labels = "", [], []
    for role, content in turns:
        if role == "user":
            said.append(str(content))
        elif role == "assistant" and said:
            if not steps:
                question, said = opening(said)
            steps.append("\n".join(said).strip())
            labels.append(content)
            said = []
    if not steps:
        raise LeftOut("it has no step")
    return question, steps, labels


def opening(said: Sequence[str]) -> tuple[str, list[str]]:
    """Tell the question from the first step, in what the user says before the first label.

    Raises:
        LeftOut: they cannot be told apart.
    """
    if len(said) > 1:
        return QUESTION_HEADING.sub("", said[0]).strip(), list(said[1:])
    question, step = question_and_step(said[0])
    return question, [step]


def question_and_step(text: str) -> tuple[str, str]:
    """Tell a question from the first step behind it: by a heading, by `Step 1`, or else by a blank line.

    Raises:
        LeftOut: they cannot be told apart.
    """
    heading = STEPS_HEADING.search(text)
    if heading:
        return QUESTION_HEADING.sub("", text[: heading.start()]).strip(), text[heading.end() :].strip()
    question, steps = split_answer(text)
    if len(steps) == 1 and question:
        return question, steps[0]
    question, blank_line, step = text.strip().rpartition("\n\n")
    if not blank_line:
        raise LeftOut("its question and its first step cannot be told apart")
    return question.strip(), step.strip()
