r"""Cutting a text into the steps of its answer: at `Step N` markers, or at a separator.

    split_response("Step 1: a\nStep 2: b")             # ["Step 1: a", "Step 2: b"]
    split_response("First a. Step 1: b. **Step 2:** c")  # two steps: markers inside a line count if they are numbered
    split_response("a\n\nb", separator="\n\n")           # ["a", "b"]

A marker is `Step 3`, `Step Three`, `步骤3` or `第三步`, under any decoration: `### Step 3:`,
`**Step 3**`, `> - step 3.`
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

MAX_STEPS = 10_000  # of a response: one with more is no reasoning, and would be tokenized before it is refused

WORDS = ("one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
         "eighteen nineteen twenty").split()  # fmt: skip
CHINESE = "一二三四五六七八九十"
# A number in words needs a delimiter: "Step one foot forward" is prose.
STEP_NUMBER = (
    r"(?:step[ \t]*(?:[#-][ \t]*)?(?P<digits>\d+)(?![0-9a-z])"
    rf"|step[ \t]+(?P<word>{'|'.join(WORDS)})(?=[ \t*_`)\]]*(?:[:：.–—-]|$))"
    rf"|(?:步[骤驟]|第(?=[ \t]*[\d{CHINESE}]{{1,9}}[ \t]*步))[ \t]*"
    rf"(?P<chinese>\d+|[{CHINESE}]{{1,3}})(?![\d{CHINESE}]))"
)
AT_LINE_START = re.compile(rf"^[ \t#*>_~`|(\[•–—+-]*{STEP_NUMBER}", re.I | re.M)
# Inside a line only what a colon follows: "as in step 2 we see" marks no step.
INSIDE_A_LINE = re.compile(rf"(?<=[\s.。;；!?！？,，)])[#*>_~`|(\[]*{STEP_NUMBER}(?=步?[ \t*_`)\]]*[:：])", re.I | re.M)


class Marker(NamedTuple):
    """A `Step N` in a text.

    Attributes:
        start: where the step begins, decoration included.
        number: N; -1 for a number that counts no steps.
    """

    start: int
    number: int


def split_steps(text: str, separator: str | None = None) -> tuple[str, list[str]]:
    """Cut a text at its step markers, or at the separator if it stands there.

    "Final answer: ..." stays in the last step.

    Args:
        text: a response, or a question and its answer.
        separator: a text such as a blank line or a special token, which ends a step; None: only markers count.

    Returns:
        The text before the first marker, and the steps with their markers, all stripped. Without a marker and
        separator the whole text is the first, and there are no steps.
    """
    if separator and separator in text:
        return "", [piece for piece in map(str.strip, text.split(separator)) if piece]
    return _cut(text, step_markers(text))


def split_response(text: str, separator: str | None = None) -> list[str]:
    """Cut a response into its steps, at least one.

    Text before the first marker joins the first step, and a response without a marker is one step.
    """
    opening, steps = split_steps(text, separator)
    if not steps:
        return [opening]
    return [f"{opening}\n{steps[0]}" if opening else steps[0], *steps[1:]]


def split_answer(text: str, separator: str | None = None) -> tuple[str, list[str]]:
    """Cut a text that holds a question and then its answer: the answer is the last run of steps that starts at 1.

    Steps before it belong to the question: many prompts list the steps that an answer shall have. Where no step is
    number 1, the answer begins at the first marker. With a separator the steps are what it separates; the first of
    them begins at a marker, or behind the first separator where that is a blank line.

    Returns:
        The question and the steps, stripped; no steps if the end of the question cannot be found.
    """
    if separator and separator in text:
        first, *rest = text.split(separator)
        question, opening = split_answer(first)
        if not opening and not separator.isspace():
            return text.strip(), []
        return question, [piece for piece in ("\n".join(opening), *map(str.strip, rest)) if piece]
    markers = step_markers(text)
    first_of_run = max((place for place, marker in enumerate(markers) if marker.number == 1), default=0)
    return _cut(text, markers[first_of_run:])


def split_prompt(prompt: str, responses: Sequence[str]) -> tuple[str, list[str]]:
    """Separate a question from the first steps of its answer, where a prompt holds those too.

    It does so if the prompt ends in steps 1 to k and each response begins with step k + 1. In any other case the
    prompt is the question, whatever stands in it: many list the steps that an answer shall have.

    Returns:
        The question and the first steps, stripped; mostly no steps.
    """
    run = _run_at_the_end(prompt)
    if run and all(_continues(response, len(run) + 1) for response in responses):
        return _cut(prompt, run)
    return prompt.strip(), []


@lru_cache(maxsize=64)  # rows of one question mostly stand together
def _run_at_the_end(prompt: str) -> list[Marker]:
    """The markers 1 to k that a text ends in; none if its last markers are numbered otherwise."""
    markers = step_markers(prompt)
    starts = [place for place, marker in enumerate(markers) if marker.number == 1]
    run = markers[starts[-1] :] if starts else []
    return run if [marker.number for marker in run] == list(range(1, len(run) + 1)) else []


def step_markers(text: str) -> list[Marker]:
    """Find the markers that begin the steps of a text.

    All count if they are numbered 1, 2, 3, ... Else those count that begin a line, whatever their numbers; those
    inside a line only where there are none at the lines' starts, or those make no sense.
    """
    possible = text.lower().count("step") + text.count("步")  # a quick look: most texts have none inside a line
    if not possible:
        return []
    at_line_start = {found.end(): Marker(found.start(), _number(found)) for found in AT_LINE_START.finditer(text)}
    first_choice = list(at_line_start.values())
    if len(first_choice) == possible:
        return first_choice
    inside = {found.end(): Marker(found.start(), _number(found)) for found in INSIDE_A_LINE.finditer(text)}
    every = sorted((inside | at_line_start).values())
    if [marker.number for marker in every] == list(range(1, len(every) + 1)):
        return every
    return every if not _are_runs(first_choice) and _are_runs(every) else first_choice


def first_step_number(step: str) -> int | None:
    """Return the number of the marker that a step's text has first, None if it has none."""
    markers = step_markers(step)
    return markers[0].number if markers else None


def _are_runs(markers: Sequence[Marker]) -> bool:
    """Whether the numbering is 1, 2, 3, ..., once or several times."""
    numbers = [marker.number for marker in markers]
    return bool(numbers) and all(
        number in (1, before + 1) for number, before in zip(numbers, [0, *numbers], strict=False)
    )


def _number(found: re.Match) -> int:
    """The number that `STEP_NUMBER` found."""
    if found["word"]:
        return WORDS.index(found["word"].lower()) + 1
    digits = found["digits"] or found["chinese"]
    if not digits.isdecimal():
        return _chinese_number(digits)
    return int(digits) if len(digits) < 10 else -1


def _cut(text: str, markers: Sequence[Marker]) -> tuple[str, list[str]]:
    """What stands before the first of these markers, and the steps that begin at them."""
    starts = [marker.start for marker in markers]
    bounds = [*starts, len(text)]
    steps = [text[start:end].strip() for start, end in zip(starts, bounds[1:], strict=True)]
    return text[: bounds[0]].strip(), steps


def _continues(response: str, number: int) -> bool:
    """Whether a response begins with the step of this number."""
    markers = step_markers(response)
    return bool(markers) and markers[0].number == number and not response[: markers[0].start].strip()


def _chinese_number(text: str) -> int:
    """1 to 99: 三, 十, 十二, 二十, 二十一; -1 for another order of these characters."""
    tens, ten, ones = text.partition("十")
    if not ten:
        return CHINESE.index(text) + 1 if len(text) == 1 else -1
    if len(tens) > 1 or len(ones) > 1 or "十" in ones:
        return -1
    return 10 * (CHINESE.index(tens) + 1 if tens else 1) + (CHINESE.index(ones) + 1 if ones else 0)
