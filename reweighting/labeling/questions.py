"""The questions that a policy answers: with their images and their correct answer.

    for question in iterate_questions(sources, None, ReadingOptions(), LoadReport()): ...

Rows have `question` and `ground_truth` (or `answer`), and optionally `images`, `options`, `dataset` and `id`. A file of
answers, in any format that a reader knows, gives the questions that it answers.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from reweighting.data.answers import final_answer
from reweighting.data.load_answers import ROWS_AT_A_TIME, LoadReport, format_of
from reweighting.data.published_answers import iterate_any_answers
from reweighting.data.readers.base import Domain, OptionalId, ReadingOptions, Text
from reweighting.data.row_checks import check_row
from reweighting.data.row_images import RowImages, image_root_folder
from reweighting.data.schema import AnyText, Scalar
from reweighting.data.sources import Source
from reweighting.errors import Problems, UserError

UNJUDGED = "its question has no ground_truth to judge answers by"


@dataclass(frozen=True)
class Question:
    """A question to the policy.

    Attributes:
        text: the question, with its options.
        images: their files, in order.
        ground_truth: the correct final answer.
        domain: the name of its domain.
        id: as the row has it.
        key: tells it from other questions, on every machine.
    """

    text: str
    images: tuple[Path, ...]
    ground_truth: str
    domain: str
    id: str | None
    key: str


class QuestionRow(BaseModel):
    """A row that holds a question and its correct answer."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, regex_engine="python-re")

    question: Text
    ground_truth: Scalar = Field(
        validation_alias=AliasChoices("ground_truth", "correct_answer", "answer"), description="the correct answer"
    )
    options: list[AnyText] | None = Field(None, description="a list of texts, or null")
    images: Any = Field(None, validation_alias=AliasChoices("images", "image_path", "image"))
    dataset: Domain = Field(None, validation_alias=AliasChoices("dataset", "subject", "data_source"))
    id: OptionalId = None

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
    for source in sources:
        known = format_of(source)
        found = _from_answers if known else _from_rows
        for question in found(source, image_root, options, report):
            if question.key not in seen:
                seen.add(question.key)
                yield question


def _from_answers(
    source: Source, image_root: str | Path | None, options: ReadingOptions, report: LoadReport
) -> Iterator[Question]:
    """The questions of a file of answers."""
    for answer in iterate_any_answers(source, image_root, options, report):
        if answer.ground_truth is None:
            report.left_out[source.path, UNJUDGED] += 1
            continue
        truth = str(answer.ground_truth)
        id = None if answer.id is None else str(answer.id)
        yield _question(answer.question, answer.images, final_answer(truth) or truth, answer.domain, id)


def _from_rows(
    source: Source, image_root: str | Path | None, options: ReadingOptions, report: LoadReport
) -> Iterator[Question]:
    """The questions of rows that hold a question and its correct answer."""
    images = RowImages(source.folder, image_root_folder(image_root))
    problems, count, stream = Problems(), 0, source.rows()
    while block := list(islice(stream, ROWS_AT_A_TIME)):
        rows, first = [], count
        for raw in block:
            index, count = count, count + 1
            row, wrong = check_row(QuestionRow, raw)
            for place, (kind, text) in wrong.items():
                problems.add(f"row {index}", f"{place}: {text}", (place, kind))
            if row is None:
                continue
            if row.ground_truth is None:
                report.left_out[source.path, UNJUDGED] += 1
                continue
            given = row.images if isinstance(row.images, list) else [row.images]
            references = images.references([] if options.ignore_images else [one for one in given if one])
            rows.append((index, row, source.domain_of(raw, options.domain_field), references))
        for (index, row, domain, _), found in zip(rows, images.find([entry[3] for entry in rows]), strict=True):
            for kind, text in (image.problem for image in found if image.problem):
                problems.add(f"row {index}", f"images: {text}", ("images", kind))
            if not problems.count:
                files = tuple(image.file for image in found if image.file is not None)
                name = domain if domain is not None else row.dataset if row.dataset is not None else source.name
                id = str(first + index) if row.id is None else str(row.id)
                yield _question(row.text, files, str(row.ground_truth), str(name), id)
    report.rows += count
    if problems.count:
        raise UserError(problems.message(source.path, count))


def _question(text: str, images: tuple[Path, ...], truth: str, domain: str, id: str | None) -> Question:
    whole = "\0".join((domain, text, truth, *(image.name for image in images)))
    return Question(text, images, truth, domain, id, hashlib.sha256(whole.encode()).hexdigest())
