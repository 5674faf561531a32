"""Loads the rows of the three kinds of files, each field and image checked.

    rows = load_training_rows("data/train.json", image_root="data/images")

A file holds a list of objects (`.json`), one object per line (`.jsonl`) or a table (`.parquet`); keys that no field
has are left out. All wrong fields and images of a file go into one `UserError`, so that they can be fixed together.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

from reweighting.data.placeholders import placeholder_problem, without_placeholders
from reweighting.data.readers.base import ReadingOptions
from reweighting.data.row_checks import check_fields, file_fields
from reweighting.data.row_files import short_repr
from reweighting.data.row_images import Reference, RowImages, image_root_folder
from reweighting.data.schema import CandidateRow, EvaluationRow, MetaRow, Row, TrainingRow
from reweighting.data.sources import Source
from reweighting.data.steps import split_response
from reweighting.errors import Problems, UserError

DEFAULT_OPTIONS = ReadingOptions()

AnyRow = TypeVar("AnyRow", bound=Row)


def load_training_rows(
    path: str | Path, image_root: str | Path | None = None, *, min_domains: int = 2
) -> list[TrainingRow]:
    """Read and check a training file.

    Args:
        path: the file.
        image_root: the folder that holds all images; None: relative paths are looked for beside the file, then in the
            working folder.
        min_domains: how many distinct `dataset` values there must be at least.

    Returns:
        The rows in file order.

    Raises:
        UserError: anything is wrong in the file or its images.
    """
    rows = list(iterate_training_rows(path, image_root))
    check_domains({row.dataset for row in rows}, min_domains, str(path))
    return rows


def check_domains(domains: Collection[str], min_domains: int, path: str) -> None:
    """Check that there are domains to compare.

    Raises:
        UserError: there are fewer than `min_domains`.
    """
    if len(domains) < min_domains:
        raise UserError(
            f"{path}: dataset: found only {', '.join(map(short_repr, sorted(domains)))}, allowed: at least "
            f"{min_domains} domains. Weights compare domains: add rows of another, or fine-tune without reweighting."
        )


def iterate_training_rows(
    path: str | Path | Source, image_root: str | Path | None = None, options: ReadingOptions = DEFAULT_OPTIONS
) -> Iterator[TrainingRow]:
    """Read as `load_training_rows`, one row after the other, in memory that grows with the number of images only.

    Rows behind a wrong one are checked and not given; the `UserError` comes at the end of the file and names them all.
    """
    return _checked_rows(TrainingRow, path, image_root, options)


def load_meta_rows(
    path: str | Path | Source,
    image_root: str | Path | None = None,
    options: ReadingOptions = DEFAULT_OPTIONS,
    *,
    one_class: bool = False,
) -> list[MetaRow]:
    """Read and check a meta file, images as in `load_training_rows`.

    Args:
        path, image_root, options: as in `iterate_training_rows`.
        one_class: whether all rows may be true, or all false.

    Raises:
        UserError: anything is wrong.
    """
    rows = list(_checked_rows(MetaRow, path, image_root, options))
    correct = sum(row.true_false for row in rows)
    if correct in (0, len(rows)) and not one_class:
        raise UserError(
            f"{path}: true_false: found {correct} true and {len(rows) - correct} false, allowed: at least one of "
            "each. One kind alone cannot tell good weights from bad ones: add rows of the other kind."
        )
    return rows


def load_evaluation_rows(
    path: str | Path | Source, image_root: str | Path | None = None, options: ReadingOptions = DEFAULT_OPTIONS
) -> list[EvaluationRow]:
    """Read and check a file of rows with step labels, images as in `load_training_rows`; or raise `UserError`."""
    return list(_checked_rows(EvaluationRow, path, image_root, options))


def load_candidate_rows(path: str | Path, image_root: str | Path | None = None) -> list[CandidateRow]:
    """Read and check a best-of-N file, images as in `load_training_rows`; or raise `UserError`."""
    return list(_checked_rows(CandidateRow, path, image_root))


def iterate_candidate_rows(
    path: str | Path | Source,
    image_root: str | Path | None = None,
    options: ReadingOptions = DEFAULT_OPTIONS,
    *,
    decode_images: bool = True,
) -> Iterator[CandidateRow]:
    """Read as `load_candidate_rows`, one row after the other, in memory that does not grow with the file.

    Rows behind a wrong one are checked and not given; the `UserError` comes at the end of the file and names them all.

    Args:
        path, image_root, options: as in `iterate_training_rows`.
        decode_images: False only looks whether the images are there, for a file that has been checked before.
    """
    for row in _checked_rows(CandidateRow, path, image_root, options, decode_images, remember=False):
        if options.step_separator is not None:
            steps = [split_response(text, options.step_separator) for text in row.candidates]
            row = row.model_copy(update={"candidate_steps": steps})
        yield row


def _checked_rows(
    row_type: type[AnyRow],
    source: str | Path | Source,
    image_root: str | Path | None,
    options: ReadingOptions = DEFAULT_OPTIONS,
    decode: bool = True,
    remember: bool = True,
) -> Iterator[AnyRow]:
    """The rows of a source. `decode` and `remember`: as in `RowImages`."""
    source = source if isinstance(source, Source) else Source(str(source))
    images = RowImages(source.folder, image_root_folder(image_root), decode, remember)
    problems, index = Problems(), 0
    raw_rows = source.rows({*file_fields(row_type), *options.domain_columns})
    named = (_own_fields(raw, source, options, images) for raw in raw_rows)
    for index, (raw, found) in enumerate(images.find(named)):
        files = tuple(image.file for image in found if image.file is not None)
        row, row_problems = check_fields(row_type, raw, {"index": index, "image_files": files})
        for image in found:
            if image.problem:
                row_problems.setdefault("image_path", image.problem)
        if row is not None and (text := placeholder_problem(row.asked(options.step_separator), len(found))):
            row_problems["input"] = ("placeholders", text)
        for field, (kind, text) in row_problems.items():
            problems.add(f"row {index}", f"{field}: {text}", (field.partition("[")[0], kind))
        if row is not None and not problems.count:
            yield row
    if problems.count:
        raise UserError(problems.message(source.path, index + 1))


def _own_fields(raw: Any, source: Source, options: ReadingOptions, images: RowImages) -> tuple[Any, list[Reference]]:
    """The row with the domain that the user asked for, and the images that it names."""
    if not isinstance(raw, dict):
        return raw, []
    if source.domain is not None or options.domain_field is not None:
        raw = raw | {"dataset": source.domain_of(raw, options.domain_field)}
    if options.ignore_images:
        asked = raw.get("input")
        shown = {"input": without_placeholders(asked)} if isinstance(asked, str) else {}
        return raw | {"image_path": None} | shown, []
    value = raw.get("image_path")
    if not isinstance(value, list | str | bytes | dict) or not value:
        return raw, []
    named = [one for one in (value if isinstance(value, list) else [value]) if one]
    references = images.references(named)
    if not isinstance(value, str) and all(reference.problem is None for reference in references):
        raw = raw | {"image_path": [reference.path for reference in references]}
    return raw, references
