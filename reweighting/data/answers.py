"""Final answers: what a response states, and whether it is the right one."""

import re
from decimal import Context, Decimal

from reweighting.data.schema import CandidateRow

# 13, -1.50, .5, 1,300 (but not 1,3: a pair, or a decimal comma), 2e6
NUMBER = re.compile(r"[+-]?((\d+|\d{1,3}(,\d{3})+)(\.\d*)?|\.\d+)(e[+-]?\d{1,4})?")


FINAL_ANSWER = re.compile(r"final answer\W*?:[ \t*]*(.*)", re.I)


def final_answer(response: str) -> str | None:
    """What stands behind the last `Final answer:`, to the end of its line; None if there is none."""
    found = FINAL_ANSWER.findall(response)
    return found[-1] if found else None


def normal_answer(answer: str | None) -> str | None:
    """One form for answers that mean the same: `13`, ` 13.0 ` and `**13**`, `1,300` and `1300`, `Red.` and `red`."""
    if answer is None:
        return None
    text = " ".join(answer.lstrip(" \t\n*$`").rstrip(" \t\n*$`.").casefold().split())
    if not NUMBER.fullmatch(text):
        return text or None
    number = Decimal(text.replace(",", ""))
    digits = Context(prec=len(text) + 1)  # none is rounded away
    return format(number.normalize(digits), "E") if number else "0"


def stated_answers(row: CandidateRow) -> list[str | None]:
    """Each candidate's answer in its normal form: its `answers`, else what the responses state; None where none is."""
    given = row.answers if row.answers is not None else map(final_answer, row.candidates)
    return [normal_answer(answer) for answer in given]


def candidate_correctness(row: CandidateRow) -> list[bool] | None:
    """Whether each candidate is right: its `true_false`, else by `ground_truth`; None if the row has neither."""
    if row.true_false is not None:
        return row.true_false
    if row.ground_truth is None:
        return None
    truth = normal_answer(str(row.ground_truth))
    return [answer is not None and answer == truth for answer in stated_answers(row)]
