"""steps.py: markers in any place and script, separators, and what marks no step."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reweighting.data.steps import first_step_number, split_answer, split_prompt, split_response, split_steps

WORDS = st.text(st.sampled_from("abc xyz.,\n"), min_size=1, max_size=20).filter(str.strip)
deterministic = settings(max_examples=200, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize(
    "text, before, steps",
    [
        ("First. Step 1: a. Step 2: b", "First.", ["Step 1: a.", "Step 2: b"]),
        ("**Step 1:** a **Step 2**: b", "", ["**Step 1:** a", "**Step 2**: b"]),
        ("Step 1: a\nStep 2: b Step 3: c", "", ["Step 1: a", "Step 2: b", "Step 3: c"]),
        ("Step One: a\nStep Two - b", "", ["Step One: a", "Step Two - b"]),
        ("步骤1：甲\n步骤 2：乙", "", ["步骤1：甲", "步骤 2：乙"]),
        ("首先。步骤一：甲。步驟二：乙", "首先。", ["步骤一：甲。", "步驟二：乙"]),
        ("第一步，甲\n第二步：乙", "", ["第一步，甲", "第二步：乙"]),
        # Not all of them are numbered 1, 2, 3: only those count that begin a line.
        ("Step 1: a, see Step 1: there\nStep 2: b", "", ["Step 1: a, see Step 1: there", "Step 2: b"]),
        ("Step 2: a. Step 9: b", "", ["Step 2: a. Step 9: b"]),
    ],
)
def test_markers(text, before, steps):
    assert split_steps(text) == (before, steps)


@pytest.mark.parametrize(
    "text",
    ["As in step 1 we see", "Step one foot forward", "第3页的内容", "two-step 1: no", "footstep 1: no", "步行1公里"],
)
def test_what_marks_no_step(text):
    assert split_steps(text) == (text, []) and split_response(text) == [text]
    assert first_step_number(text) is None


@pytest.mark.parametrize(
    "marker, number",
    [("Step 12:", 12), ("Step twenty:", 20), ("步骤十：", 10), ("第十二步", 12), ("第二十步", 20), ("步骤三十一", 31),
     ("Step 9999999999:", -1), ("步骤十十", -1)],
)  # fmt: skip
def test_step_numbers(marker, number):
    assert first_step_number(marker) == number


@pytest.mark.parametrize(
    "separator, text, steps",
    [
        ("\n\n", "a\n\n\nb\n\n", ["a", "b"]),
        ("ки", "Step 1: a ки\nStep 2: b ки", ["Step 1: a", "Step 2: b"]),
        ("<extra_0>", "a<extra_0>b<extra_0>", ["a", "b"]),
        ("<prm>", "Step 1: a\nStep 2: b", ["Step 1: a", "Step 2: b"]),  # not there: markers
        ("\n\n", "\n\n", [""]),
    ],
)
def test_separators(separator, text, steps):
    assert split_response(text, separator) == steps


@pytest.mark.parametrize(
    "separator, text, question, steps",
    [
        ("ки", "How many? Step 1: a ки\nStep 2: b ки", "How many?", ["Step 1: a", "Step 2: b"]),
        ("\n\n", "How many?\n\na\n\nb", "How many?", ["a", "b"]),
        ("\n\n", "How many?\nStep 1: a\n\nb", "How many?", ["Step 1: a", "b"]),
        ("ки", "How many? a ки b ки", "How many? a ки b ки", []),  # nobody knows where the question ends
        (None, "List: Step 1: x. Step 2: y. Go. Step 1: a Step 2: b", "List: Step 1: x. Step 2: y. Go.",
         ["Step 1: a", "Step 2: b"]),
    ],
)  # fmt: skip
def test_question_and_answer(separator, text, question, steps):
    assert split_answer(text, separator) == (question, steps)


def test_a_response_may_continue_steps_inside_a_line():
    prompt = "How many? Step 1: a. Step 2: b."
    assert split_prompt(prompt, ["Step 3: c"]) == ("How many?", ["Step 1: a.", "Step 2: b."])
    assert split_prompt(prompt, ["Step 1: c"]) == (prompt, [])


@deterministic
@given(st.text(st.sampled_from("Step 123:：.\n*#-步骤第一十 abc"), max_size=80))
def test_nothing_but_white_space_is_lost(text):
    before, steps = split_steps(text)
    assert "".join((before + "".join(steps)).split()) == "".join(text.split())
    assert all(step and step == step.strip() for step in steps)
    response = split_response(text)
    assert response and "".join("".join(response).split()) == "".join(text.split())
    question, answer = split_answer(text)
    assert "".join((question + "".join(answer)).split()) == "".join(text.split())


@deterministic
@given(
    st.lists(WORDS, min_size=1, max_size=6), st.sampled_from(["Step {}: ", "### Step {}. ", "**Step {}** ", "步骤{}"])
)
def test_numbered_lines_are_the_steps(texts, marker):
    steps = [marker.format(number) + text.strip() for number, text in enumerate(texts, 1)]
    assert split_response("\n".join(steps)) == [step.strip() for step in steps]
    assert split_answer("How many?\n" + "\n\n".join(steps)) == ("How many?", [step.strip() for step in steps])


@deterministic
@given(st.lists(WORDS, min_size=1, max_size=6))
def test_numbered_steps_on_one_line(texts):
    steps = [f"Step {number}: {' '.join(text.split())}".strip() for number, text in enumerate(texts, 1)]
    assert split_response(" ".join(steps)) == steps


@pytest.mark.parametrize("piece", ["* ", " **([", "step 1", " step1: ", "第", "步骤 1", "step ", "步 "])
def test_takes_linear_time(piece):
    start = time.monotonic()
    split_response(piece * 50_000 + "step 1: a")
    assert time.monotonic() - start < 5
