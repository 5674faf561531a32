"""answers.py and answer_values.py: what a response states, and whether that is correct, incorrect or unknown."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reweighting.data.answer_values import answers_match, normal_answer
from reweighting.data.answers import candidate_correctness, final_answer, stated_answers
from reweighting.data.schema import CandidateRow


def candidates(*texts, **fields):
    return CandidateRow(id=1, input="Q", image_path=None, candidates=list(texts), **fields)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Step 1: x\nFinal answer: 13", "13"),
        ("Final answer: 12\nno: **Final Answer:** 13.0 \nbye", "13"),
        ("Final answer: $1,300$.", "1300"),
        ("Final answer: The  Red one.", "the red one"),
        ("Final answer: 0", "0"),
        ("Final answer: .50", "0.5"),
        ("Final answer: -0", "0"),
        ("Final answer: 1e1000000", "1E1000000"),
        ("Final answer: 12,345.60", "12345.6"),
        ("Final answer: 12345678901234567890123456789012.0", "12345678901234567890123456789012"),
        ("3 * 20 = 60\n#### 60", "60"),
        ("3 * 20 = 60\n#### 60\n", "60"),
        ("3 * 20 = 60\nA: 60\n", "60"),
        ("A: 60 cm\nB: 3 cm, so it is larger", None),
        (r"Final answer: \boxed{60}", "60"),
        (r"the final answer is: $\boxed{7}$", "7"),
        (r"So \boxed{\frac{1}{2}} it is.", "0.5"),
        (r"\boxed{\text{Paris}}", "paris"),
        ("**Final answer:**\n7", "7"),
        ("### Final Answer\n\n**7**", "7"),
        ("**Answer:** 7\n\nI hope that helps.", "7"),
        ("Answer: B. Paris", "B"),
        ("Final answer: (B) 4 apples", "B"),
        ("The answer is (B).", "B"),
        ("The correct answer is **C** because it is red.", "C"),
        ("Hence the answer is 3.5. Let me check.", "3.5"),
        ("So the answer is 7, since 3 + 4 = 7", "7"),
        ("Final answer: 7. Since 3 + 4 = 7", "7"),
        ("The answer is: x = -5", "-5"),
        ("the answer is −5", "-5"),
        ("The final answer is $7", "7"),
        ("Final answer:", None),
        ("I do not know what the answer is.", None),
        ("#### Step 2: add\nso it goes", None),
        ("#### Step 2: add", None),
        (r"\boxed{7", None),
        ("13", None),
    ],
)
def test_stated_answers_are_found(response, answer):
    assert normal_answer(final_answer(response)) == normal_answer(answer)
    assert normal_answer("13") != normal_answer("1300") != normal_answer("the red one")


@pytest.mark.parametrize(
    ("stated", "truth", "correct"),
    [
        ("(B)", "B", True),
        ("B.", "B", True),
        ("B) 4 apples", "b", True),
        ("option B", "(B)", True),
        ("(B)", "C", False),
        ("4 apples", "B", None),  # perhaps what B says
        ("(A) and (B)", "A", None),
        ("−5", "-5", True),
        ("5", "-5", False),
        ("1,300", "1300", True),
        ("1 300", "1{,}300", True),
        ("5, 100", "5100", False),
        ("$60", "60", True),
        ("60 dollars", "$60", True),
        ("€7.50", "7.5", True),
        ("50 %", "50", True),
        (r"50\%", "0.5", True),
        ("50%", "5", False),
        ("7 cm", "7", True),
        ("7 cm", "8 cm", False),
        ("7 cm", "7 mm", None),
        (r"3 \text{ cm}^2", "3", True),
        (r"90^\circ", "90", True),
        ("7 apples", "7", True),
        ("8 apples", "7", False),
        ("2 million", "2", None),
        ("6 miles per hour", "6", True),  # units of several words
        ("4 boxes of pizza", "2", False),
        ("20 dollars an hour", "20 dollars a day", None),
        ("5 hundredths", "5", None),
        ("3 tenths of miles", "3", None),
        ("10 percent of people", "10", None),
        ('2.5 hours"', "2.5", True),  # of a quotation
        ("“7”", "7", True),
        ("2x", "2", False),
        ("1/2", "0.5", True),
        ("½", "1/2", True),
        ("2½", "2.5", True),
        (r"\dfrac12", "0.5", True),
        (r"1 \frac{1}{2}", "1.5", True),
        (r"3 \times 10^{6}", "3,000,000", True),
        ("1/0", "7", False),
        ("x = 7", "7", True),
        ("Yes.", "yes", True),
        ("yes", "No", False),
        ("the red one", "red", None),
        ("red", "blue", False),
        ("7", "seven", None),
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        (r"2\sqrt{3}", r"3\sqrt{2}", False),
        ("(x+1)^2", "x^2 + 2x + 1", True),
        (r"\frac{\pi}{2}", r"\pi / 2", True),
        ("(1, 2)", "(1,2)", True),
        (r"\int_0^1 x dx", "x", None),  # is not computed
        ("10!", "3628800", None),
        ("3 + 4 = 7 apples", "7", True),  # an equation with a unit
        ("$16 - $2 = 14 dollars", "13", False),
        ("3 + 4 = 7 apples", "7 pears", None),
        ("1 x 2 =", "2", None),  # is cut off
        ("x >= 7 apples", "7", None),
        ("", "7", None),
        (None, "7", None),
        ("7", " ", None),
    ],
)
def test_answers_are_compared(stated, truth, correct):
    assert answers_match(stated, truth) is correct


def test_no_arithmetic_is_done_on_what_never_ends():
    start = time.process_time()
    nines = "9" * 3_000_000
    assert answers_match(nines, nines) is True
    assert answers_match(nines, "7") is None
    assert candidate_correctness(candidates(f"Final answer: {nines}", ground_truth=nines)) == [True]
    for monster in (
        "9^{9^{9^9}}",
        "((9^{99})^{99})^{99}",
        "9^9^9^9",
        "2^{1000000000}",
        "1e999999999",
        "9999999999999999^99",
    ):
        assert answers_match(monster, "7") is not True
    assert final_answer(r"\boxed{" * 100_000) is None
    assert time.process_time() - start < 10


def test_formulas_are_compared_in_threads_too():
    found = []

    def compare(n):
        found.append(answers_match(f"{n}(x+1)^2", f"{n}x^2+{2 * n}x+{n}"))

    threads = [threading.Thread(target=compare, args=[n]) for n in range(2, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 3


pieces = st.sampled_from(
    [
        "answer",
        "is",
        ":",
        " ",
        "\n",
        "#### ",
        "\nA: ",
        "\\boxed{",
        "{",
        "}",
        "$",
        "(",
        "b",
        ")",
        "-",
        "−",
        "7",
        "0",
        "1,300",
        ".5",
    ]
    + ["/", "\\frac", "^", "%", " cm", "Final ", "**", "e9", "\\text{", "²", "٣", "x", ",", "="]
)


@given(st.lists(pieces, max_size=12).map("".join) | st.text(max_size=30), st.lists(pieces, max_size=6).map("".join))
@settings(derandomize=True, deadline=None, max_examples=200)
def test_any_answer_is_read_and_equals_itself(text, truth):
    stated = final_answer(text)
    assert stated is None or normal_answer(stated)
    for one in (text, truth):
        form = normal_answer(one)
        assert answers_match(one, one) is (None if form is None else True)
    assert answers_match(stated, truth) in (True, False, None)
    assert answers_match(text, truth) is answers_match(truth, text)


def test_correctness_comes_from_true_false_or_the_ground_truth():
    row = candidates("Final answer: 4", "none", "Final answer: 5", ground_truth=4)
    assert candidate_correctness(row) == [True, None, False]
    assert candidate_correctness(row.model_copy(update={"true_false": [False, True, True]})) == [False, True, True]
    assert candidate_correctness(row.model_copy(update={"ground_truth": None})) is None
    given = row.model_copy(update={"answers": ["(a)", "", "4.0"]})
    assert stated_answers(given) == ["a", None, "4"] and candidate_correctness(given) == [None, None, True]
    solution = row.model_copy(update={"ground_truth": "2 + 2 = 4\n#### 4"})
    assert candidate_correctness(solution) == [True, None, False]
