"""Text that reaches a terminal shows its control characters and does not obey them."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reweighting.terminal import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("pie\x1b[31mred", r"pie\x1b[31mred"),
        ("a\x07b\0c\x7fd\x9be", r"a\x07b\x00c\x7fd\x9be"),
        ("gpj\u202egnp", r"gpj\u202egnp"),
        ("a\u2066b\u200fc\ufeffd", r"a\u2066b\u200fc\ufeffd"),
        ("lone \ud800 half", r"lone \ud800 half"),
        ("one\rtwo\tthree\u2028four", r"one\rtwo\tthree\u2028four"),
        ("图表 نمودار می\u200cشود ½ 👩\u200d🔬", "图表 نمودار می\u200cشود ½ 👩\u200d🔬"),
        (r"C:\new\x1b", r"C:\new\x1b"),
        (ValueError("a\nb"), "a\nb"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text, shown):
    assert printable(text) == shown


def test_a_name_stays_on_its_line():
    assert printable("a\nerror: forged", one_line=True) == r"a\nerror: forged"


@given(st.text(st.characters(exclude_categories=())))
def test_nothing_but_joiners_and_newlines_stays_invisible(text):
    shown = printable(text)
    left = {char for char in shown if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    assert left <= set("\n\u200c\u200d") and shown.count("\n") == text.count("\n")
    assert "\n" not in printable(text, one_line=True)
    assert printable(shown) == shown
    shown.encode("utf-8")
