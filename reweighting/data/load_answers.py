"""Loads answers in any format that a reader knows, each field and image checked.

    for answer in iterate_answers(Source("processbench/gsm8k.json"), None, options, report): ...
    print(report.notes())

What cannot be used is left out and counted; what is wrong goes into one `UserError`, so that it can be fixed together.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reweighting.data.answer_values import answers_match
from reweighting.data.answers import final_answer
from reweighting.data.canonical import CanonicalRow, LeftOut
from reweighting.data.placeholders import place_images, placeholder_problem, without_placeholders
from reweighting.data.readers import READERS, find_reader
from reweighting.data.readers.base import RawRow, ReadingOptions
from reweighting.data.row_checks import FieldProblems, check_fields, check_row, file_fields
from reweighting.data.row_files import short_repr
from reweighting.data.row_images import FoundImage, Reference, RowImages, image_root_folder
from reweighting.data.sources import Source
from reweighting.errors import Problems, UserError

CANONICAL = "canonical"
PUBLISHED = {  # formats with a loader of their own, in load_rows.py, and their required fields
    "candidates": {"input", "candidates"},
    "training": {"input", "add"},
    "meta": {"input", "true_false"},
}
FORMATS = (CANONICAL, *PUBLISHED, *READERS)


@dataclass(frozen=True)
class Answer:
    """An answer to a question, with its images found.

    Attributes:
        question, images: what is asked.
        steps: its steps, [S].
        labels: of the steps, in [0, 1], [S], None where a step is unlabelled.
        domain: the name of its domain.
        final_answer_correct: whether the row says that the whole answer is correct, None if it does not say.
        id, ground_truth: as the row has them.
        answer: the final answer, as the row has it, None if it does not say.
        index, source: the row, from 0, and its file.
        image_names: what the row calls its images.
        times: how many Monte Carlo rollouts each label is the mean of, [S], None where that is not known; empty if it
            is known of none.
    """

    question: str
    images: tuple[Path, ...]
    steps: tuple[str, ...]
    labels: tuple[float | None, ...]
    domain: str
    final_answer_correct: bool | None
    id: int | str | None
    answer: str | None
    ground_truth: Any
    index: int
    source: str
    image_names: tuple[str, ...] = ()
    times: tuple[float | None, ...] = ()

    def correct(self) -> bool | None:
        """Return whether the whole answer is correct, None if that cannot be told.

        It is what the row says, or else whether the final answer that it has or states equals the ground truth.
        """
        if self.final_answer_correct is not None or self.ground_truth is None:
            return self.final_answer_correct
        truth = str(self.ground_truth)
        stated = final_answer("\n".join(self.steps)) if self.answer is None else self.answer
        return answers_match(stated, final_answer(truth) or truth)


@dataclass
class LoadReport:
    """What has been read, and what has been left out.

    Attributes:
        rows, answers: how many.
        left_out: how many rows or answers for each reason, by file.
        missing_images: how many answers name an image that cannot be read, where that is no error.
        first_missing: the first of them, and why.
        without_domain: how many rows lack the field that --domain_field names, by file.
        contradicting: how many questions stand there before with another correct answer, by file.
        formats: of each file.
    """

    rows: int = 0
    answers: int = 0
    left_out: Counter[tuple[str, str]] = field(default_factory=Counter)
    missing_images: int = 0
    first_missing: str | None = None
    without_domain: Counter[str] = field(default_factory=Counter)
    contradicting: Counter[str] = field(default_factory=Counter)
    formats: dict[str, str] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """Describe what has been left out, a line for each reason."""
        places: dict[str, list[tuple[str, int]]] = {}
        for (source, reason), count in (+self.left_out).items():  # without those that are 0
            places.setdefault(reason, []).append((source, count))
        lines = []
        for reason, found in places.items():
            total = sum(count for _, count in found)
            where = found[0][0] if len(found) == 1 else f"{len(found)} files, the first of them {found[0][0]}"
            lines.append(f"{where}: {total} {'answer is' if total == 1 else 'answers are'} left out: {reason}")
        for source, count in self.without_domain.items():
            lines.append(f"{source}: {count} rows lack the field that --domain_field names: their domain is what the "
                         "format has, or the file's name")  # fmt: skip
        for source, count in (+self.contradicting).items():
            stand = "question stands" if count == 1 else "questions stand"
            lines.append(f"{source}: {count} {stand} there before with another ground_truth: both are used, and one of "
                         "them is incorrect")  # fmt: skip
        return lines


def format_of(source: Source) -> str | None:
    """Return the name of a source's format: the one that the user named, or the one that its first row has.

    Raises:
        UserError: the source cannot be read, or there is no format of this name.
    """
    if source.format is not None:
        if source.format not in FORMATS:
            raise UserError(f"--format {short_repr(source.format)}: allowed: {', '.join(FORMATS)}")
        return source.format
    return format_of_row(next(source.rows()))


def format_of_row(raw: Any) -> str | None:
    """Return the name of the format that a row has, None if it has none that is known."""
    if isinstance(raw, dict):
        for name, required in PUBLISHED.items():
            if required <= set(raw):
                return name
        if {"question", "steps"} <= set(raw):
            return CANONICAL
    reader = find_reader(raw)
    return None if reader is None else reader.name


def iterate_answers(
    source: Source,
    image_root: str | Path | None,
    options: ReadingOptions,
    report: LoadReport,
    *,
    require_images: bool = True,
    decode: bool = True,
) -> Iterator[Answer]:
    """Read and check the answers of a source whose format is canonical or a reader's.

    Args:
        source: the source.
        image_root: the folder that holds all images; None: relative paths are looked for beside the file, then in the
            working folder.
        options: what the format leaves open.
        report: is filled as the answers are read.
        require_images: an image that is not there is an error; else it is counted and left out.
        decode: whether to decode the images, or only to see whether they are there.

    Yields:
        The answers in the order of the rows. Rows behind a wrong one are checked and not given.

    Raises:
        UserError: at the end of the source, naming all that is wrong in it.
    """
    name = format_of(source)
    reader = None if name == CANONICAL else READERS[str(name)]
    images = RowImages(source.folder, image_root_folder(image_root), decode)
    report.formats[source.path] = str(name)
    problems, rows_before = Problems(), report.rows
    rows = _rows(source, reader, images, options, report, problems)
    for row, found in images.find(rows):
        broken = [image.problem for image in found if image.problem]
        for kind, text in broken if require_images else ():
            problems.add(f"row {row.index}", f"images: {text}", ("images", kind))
        report.missing_images += bool(broken)
        if broken and report.first_missing is None:
            report.first_missing = f"{source.path}: row {row.index}: {broken[0][1]}"
        if text := placeholder_problem(row.question, len(found)):
            problems.add(f"row {row.index}", f"question: {text}", ("question", "placeholders"))
        if not problems.count:
            try:
                answer = _answer(row, found, source, options)
            except LeftOut as left_out:
                report.left_out[source.path, str(left_out)] += 1
                continue
            report.answers += 1
            yield answer
    if problems.count:
        raise UserError(problems.message(source.path, report.rows - rows_before))


def _rows(
    source: Source,
    reader: type[RawRow] | None,
    images: RowImages,
    options: ReadingOptions,
    report: LoadReport,
    problems: Problems,
) -> Iterator[tuple[CanonicalRow, list[Reference]]]:
    """The canonical rows in a source and the images that each names. What is wrong goes into `problems`."""
    joins = reader is not None and reader.joins_questions
    questions = _questions(options.questions_json_file) if joins else {}
    for index, raw in enumerate(source.rows(_columns(reader, options))):
        report.rows += 1
        try:
            found, row_problems = _read(reader, _joined(raw, questions), source, options, index, report)
        except LeftOut as left_out:
            report.left_out[source.path, str(left_out)] += 1
            continue
        for row in found:
            references = images.references([] if options.ignore_images else row.image_references)
            if options.ignore_images:
                row = row.model_copy(update={"question": without_placeholders(row.question)})
            if any(reference.is_stored for reference in references):  # the row need not hold them any more
                row = row.model_copy(update={"images": None, "image_path": None})
            yield row, references
        for place, (kind, text) in row_problems.items():
            problems.add(f"row {index}", f"{place}: {text}", (place.partition("[")[0], kind))


def _read(
    reader: type[RawRow] | None, raw: Any, source: Source, options: ReadingOptions, index: int, report: LoadReport
) -> tuple[list[CanonicalRow], FieldProblems]:
    """The canonical rows in a row, and what is wrong with it. Raises LeftOut."""
    if reader is None:
        fields, problems = [raw], {}
    else:
        row, problems = check_row(reader, raw)
        if row is None:
            return [], problems
        if not reader.matches(raw):
            return [], {"the row": ("format", f"found {short_repr(raw)}, allowed: a row of the format {reader.name}")}
        fields = row.answers(options)
    domain = source.domain_of(raw, options.domain_field)
    if domain is None and options.domain_field is not None:
        report.without_domain[source.path] += 1
    found = []
    for entry in fields:
        given: dict[str, Any] = {"index": index}
        if domain is not None:
            given["dataset"] = domain
        canonical, entry_problems = check_fields(CanonicalRow, entry, given)
        problems = entry_problems | problems
        if canonical is not None:
            found.append(canonical)
    return found, problems


def _answer(row: CanonicalRow, images: list[FoundImage], source: Source, options: ReadingOptions) -> Answer:
    """A checked row as an answer. Raises LeftOut."""
    steps, labels, times = row.labelled_steps(options.after_first_error)
    files = tuple(image.file for image in images if image.file is not None)
    return Answer(
        place_images(row.question, len(images)),
        files,
        tuple(steps),
        tuple(labels),
        source.name if row.dataset is None else str(row.dataset),
        row.final_answer_correct,
        row.id,
        row.answer,
        row.ground_truth,
        row.index,
        source.path,
        tuple(image.name for image in images),
        tuple(times),
    )


def _columns(reader: type[RawRow] | None, options: ReadingOptions) -> set[str] | None:
    """The columns of a table that a format has; None where any may be one."""
    row_type = CanonicalRow if reader is None else reader
    return None if row_type.model_config.get("extra") == "allow" else {*file_fields(row_type), *options.domain_columns}


def _questions(path: str | None) -> dict[str, dict[str, Any]]:
    """The rows of the questions' file by id, with paths of images that start from there."""
    questions = {}
    if path is not None:
        source = Source(path)
        for raw in source.rows():
            if isinstance(raw, dict) and "id" in raw:
                for name in ("image", "images", "image_path"):
                    if name in raw:
                        raw[name] = _absolute(raw[name], source.folder)
                if questions.setdefault(str(raw["id"]), raw).get("question") != raw.get("question"):
                    raise UserError(f"--questions_json_file {path}: two different questions have the id "
                                    f"{short_repr(raw['id'])}. Give each its own.")  # fmt: skip
        if not questions:
            raise UserError(f"--questions_json_file {path}: no row has an `id` to join answers with.")
    return questions


def _absolute(images: Any, folder: Path) -> Any:
    """The images of a question, with absolute paths where they start from its file's folder."""
    if isinstance(images, list):
        return [_absolute(image, folder) for image in images]
    is_there = isinstance(images, str) and images and os.path.exists(folder / images)
    return str((folder / images).absolute()) if is_there else images


def _joined(raw: Any, questions: Mapping[str, dict[str, Any]]) -> Any:
    """The row with the fields of its question. Raises LeftOut if it has none."""
    if not questions or not isinstance(raw, dict) or raw.get("question"):
        return raw
    question = questions.get(str(raw.get("id")))
    if question is None:
        raise LeftOut("its id is in no row of the questions' file")
    return question | {name: value for name, value in raw.items() if value is not None}
