"""Whether answers are correct: by comparing what they state, and by a judge model where that does not decide.

checker = Checker(store, judge)
await checker.check("... Final answer: a dozen", question)  # asks the judge
checker.known("... Final answer: a dozen", question)        # what is known now
"""

import asyncio
from weakref import WeakValueDictionary

from reweighting.data.answer_values import answers_match
from reweighting.data.answers import final_answer
from reweighting.labeling.judge import Judge
from reweighting.labeling.policy import NoText
from reweighting.labeling.questions import Question
from reweighting.labeling.store import Store

MOST_CHARACTERS = 500  # of an answer that the judge reads: its beginning where the answer is stated, else its end


class Checker:
    """Decides whether answers are correct; None where that cannot be decided.

    Args:
        store: holds the judge's verdicts, so that it is never asked twice about one answer to a question.
        judge: decides where comparing the answers does not; None: nothing does.
    """

    def __init__(self, store: Store, judge: Judge | None = None):
        self.store, self.judge = store, judge
        self._asking: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    def known(self, answer: str, question: Question) -> bool | None:
        """Return whether an answer ends in the correct final answer, without asking the judge anew."""
        verdict = compare(answer, question)
        if verdict is None and self.judge is not None:
            return self.store.verdict(question.key, to_judge(answer))[0]
        return verdict

    async def check(self, answer: str, question: Question) -> bool | NoText | None:
        """Return whether an answer ends in the correct final answer.

        Returns:
            True or False; None where that cannot be decided; `NoText.FAILED` where the judge may decide later.

        Raises:
            JudgeFailure: the judge cannot be used any more.
        """
        verdict = compare(answer, question)
        if verdict is not None or self.judge is None:
            return verdict
        given = to_judge(answer)
        async with self._asking.setdefault((question.key, given), asyncio.Lock()):  # one call for equal answers
            verdict, is_there = self.store.verdict(question.key, given)
            if is_there:
                return verdict
            found = await self.judge.compare(question, given)
            if not isinstance(found, NoText):
                self.store.put_verdict(question.key, given, found)
            return found


def compare(answer: str, question: Question) -> bool | None:
    """Return whether an answer states the correct final answer, None if comparing the two cannot decide."""
    return answers_match(final_answer(answer), question.ground_truth)


def to_judge(answer: str) -> str:
    """Return what a judge reads of an answer: the final answer that it states, else its end."""
    stated = final_answer(answer)
    return answer.strip()[-MOST_CHARACTERS:] if stated is None else stated[:MOST_CHARACTERS]
