"""Loads the rows of the three kinds of files, each field and image checked.

    rows = load_training_rows("data/train.json", image_root="data/images")

A file holds a list of objects (`.json`), one object per line (`.jsonl`) or a table (`.parquet`); keys that no field
has are left out. All wrong fields and images of a file go into one `UserError`, so that they can be fixed together.
"""

import difflib
import os
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from pydantic_core import ValidationError

from reweighting.data.images import FORMATS, check_images
from reweighting.data.row_files import iterate_rows, short_repr
from reweighting.data.schema import CandidateRow, EvaluationRow, MetaRow, Row, TrainingRow
from reweighting.errors import Problems, UserError

IMAGES_DECODED = 10_000  # of a file; of the others only the headers are read (`ProcessRewardModel.check`)
ROWS_AT_A_TIME = 256  # read before their images are checked
OUR_MESSAGES = ("one_per_candidate", "accuracy")  # error types whose text is whole
IMAGE_ALLOWED = f"allowed: an image ({', '.join(FORMATS)}), or null"


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
    return list(iterate_training_rows(path, image_root, min_domains=min_domains))


def iterate_training_rows(
    path: str | Path, image_root: str | Path | None = None, *, min_domains: int = 2
) -> Iterator[TrainingRow]:
    """Read as `load_training_rows`, one row after the other, in memory that grows with the number of images only.

    Rows behind a wrong one are checked and not given; the `UserError` comes at the end of the file and names them all.
    """
    domains = set()
    for row in _checked_rows(TrainingRow, path, image_root):
        domains.add(row.dataset)
        yield row
    if len(domains) < min_domains:
        raise UserError(
            f"{path}: dataset: found only {', '.join(map(short_repr, sorted(domains)))}, allowed: at least "
            f"{min_domains} domains. Weights compare domains: add rows of another, or fine-tune without reweighting."
        )


def load_meta_rows(path: str | Path, image_root: str | Path | None = None) -> list[MetaRow]:
    """Read and check a meta file, images as in `load_training_rows`.

    Raises:
        UserError: anything is wrong, also when all rows are true or all are false.
    """
    rows = list(_checked_rows(MetaRow, path, image_root))
    correct = sum(row.true_false for row in rows)
    if correct in (0, len(rows)):
        raise UserError(
            f"{path}: true_false: found {correct} true and {len(rows) - correct} false, allowed: at least one of "
            "each. One kind alone cannot tell good weights from bad ones: add rows of the other kind."
        )
    return rows


def load_evaluation_rows(path: str | Path, image_root: str | Path | None = None) -> list[EvaluationRow]:
    """Read and check a file of rows with step labels, images as in `load_training_rows`; or raise `UserError`."""
    return list(_checked_rows(EvaluationRow, path, image_root))


def load_candidate_rows(path: str | Path, image_root: str | Path | None = None) -> list[CandidateRow]:
    """Read and check a best-of-N file, images as in `load_training_rows`; or raise `UserError`."""
    return list(_checked_rows(CandidateRow, path, image_root))


def iterate_candidate_rows(
    path: str | Path, image_root: str | Path | None = None, *, decode_images: bool = True
) -> Iterator[CandidateRow]:
    """Read as `load_candidate_rows`, one row after the other, in memory that does not grow with the file.

    Rows behind a wrong one are checked and not given; the `UserError` comes at the end of the file and names them all.

    Args:
        path, image_root: as in `load_training_rows`.
        decode_images: False only looks whether the images are there, for a file that has been checked before.
    """
    return _checked_rows(CandidateRow, path, image_root, decode_images, remember=False)


def _checked_rows(
    row_type: type[AnyRow], path: str | Path, image_root: str | Path | None, decode: bool = True, remember: bool = True
) -> Iterator[AnyRow]:
    """The file's rows. `remember`: an image is checked once, wherever in the file it is named; else it may be again."""
    path = Path(path)
    if image_root is not None:
        image_root = Path(image_root)
        if not os.path.isdir(image_root):
            raise UserError(f"image_root {image_root}: no such folder. Name the folder of the images.")
        image_root = Path(os.path.realpath(image_root))

    count = 0
    problems = Problems()
    images: dict[str, tuple[Path | None, str]] = {}
    stream = iterate_rows(path, columns=_file_fields(row_type))
    while raw_rows := list(islice(stream, ROWS_AT_A_TIME)):
        if not remember:
            images.clear()
        new = (name for name in map(_image_path, raw_rows) if name and name not in images)
        images |= check_images(new, path.parent, image_root, decode and len(images) < IMAGES_DECODED)
        for index, raw in enumerate(raw_rows, count):
            image, image_problem = images.get(_image_path(raw) or "", (None, ""))
            row, row_problems = _check_fields(row_type, raw, {"index": index} | ({"image": image} if image else {}))
            if image_problem:
                text = f"found {short_repr(_image_path(raw))}, which {image_problem}, {IMAGE_ALLOWED}"
                # What the decoder says of a damaged file is different for each.
                row_problems.setdefault("image_path", (image_problem.partition(" (")[0], text))
            for field, (kind, text) in row_problems.items():
                problems.add(f"row {index}", f"{field}: {text}", (field.partition("[")[0], kind))
            if row is not None and not problems.count:
                yield row
        count += len(raw_rows)
    if problems.count:
        head = f"{path}: {problems.count} problem{'s' * (problems.count > 1)} in {count} row{'s' * (count > 1)}"
        raise UserError("\n".join([head, *(f"{path}: {line}" for line in problems.lines())]))


def _check_fields(row_type: type[AnyRow], raw: Any, found: dict) -> tuple[AnyRow | None, dict[str, tuple[str, str]]]:
    """The row, or None and what is wrong with it: {field: (kind, text)}. found: the fields that the file does not give.

    Problems of one field and kind can share a line.
    """
    fields = _file_fields(row_type)
    if not isinstance(raw, dict):
        required = ", ".join(name for name, is_required in fields.items() if is_required)
        return None, {"the row": ("type", f"found {short_repr(raw)}, allowed: an object with the fields {required}")}
    misspelt = _misspelt(row_type, tuple(raw))
    problems = {
        short_repr(key)[1:-1]: ("unknown", f"unknown field, did you mean {name}?") for key, name in misspelt.items()
    }
    row = None
    try:
        row = row_type.model_validate({name: raw[name] for name in fields if name in raw} | found)
    except ValidationError as invalid:
        for error in invalid.errors(include_url=False):
            name, *inner = map(str, error["loc"])
            if error["type"] == "missing" and name in misspelt.values():
                continue
            # A field of several types has one error for each type: the first one tells it all.
            place = f"{name}[{inner[0]}]" if inner and inner[0].isdecimal() else name
            text = _described(error, row_type.model_fields[name].description or "")
            problems.setdefault(place, (error["type"], text))
    return row, problems


def _described(error: Any, allowed: str) -> str:
    """One of pydantic's errors in our words."""
    if error["type"] in OUR_MESSAGES:
        return error["msg"]
    if error["type"] == "missing":
        return f"missing, allowed: {allowed}"
    value = error["input"]
    # Named in words, since the character may stand where a long text is cut.
    broken = isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value)
    note = " (with half of a surrogate pair in it)" if broken else ""
    return f"found {short_repr(value)}{note}, allowed: {allowed}"


@lru_cache(maxsize=64)  # nearly all rows of a file have the same keys
def _misspelt(row_type: type[Row], keys: tuple[str, ...]) -> dict[str, str]:
    """Unknown keys that look like an absent field, with that field's name."""
    fields = _file_fields(row_type)
    unknown = {key.lower(): key for key in keys if key not in fields}
    misspelt = {}
    for name, required in fields.items():
        if name not in keys:
            # A guess for a required field only explains an error; one for an optional field is the error,
            # so people's own columns (`idx`, `uid`, `time`) must not fall under it.
            close = difflib.get_close_matches(name, unknown, n=1, cutoff=0.6 if required else 0.9)
            misspelt.update((unknown[key], name) for key in close)
    return misspelt


@lru_cache
def _file_fields(row_type: type[Row]) -> dict[str, bool]:
    """The fields read from the file, and whether each is required."""
    fields = row_type.model_fields.items()
    return {name: field.is_required() for name, field in fields if name not in ("image", "index")}


def _image_path(raw: Any) -> str | None:
    """The image that a row names, if it names one, whether or not the rest of the row is valid."""
    value = raw.get("image_path") if isinstance(raw, dict) else None
    return value if isinstance(value, str) and value else None
