"""The questions that a policy answers: with their images and their correct answer.

    for question in iterate_questions(sources, None, ReadingOptions(), LoadReport()): ...

Rows have `question` and `ground_truth` (or `answer`), and optionally `images`, `options`, `dataset` and `id`. A file of
answers, in any format that a reader knows, gives the questions that it answers.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, Field, field_validator

from reweighting.data.answer_values import answers_match, is_blank
from reweighting.data.answers import final_answer
from reweighting.data.load_answers import LoadReport, format_of
from reweighting.data.placeholders import place_images, placeholder_problem, without_placeholders
from reweighting.data.published_answers import iterate_any_answers
from reweighting.data.readers.base import ReadingOptions
from reweighting.data.row_checks import check_row
from reweighting.data.row_images import Reference, RowImages, image_root_folder
from reweighting.data.schema import AnyText, Domain, FromFile, OptionalId, Scalar, Text
from reweighting.data.sources import Source
from reweighting.errors import Problems, UserError
from reweighting.files import digest

UNJUDGED = "its question has no ground_truth to judge answers by"
REPEATED = "its question stands there before, with the same images, ground_truth and domain"
NOT_BLANK = "a correct answer that is not blank, or null"


@dataclass(frozen=True)
class Question:
    """A question to the policy.

    Attributes:
        text: the question, with its options; with an `<image>` for each image, or else they stand before it.
        images: their files, in order.
        ground_truth: the correct final answer.
        domain: the name of its domain.
        id: as the row has it.
        place: its file and row, for messages.
        asked: tells its text and images from those of other questions, on every machine.
        key: tells it from other questions, by its ground truth and domain too.
    """

    text: str
    images: tuple[Path, ...]
    ground_truth: str
    domain: str
    id: str | None
    place: str
    asked: str
    key: str


class QuestionRow(FromFile):
    """A row that holds a question and its correct answer."""

    question: Text
    ground_truth: Scalar = Field(
        validation_alias=AliasChoices("ground_truth", "correct_answer", "answer"),
        description="the correct answer, as a text, a number, true or false; or null",
    )
    options: list[AnyText] | None = Field(None, description="a list of texts, or null")
    images: Any = Field(None, validation_alias=AliasChoices("images", "image_path", "image"))
    dataset: Domain | int | None = Field(
        None,
        validation_alias=AliasChoices("dataset", "subject", "data_source"),
        description="text that is not blank, a whole number, or null",
    )
    id: OptionalId = None

    @field_validator("ground_truth")
    @classmethod
    def _is_stated(cls, truth: Any) -> Any:
        if isinstance(truth, str) and is_blank(truth):
            raise ValueError(NOT_BLANK)
        return truth

    @property
    def text(self) -> str:
        """The question, with its options by letter."""
        letters = (f"({chr(ord('A') + place)}) {option}" for place, option in enumerate(self.options or ()))
        return "\n".join([self.question.strip(), *letters])


def iterate_questions(
    sources: Sequence[Source], image_root: str | Path | None, options: ReadingOptions, report: LoadReport
) -> Iterator[Question]:
    """Read the questions of some sources, each question once.

    Args:
        sources: where they stand.
        image_root: the folder that holds all images; None: relative paths start beside the file, then in the working
            folder.
        options: what the formats leave open.
        report: is filled as they are read.

    Raises:
        UserError: at the end of a source, naming all that is wrong in it.
    """
    seen: set[str] = set()
    truths: dict[str, str] = {}  # of each question's text and images, the first ground truth
    for source in sources:
        known = format_of(source)
        found = _from_answers if known else _from_rows
        for question in found(source, image_root, options, report):
            if question.key in seen:
                # A file of answers has many to a question.
                report.left_out[source.path, REPEATED] += not known
                continue
            seen.add(question.key)
            before = truths.setdefault(question.asked, question.ground_truth)
            report.contradicting[source.path] += answers_match(before, question.ground_truth) is False
            yield question


def _from_answers(
    source: Source, image_root: str | Path | None, options: ReadingOptions, report: LoadReport
) -> Iterator[Question]:
    """The questions of a file of answers."""
    problems = Problems()
    for answer in iterate_any_answers(source, image_root, options, report):
        if answer.ground_truth is None:
            report.left_out[source.path, UNJUDGED] += 1
            continue
        truth = str(answer.ground_truth)
        if is_blank(truth):
            problems.add(f"row {answer.index}", f"ground_truth: found {truth!r:.40}, allowed: {NOT_BLANK}", "truth")
        if not problems.count:
            id = None if answer.id is None else str(answer.id)
            place = f"{source.path}: row {answer.index}"
            yield _question(answer.question, answer.images, truth, answer.domain, id, place)
    if problems.count:
        raise UserError(problems.message(source.path, report.rows))


def _from_rows(
    source: Source, image_root: str | Path | None, options: ReadingOptions, report: LoadReport
) -> Iterator[Question]:
    """The questions of rows that hold a question and its correct answer."""
    images = RowImages(source.folder, image_root_folder(image_root))
    problems, rows_before = Problems(), report.rows
    for (index, row), found in images.find(_rows(source, images, options, report, problems)):
        for kind, text in (image.problem for image in found if image.problem):
            problems.add(f"row {index}", f"images: {text}", ("images", kind))
        text = without_placeholders(row.text) if options.ignore_images else row.text
        if problem := placeholder_problem(text, len(found)):
            problems.add(f"row {index}", f"question: {problem}", ("question", "placeholders"))
        if not problems.count:
            files = tuple(image.file for image in found if image.file is not None)
            name = str(source.name if row.dataset is None else row.dataset)
            id = str(index) if row.id is None else str(row.id)
            text = place_images(text, len(files))
            yield _question(text, files, str(row.ground_truth), name, id, f"{source.path}: row {index}")
    if problems.count:
        raise UserError(problems.message(source.path, report.rows - rows_before))


def _rows(
    source: Source, images: RowImages, options: ReadingOptions, report: LoadReport, problems: Problems
) -> Iterator[tuple[tuple[int, QuestionRow], list[Reference]]]:
    """The rows with their places, and the images that each names. What is wrong goes into `problems`."""
    for index, raw in enumerate(source.rows()):
        report.rows += 1
        domain = source.domain_of(raw, options.domain_field)
        if domain is not None and isinstance(raw, dict):
            raw = raw | {"dataset": domain}
        elif options.domain_field is not None:
            report.without_domain[source.path] += 1
        row, wrong = check_row(QuestionRow, raw)
        for place, (kind, text) in wrong.items():
            problems.add(f"row {index}", f"{place}: {text}", (place, kind))
        if row is None:
            continue
        if row.ground_truth is None:
            report.left_out[source.path, UNJUDGED] += 1
            continue
        given = row.images if isinstance(row.images, list) else [row.images]
        yield (index, row), images.references([] if options.ignore_images else [one for one in given if one])


def _question(text: str, images: tuple[Path, ...], truth: str, domain: str, id: str | None, place: str) -> Question:
    asked = _digest(text, digest(*images))
    truth = final_answer(truth) or truth  # some data sets keep the whole solution there
    return Question(text, images, truth, domain, id, place, asked, _digest(domain, truth, asked))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
