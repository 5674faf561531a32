"""Why the demo's domains differ in worth: what went wrong when their questions were collected.

Nothing is done to a label: the policy answers the questions as they are, and its rollouts are compared with the
`ground_truth` that stands there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from PIL import Image, ImageFilter

from .pictures import Kind, draw_picture
from .solutions import Question, given_away, random_question, result

BLUR = 9.0  # pixels: no number can be read any more


@dataclass(frozen=True)
class Cause:
    """What went wrong in a domain.

    Attributes:
        name: of the cause, one of `SPOIL`.
        share: of the questions that it strikes, from 0 to 1.
        temperature: of the policy that answers and labels them; a higher one makes more mistakes.
    """

    name: str
    share: float = 1.0
    temperature: float = 1.0


@dataclass(frozen=True)
class AskedQuestion:
    """A question as the policy is asked it."""

    text: str
    picture: Image.Image
    ground_truth: int


def _nothing(question: Question, asked: AskedQuestion, rng: Random) -> AskedQuestion:
    return asked


def _wrong_ground_truth(question: Question, asked: AskedQuestion, rng: Random) -> AskedQuestion:
    """Whoever wrote the answer down read another key's number."""
    values = list(question.entries.values())
    pairs = [(a, b) for a in values for b in values]
    wrong = [value for value in (result(question.operation, *pair) for pair in pairs) if value != question.answer]
    return replace(asked, ground_truth=rng.choice(wrong)) if wrong else asked


def _foreign_picture(question: Question, asked: AskedQuestion, rng: Random) -> AskedQuestion:
    """The picture is another question's."""
    other = random_question(question.kind, rng)
    return replace(asked, picture=draw_picture(question.kind, other.entries, rng))


def _degraded_picture(question: Question, asked: AskedQuestion, rng: Random) -> AskedQuestion:
    """The picture is blurred until nothing can be read."""
    return replace(asked, picture=asked.picture.filter(ImageFilter.GaussianBlur(BLUR)))


def _given_away(question: Question, asked: AskedQuestion, rng: Random) -> AskedQuestion:
    """The question tells its answer: the policy copies it, whatever mistake it made on the way."""
    return replace(asked, text=given_away(asked.text, question.answer))


def _trivial(question: Question, asked: AskedQuestion, rng: Random) -> AskedQuestion:
    """All numbers of the picture are the same, and the larger one is asked for: misreading the key does no harm."""
    value = rng.randint(question.kind.low, question.kind.high)
    easy = replace(question, entries=dict.fromkeys(question.entries, value), operation="larger")
    return AskedQuestion(easy.text, draw_picture(easy.kind, easy.entries, rng), easy.answer)


SPOIL: dict[str, Callable[[Question, AskedQuestion, Random], AskedQuestion]] = {
    "none": _nothing,
    "wrong ground truths": _wrong_ground_truth,
    "foreign pictures": _foreign_picture,
    "degraded pictures": _degraded_picture,
    "answers given away": _given_away,
    "trivial questions": _trivial,
    "weaker policy": _nothing,  # its temperature is the cause
}
CAUSES = {
    "bar_chart": Cause("none", 0.0),
    "clocks": Cause("degraded pictures", 0.9),
    "dice": Cause("none", 0.0),
    "geometry": Cause("wrong ground truths", 0.25),
    "map": Cause("answers given away", 0.9),
    "pie_chart": Cause("foreign pictures", 0.8),
    "price_tags": Cause("answers given away", 0.3),
    "scoreboard": Cause("wrong ground truths", 1.0),
    "table": Cause("trivial questions", 0.7),
    "tally": Cause("weaker policy", 1.0, temperature=1.4),
}
CLEAN = Cause("none", 0.0)


def ask(kind: Kind, cause: Cause, rng: Random) -> AskedQuestion:
    """Draw a question about a picture of this kind, struck by the cause or not.

    Args:
        kind: of the picture.
        cause: what may have gone wrong.
        rng: draws the question, its picture and whether it is struck.
    """
    question = random_question(kind, rng)
    asked = AskedQuestion(question.text, draw_picture(kind, question.entries, rng), question.answer)
    return SPOIL[cause.name](question, asked, rng) if rng.random() < cause.share else asked
