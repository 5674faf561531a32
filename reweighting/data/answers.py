r"""Final answers: what a response states, and whether it is correct.

    final_answer("Step 1: ...\nFinal answer: \\boxed{60}")  # "60"
    candidate_correctness(row)                               # [True, False, None]

An answer that cannot be read or compared is unknown, never incorrect.
"""

import re
from collections import deque

from reweighting.data.answer_values import MAX_LENGTH, answers_match, in_braces, is_blank, is_number, normal_answer
from reweighting.data.schema import CandidateRow

# Where an answer begins: `the answer is`, `Final answer:`, `**Answer:**`, `\boxed{`; on the last line `####` and `A:`.
STATEMENT = re.compile(
    r"\\boxed\s{0,9}(?P<box>\{)"
    r"|\banswer\b[\s*_`]{0,9}(?:(?P<colon>(?:is\b[\s*_`]{0,9})?[:：])|is\b)[\s*_`:]{0,99}"
    r"|^[ \t]*(?P<last>####(?![ \t]*step\b)|A[:：])[ \t]*(?=[^\n]*\s*\Z)"
    r"|^[ \t#*_>]{0,99}(?P<heading>(?:final[ \t]+)?answer)[ \t*_]{0,9}\n[\s*_`]{0,99}",
    re.IGNORECASE | re.MULTILINE,
)
STATEMENTS_TRIED = 20  # from the end, until one states anything
SENTENCE_END = re.compile(r"(?<=\S)[.!?](?=\s|$)|,?\s(?:because|since|which|so)\b", re.IGNORECASE)


def final_answer(response: str) -> str | None:
    r"""Return the answer that a response states last, or None if it states none.

    Read are `Final answer: 7`, `the final answer is: $7$`, `Answer: 7`, `the answer is 7.`, `**Final answer:**` with
    the answer on the next line, `\boxed{7}` anywhere, and `#### 7` or `A: 7` on the last line.
    """
    for found in reversed(deque(STATEMENT.finditer(response), maxlen=STATEMENTS_TRIED)):
        if found["box"]:
            answer = in_braces(response, found.end())
        else:
            end = response.find("\n", found.end())
            line = response[found.end() : end if end >= 0 else None]
            answer = line if found["last"] else _told(line, whole_line=bool(found["colon"] or found["heading"]))
        if answer is not None and not is_blank(answer):
            return answer.strip()
    return None


def stated_answers(row: CandidateRow) -> list[str | None]:
    """Return each candidate's answer in its normal form, None where it states none.

    The row's `answers` count if it has them, else what the responses state.
    """
    return [normal_answer(answer) for answer in _given_answers(row)]


def candidate_correctness(row: CandidateRow) -> list[bool | None] | None:
    """Return whether each candidate is correct: by the row's `true_false`, else by its `ground_truth`.

    Returns:
        One entry for each candidate, None where that cannot be decided; None if the row has neither field.
    """
    if row.true_false is not None:
        return list(row.true_false)
    if row.ground_truth is None:
        return None
    truth = str(row.ground_truth)
    truth = final_answer(truth) or truth  # some data sets keep the whole solution there
    return [answers_match(answer, truth) for answer in _given_answers(row)]


def _given_answers(row: CandidateRow) -> list[str | None]:
    """The row's `answers`, or what its candidates state, as they are written."""
    return list(row.answers) if row.answers is not None else [final_answer(text) for text in row.candidates]


def _told(line: str, whole_line: bool) -> str:
    """The answer at the beginning of a line of prose: its first sentence where that alone is one."""
    if len(line) > MAX_LENGTH:
        return line
    end = SENTENCE_END.search(line)
    sentence = line[: end.start()] if end else line
    if whole_line and not (is_number(sentence) and not is_number(line)):
        return line
    return sentence
