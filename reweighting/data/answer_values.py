r"""What a final answer means: numbers, options, formulas and words, and when two answers are the same.

answers_match("(B)", "B")      # True
answers_match("2x", "apples")  # None: cannot be decided
"""

import logging
import re
import unicodedata
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial

MAX_LENGTH = 400  # characters of an answer that is taken apart; a longer one is compared as a text
MAX_DIGITS = 100  # of a number: no arithmetic on longer ones
MAX_FORMULA = 80  # characters of a formula that is compared by its value

# LaTeX and markup that changes no meaning, in the order in which it is taken out.
CLEANING = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"[−–﹣－]", "-"),
        (r"[¼-¾⅐-⅞]", lambda found: " " + unicodedata.normalize("NFKC", found[0]).replace("⁄", "/")),
        (r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}", r"\1"),
        (r"\\[dt]frac", r"\\frac"),
        (r"\\(?:left|right|displaystyle)(?![a-z])|\\[()\[\]!,]|[$*`]", ""),
        (r"\\[;: ]|~|\\quad", " "),
        (r"\\([%{}#&])", r"\1"),
        (r"\^\s*\{?\\circ\}?|\\degree", "°"),
        (r"\{,\}", ","),
        (r"\\times|×|\\cdot", "×"),
        (r"\s+", " "),
    )
]

DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?:[ ]\d{3})+|\d+)"
NUMBER = re.compile(
    rf"""(?P<sign>[+-]?)\s?(?P<currency>[€£¥₹]?)\s?
    (?:(?:(?P<whole>\d+)\s?)?\\frac\s?(?:\{{(?P<top>\d+)\}}\s?\{{(?P<bottom>\d+)\}}|(?P<top1>\d)(?P<bottom1>\d))
      |(?:(?P<whole2>\d+)\ )?(?P<top2>\d+)\s?/\s?(?P<bottom2>\d+)
      |(?P<decimal>(?:{DIGITS}(?:\.\d*)?|\.\d+))
       (?:e(?P<exponent>[+-]?\d{{1,3}})|\s?[×x*]\s?10\^\{{?(?P<power>[+-]?\d{{1,3}})\}}?)?)
    (?P<unit>.*)""",
    re.VERBOSE,
)
# A unit that may be left out: a sign, a short one of a list behind a space, or a noun. `2x` and `2 million` are none.
SIGN_UNIT = re.compile(r"\s?(?:%|°\s?[cfk]?|[€£¥₹]|percent|degrees?)")
POWER = r"(?:\s?(?:\^?\{?[23]\}?|[²³]))?"
SHORT_UNIT = re.compile(
    rf"\s(?:[mckµn]?[mgljsvawn]|min|hr?s?|in|ft|yd|lbs?|oz|[km]?hz|k?pa|mol){POWER}"
    rf"(?:/(?:s|h|min|kg|g|l|ml|[mck]?m){POWER})?"
)
NOUN = r"\s[^\W\d_]{3,20}"
NOUN_UNIT = re.compile(rf"{NOUN}(?:{NOUN})?(?:\s(?:per|of|an?){NOUN})?")  # apples, gold coins, miles per hour
NO_UNIT = re.compile(r"\b(?:(?:hundred|thousand|million|billion|trillion)(?:th)?|(?:four|fif|six|seven|eigh|nin|ten)th|"
                     r"dozen|score|half|halves|third|quarter|percent|and|plus|minus|times|over|mod|squared|cubed|sqrt|"
                     r"log|sin|cos|tan|not)s?\b")  # fmt: skip

SEVERAL = re.compile(r"[,;]|\b(?:and|or)\b")  # results, of an equation
# `B`, `(B)`, `B.`, `B) 4 apples`, `option B`
OPTION = re.compile(r"(?:the )?(?:correct )?(?:option|choice|answer)?(?: is)? ?"
                    r"(?:[(\[{]([a-z])[)\]}][.:]?|([a-z])(?:[.):](?= |$)|$))(?P<rest>.*)")  # fmt: skip
ANOTHER_OPTION = re.compile(r"\([a-z]\)|(?:^|[ ,])[a-z]\)|\b(?:and|or) [b-j]\b")
WORD = re.compile(r"\w+")

# What a formula may hold to be computed with: no sums, integrals or factorials, no powers of powers, no prose. All of
# it is done in moments, as it must be: a time limit would need a signal, which only the main thread can have.
FORMULA_COMMANDS = {"frac", "sqrt", "pi", "infty", "cup", "cap", "in", "pm", "le", "leq", "ge", "geq", "ne", "neq",
                    "alpha", "beta", "theta", "lambda", "mu", "sin", "cos", "tan", "ln", "log"}  # fmt: skip
TOO_MUCH = re.compile(r"!|\^[^{]?\^|\^\{[^{}]*[\^{]|\^\{?[+-]?\d{3}|[)}\]]\s?\^\{?[+-]?\d\d|(?:\^.*){5}|\d{16}")
PROSE = re.compile(r"(?<![\\a-z])[a-z]{3,}")


def normal_answer(answer: str | None) -> str | None:
    """Return one form for answers that mean the same, or None for a blank one.

    `13`, ` 13.0 ` and `**13**` have the same form, and so have `1,300` and `$1300`, `1/2` and `0.5`, `(B)` and `B.`,
    `Red.` and `red`, `7 apples` and `7`.
    """
    if answer is None or not (text := _plain(answer)):
        return None
    number = _number(text)
    if number:
        return str(number.value)
    return _option(text) or re.sub(r" ?([;:=+*/^(){}|<>×-]) ?", r"\1", re.sub(r" ?, ?", ", ", text))


def answers_match(stated: str | None, truth: str) -> bool | None:
    """Compare a stated answer with the true one.

    Numbers are compared with numbers (a unit, currency or percent sign may be left out, thousands separators are
    read), options with options by their letters, other texts by their words.

    Returns:
        True or False, or None if it cannot be decided: nothing is stated, one is a number and the other a text, their
        units differ, they are different formulas, or one text holds the other.
    """
    given, true = normal_answer(stated), normal_answer(truth)
    if stated is None or given is None or true is None:
        return None
    a, b = _number(_plain(stated)), _number(_plain(truth))
    if b and a is None:
        a = _result(_plain(stated))
    if a and b:
        return _same_number(a, b)
    if given == true:
        return True
    if max(len(given), len(true)) > MAX_LENGTH:
        return None
    is_option = [len(one) == 1 and one.isalpha() for one in (given, true)]
    if any(is_option):
        return False if all(is_option) else None
    if (a and a.unit) or (b and b.unit):
        return None
    if any(map(_is_formula, (given, true))):
        return _same_formula(given, true)
    return None if _holds(given, true) or _holds(true, given) else False


def is_blank(answer: str) -> bool:
    """Return whether an answer is nothing but markup."""
    return not _plain(answer)


def is_number(answer: str) -> bool:
    """Return whether an answer is a number, with or without a unit."""
    return _number(_plain(answer)) is not None


def in_braces(text: str, start: int) -> str | None:
    """Return what stands between an opening brace before `start` and the one that closes it, None if that is far."""
    depth = 1
    for place, letter in enumerate(text[start : start + MAX_LENGTH], start):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[start:place]
    return None


def _plain(answer: str) -> str:
    """The answer without markup, in lower case."""
    if len(answer) > MAX_LENGTH:
        return " ".join(answer.casefold().split())
    boxed = re.search(r"\\boxed\s*\{", answer)
    if boxed and (inner := in_braces(answer, boxed.end())) is not None:
        answer = inner
    for pattern, replacement in CLEANING:
        answer = pattern.sub(replacement, answer)
    answer = re.sub(r"^ ?[a-z] ?= ?(?=\S)", "", answer.casefold())  # x = 7
    return answer.strip(' "“”').rstrip('.,;: "”').strip("_")


@dataclass(frozen=True)
class _Number:
    """A number and its unit, "" if it has none."""

    value: Fraction
    unit: str


def _number(text: str) -> _Number | None:
    """The number that a plain text is, if it is one."""
    found = NUMBER.fullmatch(text) if len(text) <= MAX_LENGTH else None
    if found is None or sum(map(str.isdigit, text)) > MAX_DIGITS or not _may_be_unit(found["unit"]):
        return None
    if found["decimal"]:
        value = Fraction(found["decimal"].replace(",", "").replace(" ", "").rstrip("."))
        value *= Fraction(10) ** int(found["exponent"] or found["power"] or 0)
    else:
        top, bottom = (found[name] or found[f"{name}1"] or found[f"{name}2"] for name in ("top", "bottom"))
        if not int(bottom):
            return None
        value = int(found["whole"] or found["whole2"] or 0) + Fraction(int(top), int(bottom))
    return _Number(-value if found["sign"] == "-" else value, (found["currency"] or found["unit"]).strip())


def _result(text: str) -> _Number | None:
    """The number that an equation ends in, with its unit: 7 apples of `3 + 4 = 7 apples`; None if there may be more."""
    left, equals, right = text.rpartition("=")
    if not equals or left.rstrip().endswith(("<", ">", "!")) or SEVERAL.search(left):
        return None
    return _number(right.strip())


def _may_be_unit(text: str) -> bool:
    """Whether this may stand behind a number without changing it."""
    if not text or SIGN_UNIT.fullmatch(text) or SHORT_UNIT.fullmatch(text):
        return True
    return NOUN_UNIT.fullmatch(text) is not None and not NO_UNIT.search(text)


def _same_number(a: _Number, b: _Number) -> bool | None:
    """Whether two numbers are the same; None if their units differ."""
    units = {one.unit.rstrip("s").replace("percent", "%") for one in (a, b) if one.unit}
    if len(units) == 2:
        return None
    if units == {"%"} and not (a.unit and b.unit):  # 50 % may be written as 50 and as 0.5
        share, other = (a.value, b.value) if a.unit else (b.value, a.value)
        return other in (share, share / 100)
    return a.value == b.value


def _option(text: str) -> str | None:
    """The letter of the option that a plain text names, if it names one."""
    found = OPTION.fullmatch(text) if len(text) <= MAX_LENGTH else None
    if found is None or ANOTHER_OPTION.search(found["rest"]):
        return None
    return found[1] or found[2]


def _is_formula(text: str) -> bool:
    """Whether a text may mean the same as another that differs from it."""
    return re.search(r"[\d\\^=+*/<>×√π]", text) is not None


@lru_cache(maxsize=4096)  # a truth is compared with many candidates, which often state the same
def _same_formula(a: str, b: str) -> bool | None:
    """Whether two formulas have the same value; None if that cannot be computed, or one of them is prose."""
    for text in (a, b):
        commands = set(re.findall(r"\\([a-z]+)", text))
        if (
            len(text) > MAX_FORMULA
            or text.endswith("=")
            or not commands <= FORMULA_COMMANDS
            or TOO_MUCH.search(text)
            or PROSE.search(text)
        ):
            return None
    import math_verify  # a second, for those who need it

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of every call without a time limit
    with suppress(Exception):  # sympy has many kinds of them
        # None, beside the documented numbers, sets no timer: timers need the main thread.
        parse = partial(math_verify.parse, parsing_timeout=None)  # ty: ignore[invalid-argument-type]
        parsed = [parse(f"${text}$") for text in (b, a)]
        if all(parsed):
            return math_verify.verify(*parsed, timeout_seconds=None)
    return None


def _holds(text: str, part: str) -> bool:
    """Whether a text has another one's words in it, one after the other."""
    return f" {' '.join(WORD.findall(part))} " in f" {' '.join(WORD.findall(text))} "
