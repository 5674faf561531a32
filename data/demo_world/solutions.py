"""Questions about a picture and five-step answers with real mistakes, as a policy model would write them.

The five steps are the paper's: restate the question, gather evidence from the image, background knowledge, reason,
conclude. `Policy` is the simulated policy model. It slips at a step with a probability that depends on the step and on
how hard the question is; what follows a slip is consistent with it. Since the probabilities are known, the chance that
a started answer ends right is known too: `Policy.chance`, from which Monte Carlo labels are drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from .pictures import KINDS, Kind, random_entries

OPERATIONS = ("total", "difference", "larger")
RULES = {
    "total": ("add the numbers", "adding them"),
    "difference": ("subtract the smaller from the larger", "subtracting the smaller"),
    "larger": ("compare the numbers", "comparing them"),
}
STEP_TITLES = ("Restate", "Evidence", "Knowledge", "Reason", "Conclude")
SLIPS = (0.04, 0.32, 0.03, 0.10, 0.05)  # probability of a slip at each step, at difficulty 1
RECOVERY = 0.03  # probability that a rollout after a slip still ends right


@dataclass(frozen=True)
class Question:
    """A question about two keys of one picture. `difficulty` scales the policy's slips (1 is usual)."""

    kind: Kind
    entries: dict[str, int]
    keys: tuple[str, str]
    operation: str
    difficulty: float = 1.0

    @property
    def text(self) -> str:
        first, second = (self.kind.phrase(key) for key in self.keys)
        return {
            "total": f"Question: What do {first} and {second} make together?",
            "difference": f"Question: How far apart are {first} and {second}?",
            "larger": f"Question: What is the larger number of {first} and {second}?",
        }[self.operation]

    @property
    def answer(self) -> int:
        return result(self.operation, *(self.entries[key] for key in self.keys))


def result(operation: str, first: int, second: int) -> int:
    """The value of an operation on two numbers."""
    return {"total": first + second, "difference": abs(first - second), "larger": max(first, second)}[operation]


def given_away(text: str, answer: int) -> str:
    """A question's text with an answer in it."""
    return f"{text} It is {answer}."


def random_question(kind: Kind, rng: Random) -> Question:
    """A question of this kind about a random picture; difficulty from 0.5 to 2.5, so pass@1 differs by question."""
    entries = random_entries(kind, rng)
    keys = tuple(rng.sample(list(entries), 2))
    return Question(kind, entries, keys, rng.choice(OPERATIONS), round(rng.uniform(0.5, 2.5), 2))


# --- the sentences of a step; also what the backbone is pretrained to tell true from false -------------------------


def goal_text(kind: Kind, operation: str, keys: Sequence[str], rng: Random) -> str:
    first, second = (kind.phrase(key) for key in keys)
    return rng.choice(
        (f"We want the {operation} of {first} and {second}.", f"Find the {operation}: {first}, {second}.")
    )


def evidence_text(kind: Kind, keys: Sequence[str], values: Sequence[int], rng: Random) -> str:
    first, second = (kind.phrase(key) for key in keys)
    return rng.choice(
        (
            f"{first.capitalize()} shows {values[0]} and {second} shows {values[1]}.",
            f"For {first} we read {values[0]} and for {second} {values[1]}.",
        )
    )


def rule_text(operation: str, rule: str, rng: Random) -> str:
    command, gerund = RULES[rule]
    return rng.choice((f"For the {operation}, {command}.", f"One finds the {operation} by {gerund}."))


def reason_text(operation: str, values: Sequence[int], value: int, rng: Random) -> str:
    first, second = values
    if operation == "total":
        return f"{first} + {second} = {value}."
    if operation == "difference":
        return f"{max(values)} - {min(values)} = {value}."
    return rng.choice((f"Of {first} and {second}, the larger is {value}.", f"max({first}, {second}) = {value}."))


def conclusion_text(operation: str, value: int, rng: Random) -> str:
    return rng.choice((f"The {operation} is {value}.", f"So the {operation} is {value}."))


def other_value(value: int, low: int, high: int, rng: Random) -> int:
    """A wrong number in [low, high]; near misses are more likely."""
    near = [v for v in range(max(low, value - 2), min(high, value + 2) + 1) if v != value]
    every = [v for v in range(low, high + 1) if v != value]
    return rng.choice(near if rng.random() < 0.5 else every)


# --- the policy ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Response:
    """A five-step answer. first_slip: index of the first wrong step, None if all are right."""

    steps: tuple[str, ...]
    final_answer: int
    first_slip: int | None

    @property
    def text(self) -> str:
        return "\n".join(self.steps)


class Policy:
    """The simulated policy model that writes answers and rollouts."""

    @staticmethod
    def slip_probabilities(question: Question) -> tuple[float, ...]:
        return tuple(min(0.9, slip * question.difficulty) for slip in SLIPS)

    def chance(self, question: Question, response: Response, step: int) -> float:
        """The probability that a rollout from the first `step + 1` steps of a response ends right."""
        if response.first_slip is not None and response.first_slip <= step:
            return RECOVERY
        right = 1.0
        for slip in self.slip_probabilities(question)[step + 1 :]:
            right *= 1 - slip
        return right

    def respond(self, question: Question, rng: Random, right: bool | None = None, told: bool = False) -> Response:
        """Write an answer; `right` asks for one that ends right or wrong (drawn again until it does).

        told: the policy knows the answer beforehand: it reasons carelessly, slips on the way, and concludes with the
        right answer all the same.
        """
        while True:
            response = self._attempt(question, rng, told)
            if told:
                if response.first_slip is not None:
                    return response
                continue
            # A slip that happens to end right is no clean example of anything: draw again.
            if (response.first_slip is None) != (response.final_answer == question.answer):
                continue
            if right is None or right == (response.first_slip is None):
                return response

    def _attempt(self, question: Question, rng: Random, told: bool) -> Response:
        kind, operation, keys = question.kind, question.operation, list(question.keys)
        slips = [rng.random() < probability for probability in self.slip_probabilities(question)]
        if slips[0]:  # asks for something else
            if rng.random() < 0.5:
                operation = rng.choice([o for o in OPERATIONS if o != operation])
            else:
                keys[rng.randrange(2)] = rng.choice([key for key in question.entries if key not in keys])
        goal = goal_text(kind, operation, keys, rng)

        values = [question.entries[key] for key in keys]
        if slips[1]:  # misreads the picture; taking a neighbour's number is as usual as misreading a digit
            wrong = rng.randrange(2)
            others = [v for key, v in question.entries.items() if key != keys[wrong] and v != values[wrong]]
            if others and rng.random() < 0.5:
                values[wrong] = rng.choice(others)
            else:
                values[wrong] = other_value(values[wrong], kind.low, kind.high, rng)
        evidence = evidence_text(kind, keys, values, rng)

        rule = rng.choice([o for o in OPERATIONS if o != operation]) if slips[2] else operation
        knowledge = rule_text(operation, rule, rng)
        value = result(rule, *values)
        if slips[3]:  # wrong arithmetic
            value = other_value(value, 0, 2 * kind.high, rng)
        reason = reason_text(rule, values, value, rng)
        if slips[4]:  # forgets what was found
            value = other_value(value, 0, 2 * kind.high, rng)
        if told:
            value = question.answer
        conclusion = f"{conclusion_text(operation, value, rng)}\nFinal answer: {value}"
        bodies = (goal, evidence, knowledge, reason, conclusion)
        steps = tuple(
            f"Step {i}: {title}. {body}"
            for i, (title, body) in enumerate(zip(STEP_TITLES, bodies, strict=True), start=1)
        )
        return Response(steps, value, slips.index(True) if True in slips else None)


def random_kind(rng: Random) -> Kind:
    """One of the ten kinds of picture, each as likely."""
    return KINDS[rng.choice(list(KINDS))]
