"""placeholders.py: where a question's images stand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reweighting.data.placeholders import (
    PLACEHOLDER,
    place_images,
    placeholder_problem,
    question_parts,
    without_placeholders,
)
from reweighting.errors import UserError


@pytest.mark.parametrize(
    ("question", "images", "placed", "parts"),
    [
        (" How many? ", 0, "How many?", ["How many?"]),
        ("How many?", 2, "How many?", [None, None, "How many?"]),
        ("<image>\nHow many?", 1, "How many?", [None, "How many?"]),  # before the question anyway
        ("<image>\n<image> How many?", 2, "How many?", [None, None, "How many?"]),
        ("Is <image> in\n<image>?", 2, "Is <image> in\n<image>?", ["Is ", None, " in\n", None, "?"]),
        ("How many?\n<image>", 1, "How many?\n<image>", ["How many?\n", None]),
        ("<image>", 1, "", [None, ""]),
        ("A:<image><image>", 2, "A:<image><image>", ["A:", None, None]),
        ("<image 1> Is it in <image2>?", 2, "<image> Is it in <image>?", [None, " Is it in ", None, "?"]),
        ("Is <image1> as in <image 1>?", 1, "Is <image> as in image 1?", ["Is ", None, " as in image 1?"]),
        ("<image 1>\nHow many?", 1, "How many?", [None, "How many?"]),
        ("Which? <image1> or <image2>?", 1, "Which? <image1> or <image2>?", [None, "Which? <image1> or <image2>?"]),
        ("<image2>, then <image1>", 2, "<image2>, then <image1>", [None, None, "<image2>, then <image1>"]),
    ],
)
def test_images_stand_at_their_placeholders_or_before_the_question(question, images, placed, parts):
    assert placeholder_problem(question, images) is None
    assert place_images(question, images) == placed == place_images(placed, images)
    assert question_parts(placed, images) == parts


@pytest.mark.parametrize(
    ("question", "images", "found"),
    [("<image>?", 0, "1 `<image>` for 0 images"), ("<image> <image>", 1, "2 `<image>` for 1 image,")],
)
def test_a_count_that_does_not_fit(question, images, found):
    assert placeholder_problem(question, images).startswith(f"found {found}")
    assert place_images(question, images) == question  # as it is: whoever reads it, says so
    with pytest.raises(
        UserError, match="the question does not fit its images: found .* allowed: one `<image>` for each"
    ):
        question_parts(question, images)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from([PLACEHOLDER, "a", " ", "\n", "<", "image>", "é"]), max_size=9).map("".join))
def test_nothing_of_a_question_is_lost(question):
    images = question.count(PLACEHOLDER)
    assert "".join(PLACEHOLDER if part is None else part for part in question_parts(question, images)) == question
    before = [part for part in question_parts(place_images(question, images), images) if part and part.strip()]
    assert before == [part for part in map(str.strip, question.split(PLACEHOLDER)) if part] or PLACEHOLDER in question
    assert PLACEHOLDER not in without_placeholders(question) or "<<image>image>" in question
