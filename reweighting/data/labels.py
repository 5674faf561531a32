"""Step labels of every kind as numbers from 0 to 1, None where a step is unlabelled.

label_value("+")                            # 1.0
rating_label(0, neutral="unlabelled")        # None: PRM800K rates steps -1, 0 (neutral) and 1
labels_up_to(4, 2, after="unlabelled")       # [1.0, 1.0, 0.0, None]: step 2 is the first wrong one
"""

import math
from typing import Any, Literal

Neutral = Literal["correct", "incorrect", "unlabelled"]
AfterFirstError = Literal["unlabelled", "incorrect"]

VALUES = {"correct": 1.0, "incorrect": 0.0, "unlabelled": None}
WORDS = {"+": 1.0, "-": 0.0, "−": 0.0, "true": 1.0, "false": 0.0}
ALLOWED = "a number from 0 to 1, true or false, + or -, or null"
RATINGS = "-1, 0 or 1, or null"
ACCURACY_ROUNDING = 0.01  # how far an accuracy may be from score / times: two decimals are common


def label_value(label: Any) -> float | None:
    """Convert a label: a bool, a number from 0 to 1, `+` or `-`, any of them as text, or None.

    Returns:
        The number, None for an unlabelled step.

    Raises:
        ValueError: it is something else.
    """
    if label is None:
        return None
    if isinstance(label, str):
        text = label.strip().lower()
        if text in WORDS:
            return WORDS[text]
        number = _number(text)
    else:
        number = float(label) if isinstance(label, bool | float) or label in (0, 1) else math.nan
    if not 0 <= number <= 1:  # also where it is NaN
        raise ValueError(ALLOWED)
    return number


def check_rating(rating: Any) -> int | None:
    """Convert a rating: -1, 0 or 1, as a number or a text, or None.

    Raises:
        ValueError: it is something else.
    """
    if rating is None:
        return None
    number = _number(rating) if isinstance(rating, str) else rating
    if isinstance(rating, bool) or number not in (-1, 0, 1):
        raise ValueError(RATINGS)
    return int(number)


def rating_label(rating: int | None, neutral: Neutral) -> float | None:
    """Return the label that a rating stands for.

    Args:
        rating: from `check_rating`; 0: the step is neither correct nor incorrect.
        neutral: what 0 counts as.
    """
    return VALUES[neutral] if rating == 0 else rating and float(rating == 1)


def labels_up_to(steps: int, first_error: int | None, after: AfterFirstError) -> list[float | None]:
    """Label steps by which of them is the first wrong one.

    Args:
        steps: how many steps there are.
        first_error: index of the first wrong step from 0; None or -1: no step is wrong.
        after: the label of the steps behind it.

    Returns:
        A label for each step.

    Raises:
        ValueError: there is no such step.
    """
    if first_error is None or first_error == -1:
        return [1.0] * steps
    if not 0 <= first_error < steps:
        raise ValueError(f"a step's index from 0 to {steps - 1}, or -1 or null if no step is wrong")
    return [1.0] * first_error + [0.0] + [VALUES[after]] * (steps - first_error - 1)


def accuracy_from_counts(score: Any, times: Any) -> float | None:
    """Return the share of `times` continuations that were correct, None if these are no counts, or of nothing."""
    numbers = all(isinstance(count, int | float) and not isinstance(count, bool) for count in (score, times))
    try:
        return score / times if numbers else None
    except (ZeroDivisionError, OverflowError):
        return None


def agree(accuracy: float, quotient: float) -> bool:
    """Return whether an accuracy is the quotient of its counts, to two decimals."""
    return abs(accuracy - quotient) <= ACCURACY_ROUNDING


def _number(text: str) -> float:
    """The number that a text is, NaN if it is none."""
    try:
        return float(text) if len(text) < 30 else math.nan
    except ValueError:
        return math.nan
