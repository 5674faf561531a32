"""What the small backbone is taught: reading pictures, arithmetic, and telling true statements from false ones.

A lesson is a picture followed by short items. The first lessons only read ("the red bar: 4"). The next ones show true
and false sentences, and the word to write after each is " true" or what should have stood there: correcting is learned
sooner than doubting. In the last ones it is " true" or " false". Half of the sentences are false. Lessons never show a
whole five-step answer nor any accuracy: judging a chain of steps is what fine-tuning as a reward model has to teach.
"""

from collections.abc import Iterator
from random import Random

from demo_world.pictures import Kind
from demo_world.solutions import (
    OPERATIONS,
    RULES,
    STEP_TITLES,
    Question,
    conclusion_text,
    evidence_text,
    goal_text,
    other_value,
    reason_text,
    result,
    rule_text,
)

# The five behind reading are those of the steps 1 to 5; only the policy writes answers (`make_policy.py`).
SKILLS = ("reading", "goal", "evidence", "rule", "sum", "conclusion", "answer")
Piece = tuple[str, str]  # a text, and the skill that predicting it takes: one of SKILLS, or "" if it is only context


def _wrong_reading(kind: Kind, entries: dict[str, int], key: str, rng: Random) -> int:
    """A number that the picture does not show for this key; often another key's."""
    others = [value for value in entries.values() if value != entries[key]]
    if others and rng.random() < 0.5:
        return rng.choice(others)
    return other_value(entries[key], kind.low, kind.high, rng)


def reading_lesson(question: Question, rng: Random) -> Iterator[Piece]:
    """Either all that the picture shows, in reading order, or one entry after another by name."""
    kind, entries = question.kind, question.entries
    if rng.random() < 0.5:
        for key, value in entries.items():
            yield f" {key}", "reading"
            yield f" {value}", "reading"
    else:
        for key in rng.sample(list(entries), 4):
            yield f"{kind.phrase(key)}:", ""
            yield f" {entries[key]}", "reading"
            yield "\n", ""


def fact_lesson(question: Question, rng: Random) -> Iterator[Piece]:
    """Single facts about each entry of the picture, to be corrected."""
    kind, entries = question.kind, question.entries
    for key in rng.sample(list(entries), 4):
        true = rng.random() < 0.5
        value = entries[key] if true else _wrong_reading(kind, entries, key, rng)
        yield f"{kind.phrase(key).capitalize()} shows {value}.", ""
        yield " true" if true else f" {entries[key]}", "evidence"
        yield "\n", ""


def _goal(question: Question, rng: Random) -> tuple[str, str]:
    """A goal that fits the question or not, and the verdict."""
    operation, keys = question.operation, list(question.keys)
    verdict = " true"
    if rng.random() < 0.5:
        if rng.random() < 0.5:
            operation = rng.choice([o for o in OPERATIONS if o != operation])
            verdict = f" {question.operation}"
        else:
            wrong = rng.randrange(2)
            keys[wrong] = rng.choice([key for key in question.entries if key not in keys])
            verdict = f" {question.keys[wrong]}"
    return goal_text(question.kind, operation, keys, rng), verdict


def _evidence(question: Question, rng: Random) -> tuple[str, str]:
    """Two readings at once, of which one may be wrong, and the verdict."""
    kind, entries = question.kind, question.entries
    keys = rng.sample(list(entries), 2)
    values, verdict = [entries[key] for key in keys], " true"
    if rng.random() < 0.5:
        wrong = rng.randrange(2)
        values[wrong] = _wrong_reading(kind, entries, keys[wrong], rng)
        verdict = f" {entries[keys[wrong]]}"
    return evidence_text(kind, keys, values, rng), verdict


def _rule(question: Question, rng: Random) -> tuple[str, str]:
    """A rule for an operation, perhaps another one's, and the verdict."""
    operation = rule = rng.choice(OPERATIONS)
    verdict = " true"
    if rng.random() < 0.5:
        rule = rng.choice([o for o in OPERATIONS if o != operation])
        verdict = f" {RULES[operation][0].split()[0]}"
    return rule_text(operation, rule, rng), verdict


def _sum(question: Question, rng: Random, conclude: bool = False) -> tuple[str, str]:
    """Arithmetic that may be wrong, and the verdict; `conclude`: right, but a conclusion follows that may forget it."""
    operation = rng.choice(OPERATIONS)
    numbers = [rng.randint(1, 12 if rng.random() < 0.3 else 9) for _ in range(2)]
    value = stated = result(operation, *numbers)
    verdict = " true"
    if rng.random() < 0.5:
        stated = other_value(value, 0, 24, rng)
        verdict = f" {value}"
    text = reason_text(operation, numbers, value if conclude else stated, rng)
    if conclude:
        text += f" {conclusion_text(operation, stated, rng)}\nFinal answer: {stated}"
    return text, verdict


def _conclusion(question: Question, rng: Random) -> tuple[str, str]:
    """A conclusion after its sum, and the verdict."""
    return _sum(question, rng, conclude=True)


_STEPS = (_goal, _evidence, _rule, _sum, _conclusion)


def correcting_lesson(question: Question, rng: Random) -> Iterator[Piece]:
    """Sentences as they stand in the steps of an answer, each by itself, in any order, to be corrected.

    The verdict stands right after a sentence's last word, where a reward model scores.
    """
    for step in rng.sample((1, 2, 2, 2, 3, 4, 5), 7):
        statement, verdict = _STEPS[step - 1](question, rng)
        yield f"Step {step}: {STEP_TITLES[step - 1]}. {statement}", ""
        yield verdict, SKILLS[step]
        yield "\n", ""


def judging_lesson(question: Question, rng: Random) -> Iterator[Piece]:
    """The same sentences, judged: the verdict on a false one is " false"."""
    for text, skill in correcting_lesson(question, rng):
        yield (" false" if skill and text != " true" else text), skill
