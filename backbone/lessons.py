"""What the small backbone is taught: reading pictures, arithmetic, and telling true statements from false ones.

A lesson is a picture followed by short items. The first lessons only read ("the red bar: 4"); the second judge single
facts; in the last, facts, evidence, goals, rules, sums and conclusions are judged. Judging is to write the word " true"
or " false" after a statement; half of the statements are false. Lessons never show a whole five-step answer nor any
accuracy: judging a chain of steps is what fine-tuning as a reward model has to teach.
"""

from collections.abc import Iterator
from random import Random

from demo_world.pictures import Kind
from demo_world.solutions import (
    OPERATIONS,
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

VERDICTS = (" false", " true")
Piece = tuple[str, bool]  # a text and whether predicting it is what the lesson is about


def _wrong_reading(kind: Kind, entries: dict[str, int], key: str, rng: Random) -> int:
    """A number that the picture does not show for this key; often another key's."""
    others = [value for value in entries.values() if value != entries[key]]
    if others and rng.random() < 0.5:
        return rng.choice(others)
    return other_value(entries[key], kind.low, kind.high, rng)


def reading_lesson(question: Question, rng: Random) -> Iterator[Piece]:
    """The first lessons: either all that the picture shows, in reading order, or one entry after another by name."""
    kind, entries = question.kind, question.entries
    if rng.random() < 0.5:
        for key, value in entries.items():
            yield f" {key}", True
            yield f" {value}", True
    else:
        for key in rng.sample(list(entries), 4):
            yield f"{kind.phrase(key)}:", False
            yield f" {entries[key]}", True
            yield "\n", False


def _judged(step: int, statement: str, true: bool) -> Iterator[Piece]:
    """A statement written as a step is, and its verdict: right after its last word, where a reward model scores."""
    yield f"Step {step}: {STEP_TITLES[step - 1]}. {statement}", False
    yield VERDICTS[true], True
    yield "\n", False


def _fact(kind: Kind, entries: dict[str, int], key: str, rng: Random) -> Iterator[Piece]:
    """A single fact and its verdict: " true", or the right number, since correcting is learned sooner than doubting."""
    true = rng.random() < 0.5
    value = entries[key] if true else _wrong_reading(kind, entries, key, rng)
    yield f"{kind.phrase(key).capitalize()} shows {value}.", False
    yield VERDICTS[1] if true else f" {entries[key]}", True
    yield "\n", False


def fact_lesson(question: Question, rng: Random) -> Iterator[Piece]:
    """The second lessons: single facts about each entry of the picture."""
    for key in rng.sample(list(question.entries), 4):
        yield from _fact(question.kind, question.entries, key, rng)


def step_lesson(question: Question, rng: Random) -> Iterator[Piece]:
    """The last lessons: sentences as they stand in the steps of an answer, each judged by itself, in any order."""
    kind, entries = question.kind, question.entries
    items = []

    true = rng.random() < 0.5  # does the goal fit the question?
    goal, keys = question.operation, list(question.keys)
    if not true:
        if rng.random() < 0.5:
            goal = rng.choice([o for o in OPERATIONS if o != goal])
        else:
            keys[rng.randrange(2)] = rng.choice([key for key in entries if key not in keys])
    items.append(_judged(1, goal_text(kind, goal, keys, rng), true))

    for _ in range(3):  # two readings at once, both needed
        keys, true = rng.sample(list(entries), 2), rng.random() < 0.5
        values = [entries[key] for key in keys]
        if not true:
            wrong = rng.randrange(2)
            values[wrong] = _wrong_reading(kind, entries, keys[wrong], rng)
        items.append(_judged(2, evidence_text(kind, keys, values, rng), true))

    operation, true = rng.choice(OPERATIONS), rng.random() < 0.5
    rule = operation if true else rng.choice([o for o in OPERATIONS if o != operation])
    items.append(_judged(3, rule_text(operation, rule, rng), true))

    for step in (4, 5):  # arithmetic; a conclusion, stated with the sum before it, that may forget what was found
        operation, true = rng.choice(OPERATIONS), rng.random() < 0.5
        numbers = [rng.randint(1, 12 if rng.random() < 0.3 else 9) for _ in range(2)]
        value = result(operation, *numbers)
        stated = value if true else other_value(value, 0, 24, rng)
        text = reason_text(operation, numbers, stated if step == 4 else value, rng)
        if step == 5:
            text = f"{text} {conclusion_text(operation, stated, rng)}\nFinal answer: {stated}"
        items.append(_judged(step, text, true))
    rng.shuffle(items)
    for item in items:
        yield from item
