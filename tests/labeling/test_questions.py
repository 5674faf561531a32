"""Rows that hold a question: what is read from them, and what is refused."""

import json

import pytest

from reweighting.data.load_answers import LoadReport
from reweighting.data.readers.base import ReadingOptions
from reweighting.data.sources import Source
from reweighting.errors import UserError
from reweighting.labeling.questions import iterate_questions


def read(path, rows: list[dict], **options):
    """The domains of the questions in a file of these rows, and the report."""
    given = [{"question": f"{n} + 1?", "ground_truth": n + 1} | row for n, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    report = LoadReport()
    found = list(iterate_questions([Source(str(path))], None, ReadingOptions(**options), report))
    return [question.domain for question in found], report


def test_a_domain_is_text_without_space_around_it_or_a_whole_number(tmp_path):
    file = tmp_path / "sums.jsonl"
    assert read(file, [{"dataset": " easy "}, {"subject": "hard\n"}, {"dataset": 7}, {}])[0] == [
        "easy", "hard", "7", "sums"]  # fmt: skip
    assert read(file, [{"of": {"kind": " odd "}}], domain_field="of.kind")[0] == ["odd"]


@pytest.mark.parametrize("wrong", ["", "  ", ["a"], {"a": 1}, 0.5, True])
def test_what_is_no_domain_names_the_row(tmp_path, wrong):
    for row, options in (({"dataset": wrong}, {}), ({"kind": wrong}, {"domain_field": "kind"})):
        if wrong == 0.5 and options:  # a number is a domain where the user has named its field
            continue
        with pytest.raises(UserError, match="row 1: dataset: found .*, allowed: text that is not blank"):
            read(tmp_path / "sums.jsonl", [{"dataset": "a", "kind": "a"}, row], **options)


def test_rows_without_the_field_that_names_the_domain_are_counted(tmp_path):
    domains, report = read(tmp_path / "sums.jsonl", [{"kind": "a"}, {"dataset": "b"}, {}], domain_field="kind")
    assert domains == ["a", "b", "sums"] and "2 rows lack the field" in report.notes()[0]


def test_a_file_of_answers_has_many_to_a_question_and_a_file_of_questions_has_not(tmp_path):
    twice = [{"question": "3 + 4?", "ground_truth": 7, "dataset": "sums"}] * 2
    domains, report = read(tmp_path / "questions.jsonl", twice)
    assert domains == ["sums"] and "1 answer is left out: its question stands there before" in report.notes()[0]
    domains, report = read(tmp_path / "answers.jsonl", [row | {"steps": ["So 7."]} for row in twice])
    assert domains == ["sums"] and report.notes() == []
