"""labels.py: every kind of label as a number from 0 to 1."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reweighting.data.labels import (
    accuracy_from_counts,
    agree,
    check_rating,
    label_value,
    labels_up_to,
    rating_label,
)

anything = settings(max_examples=300, deadline=None, derandomize=True, database=None)
VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.lists(st.integers(), max_size=2)
)


@pytest.mark.parametrize(
    "label, value",
    [(True, 1), (False, 0), (1, 1), (0, 0), (0.25, 0.25), ("+", 1), ("-", 0), ("−", 0), (" + ", 1), ("0.75", 0.75),
     ("1", 1), ("True", 1), ("false", 0), (None, None)],
)  # fmt: skip
def test_labels(label, value):
    assert label_value(label) == value


@pytest.mark.parametrize("label", [2, -1, 1.01, math.nan, math.inf, "", "good", "nan", [1], {}, "1" * 100, 10**400])
def test_what_is_no_label(label):
    with pytest.raises(ValueError, match="^a number from 0 to 1, true or false, . or -, or null$"):
        label_value(label)


@pytest.mark.parametrize(
    "rating, neutral, value",
    [(1, "correct", 1), (-1, "correct", 0), (0, "correct", 1), (0, "incorrect", 0), (0, "unlabelled", None),
     ("-1", "correct", 0), (1.0, "correct", 1), (None, "correct", None)],
)  # fmt: skip
def test_ratings(rating, neutral, value):
    assert rating_label(check_rating(rating), neutral) == value


@pytest.mark.parametrize("rating", [2, 0.5, True, "a", [], math.nan])
def test_what_is_no_rating(rating):
    with pytest.raises(ValueError, match="^-1, 0 or 1, or null$"):
        check_rating(rating)


def test_first_error():
    assert labels_up_to(3, -1, "unlabelled") == labels_up_to(3, None, "incorrect") == [1, 1, 1]
    assert labels_up_to(4, 1, "unlabelled") == [1, 0, None, None]
    assert labels_up_to(4, 1, "incorrect") == [1, 0, 0, 0]
    for beyond in (4, -2):
        with pytest.raises(ValueError, match="^a step's index from 0 to 3, or -1 or null if no step is wrong$"):
            labels_up_to(4, beyond, "incorrect")


@anything
@given(VALUES)
def test_any_label_is_a_number_from_0_to_1_or_refused(label):
    for convert in (label_value, lambda value: rating_label(check_rating(value), "correct")):
        try:
            value = convert(label)
        except ValueError:
            continue
        assert value is None or (isinstance(value, float) and 0 <= value <= 1)


@anything
@given(st.integers(0, 32), st.integers(1, 32))
def test_counts(score, times):
    quotient = accuracy_from_counts(score, times)
    assert quotient == score / times and agree(round(quotient, 2), quotient) and not agree(quotient + 0.02, quotient)


@anything
@given(VALUES, VALUES)
def test_counts_of_anything(score, times):
    quotient = accuracy_from_counts(score, times)
    assert quotient is None or isinstance(quotient, float | int)
