"""What a row is: the schema and the checks of the kinds of files.

    rows = load_training_rows("data/train.json", image_root="data/images")

A file holds a list of objects (`.json`), one object per line (`.jsonl`) or a table (`.parquet`); keys that no field
has are left out. All wrong fields and images of a file go into one `UserError`, so that they can be mended in one go.
"""

import difflib
import os
import stat
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TypeVar

from PIL import Image, UnidentifiedImageError
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError, ValidationError

from reweighting.errors import LISTED_PROBLEMS, UserError
from reweighting.row_stream import iterate_rows, shown

IMAGE_THREADS = 4
IMAGES_DECODED = 10_000  # of a file; of the others only the heads are looked at (`ProcessRewardModel.check`)
ROWS_AT_A_TIME = 256  # read before their images are checked

# A field's description is also what an error message shows after "allowed:".
# Encoding fails, as it should, on half of a surrogate pair, which JSON can carry.
AnyText = Annotated[str, AfterValidator(lambda text: text.encode().decode())]
Text = Annotated[AnyText, Field(pattern=r"\S", description="text that is not blank")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
OptionalId = Annotated[int | Text | None, Field(description="a whole number, non-blank text, or null")]
OptionalCount = Annotated[Finite | None, Field(ge=0, description="a number from 0 up, or null")]
Scalar = Annotated[AnyText | bool | int | Finite | None, Field(description="finite number, text, bool, null")]


class Row(BaseModel):
    """What all rows have. `image` and `index` are not read from the file: the loader sets them."""

    # Rust's regular expressions count fewer characters as blank than `str.strip`, which later code uses.
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, regex_engine="python-re")

    input: Text
    image_path: AnyText | None = Field(description='the path of an image file, null or ""')
    image: Path | None = Field(None, description="the checked image file, symlinks resolved; None: no image")
    index: int = Field(0, description="position in the file, from 0")


class TrainingRow(Row):
    """One reasoning step with its Monte Carlo accuracy, in [0, 1]."""

    add: Text
    dataset: Text
    accuracy: float = Field(ge=0, le=1, allow_inf_nan=False, description="a number from 0 to 1")
    id: OptionalId = None
    sid: OptionalId = None
    ground_truth: Scalar = None
    score: OptionalCount = None
    times: OptionalCount = None


class EvaluationRow(TrainingRow):
    """A training row that may say whether its last step is right, which its accuracy only suggests."""

    correct: bool | None = Field(None, description="true, false or null")


class MetaRow(Row):
    """One whole response and whether its final answer is right."""

    true_false: bool = Field(description="true or false")
    id: OptionalId = None


class CandidateRow(Row):
    """One question with the responses to choose from; `answers` and `true_false` go by response."""

    id: int | Text = Field(description="a whole number, or text that is not blank")
    candidates: list[Text] = Field(min_length=1, description="a list of texts, at least one, none blank")
    # An answer may be blank: not every response states one.
    answers: list[AnyText] | None = Field(None, description="a list of texts, one per candidate, or null")
    true_false: list[bool] | None = Field(None, description="a list of bools, one per candidate, or null")
    ground_truth: Scalar = None

    @field_validator("answers", "true_false")
    @classmethod
    def _one_per_candidate(cls, value: list | None, info: ValidationInfo) -> list | None:
        candidates = info.data.get("candidates")  # absent when it has an error of its own
        if value is not None and candidates is not None and len(value) != len(candidates):
            allowed = f"one per candidate, that is {len(candidates)}"
            raise PydanticCustomError("one_per_candidate", f"found {len(value)} of them, allowed: {allowed}")
        return value


AnyRow = TypeVar("AnyRow", bound=Row)


def load_training_rows(
    path: str | Path, image_root: str | Path | None = None, *, min_domains: int = 2
) -> list[TrainingRow]:
    """Reads and checks a training file.

    `image_root` is the folder that holds all images; without it, relative paths are looked for beside the
    file, then in the working folder. `min_domains` is the least number of distinct `dataset` values.
    Raises `UserError` for anything wrong in the file or its images.
    """
    return list(iterate_training_rows(path, image_root, min_domains=min_domains))


def iterate_training_rows(
    path: str | Path, image_root: str | Path | None = None, *, min_domains: int = 2
) -> Iterator[TrainingRow]:
    """As `load_training_rows`, but one row after the other, in memory that grows with the number of images only.

    Rows behind a wrong one are checked and not given; the `UserError` comes at the end of the file and names them all.
    """
    domains = set()
    for row in _checked_rows(TrainingRow, path, image_root):
        domains.add(row.dataset)
        yield row
    if len(domains) < min_domains:
        raise UserError(
            f"{path}: dataset: found only {', '.join(map(shown, sorted(domains)))}, allowed: at least {min_domains} "
            "domains. Weights compare domains: add rows of another, or fine-tune without reweighting."
        )


def load_meta_rows(path: str | Path, image_root: str | Path | None = None) -> list[MetaRow]:
    """Reads and checks a meta file, images as in `load_training_rows`.

    Raises `UserError` for anything wrong, also when all rows are true or all are false.
    """
    rows = list(_checked_rows(MetaRow, path, image_root))
    right = sum(row.true_false for row in rows)
    if right in (0, len(rows)):
        raise UserError(
            f"{path}: true_false: found {right} true and {len(rows) - right} false, allowed: at least one of "
            "each. From one kind alone nothing can be told apart: add rows of the other kind."
        )
    return rows


def load_evaluation_rows(path: str | Path, image_root: str | Path | None = None) -> list[EvaluationRow]:
    """Reads and checks a file of rows with step labels, images as in `load_training_rows`; or raises `UserError`."""
    return list(_checked_rows(EvaluationRow, path, image_root))


def load_candidate_rows(path: str | Path, image_root: str | Path | None = None) -> list[CandidateRow]:
    """Reads and checks a best-of-N file, images as in `load_training_rows`; or raises `UserError`."""
    return list(_checked_rows(CandidateRow, path, image_root))


def iterate_candidate_rows(
    path: str | Path, image_root: str | Path | None = None, *, decode_images: bool = True
) -> Iterator[CandidateRow]:
    """As `load_candidate_rows`, but one row after the other, in memory that does not grow with the file.

    Rows behind a wrong one are checked and not given; the `UserError` comes at the end of the file and names them all.
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

    count = total = 0
    problems: list[str] = []
    images: dict[str, Path | str] = {}
    stream = iterate_rows(path)
    while raw_rows := list(islice(stream, ROWS_AT_A_TIME)):
        if not remember:
            images.clear()
        new = (name for name in map(_image_path, raw_rows) if name and name not in images)
        images |= _check_images(new, path.parent, image_root, decode and len(images) < IMAGES_DECODED)
        for index, raw in enumerate(raw_rows, count):
            image = images.get(_image_path(raw))
            found = {"index": index} if image is None or isinstance(image, str) else {"index": index, "image": image}
            row, row_problems = _check_fields(row_type, raw, found)
            if isinstance(image, str):
                row_problems.setdefault("image_path", image)
            total += len(row_problems)
            problems += (f"{path}: row {index}: {field}: {text}" for field, text in row_problems.items())
            del problems[LISTED_PROBLEMS:]
            if not total:
                yield row
        count += len(raw_rows)
    if total:
        head = f"{path}: {total} problem{'s' * (total > 1)} in {count} row{'s' * (count > 1)}"
        cut = [f"... and {total - LISTED_PROBLEMS} more"] if total > LISTED_PROBLEMS else []
        raise UserError("\n".join([head, *problems, *cut]))


def _check_fields(row_type: type[AnyRow], raw: Any, found: dict) -> tuple[AnyRow | None, dict[str, str]]:
    """The row, or None and what is wrong with it, by field. found: the fields that are not from the file."""
    fields = _file_fields(row_type)
    if not isinstance(raw, dict):
        required = ", ".join(name for name, is_required in fields.items() if is_required)
        return None, {"the row": f"found {shown(raw)}, allowed: an object with the fields {required}"}
    misspelt = _misspelt(row_type, tuple(raw))
    problems = {shown(key)[1:-1]: f"unknown field, did you mean {name}?" for key, name in misspelt.items()}
    row = None
    try:
        row = row_type.model_validate({name: raw[name] for name in fields if name in raw} | found)
    except ValidationError as invalid:
        for error in invalid.errors(include_url=False):
            name, *inner = error["loc"]
            if error["type"] == "missing" and name in misspelt.values():
                continue
            # A field of several types has one error for each type: the first one tells it all.
            place = f"{name}[{inner[0]}]" if inner and isinstance(inner[0], int) else name
            problems.setdefault(place, _described(error, row_type.model_fields[name].description))
    return row, problems


def _described(error: Any, allowed: str) -> str:
    if error["type"] == "one_per_candidate":
        return error["msg"]
    if error["type"] == "missing":
        return f"missing, allowed: {allowed}"
    value = error["input"]
    # Said in words, since the character may stand where a long text is cut.
    broken = isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value)
    note = " (with half of a surrogate pair in it)" if broken else ""
    return f"found {shown(value)}{note}, allowed: {allowed}"


@lru_cache(maxsize=64)  # nearly all rows of a file have the same keys
def _misspelt(row_type: type[Row], keys: tuple[str, ...]) -> dict[str, str]:
    """Unknown keys that look like an absent field, with that field's name."""
    fields = _file_fields(row_type)
    unknown = {key.lower(): key for key in keys if key not in fields}
    misspelt = {}
    for name, required in fields.items():
        if name not in keys:
            # A guess for a required field only explains an error; one for an optional field is the error,
            # so people's own columns (`idx`, `uid`) must not fall under it.
            close = difflib.get_close_matches(name, unknown, n=1, cutoff=0.6 if required else 0.85)
            misspelt.update((unknown[key], name) for key in close)
    return misspelt


@lru_cache
def _file_fields(row_type: type[Row]) -> dict[str, bool]:
    """The fields read from the file, and whether each is required."""
    fields = row_type.model_fields.items()
    return {name: field.is_required() for name, field in fields if name not in ("image", "index")}


def _image_path(raw: Any) -> str | None:
    """The image that a row names, if it names one, whether or not the rest of the row is right."""
    value = raw.get("image_path") if isinstance(raw, dict) else None
    return value if isinstance(value, str) and value else None


def _check_images(names: Iterable[str], json_folder: Path, root: Path | None, decode: bool) -> dict[str, Path | str]:
    """For each `image_path` the file, decoded once if asked for, or a text that says what is wrong with it."""
    located = {name: _locate(name, json_folder, root) for name in dict.fromkeys(names)}
    files = list(dict.fromkeys(file for file in located.values() if isinstance(file, Path))) if decode else []

    # Loading Pillow's formats inside the threads is a race: the loser may not know TIFF, say.
    Image.init()
    # Filters hold for all threads, so they are set here; `_decode` itself refuses what Pillow only warns of.
    with warnings.catch_warnings(), ThreadPoolExecutor(IMAGE_THREADS) as pool:
        warnings.simplefilter("ignore")
        reasons = dict(zip(files, pool.map(_decode, files), strict=True))

    for name, file in located.items():
        if reason := file if isinstance(file, str) else reasons.get(file):
            located[name] = f"found {shown(name)}, {reason}, allowed: an image that Pillow can read, or null"
    return located


def _locate(name: str, json_folder: Path, root: Path | None) -> Path | str:
    """The file with symlinks resolved, or why there is none."""
    folders = [json_folder, Path.cwd()] if root is None else [root]
    try:
        for folder in folders:
            file = _resolved(os.path.join(folder, name))
            if root is not None and not Path(file).is_relative_to(root):
                return f"which leads outside {root}"
            if os.path.isfile(file):
                return Path(file)
    except ValueError:  # a NUL character, or one that file names cannot hold
        return "which cannot be a path"
    where = "" if os.path.isabs(name) else " in " + " or ".join(map(str, folders))
    return f"which is no file{where}"


def _resolved(path: str) -> str:
    """As os.path.realpath, which asks for every folder on the way each time. Raises ValueError for what is no path."""
    folder, name = os.path.split(path)
    try:
        plain = stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        plain = False
    return os.path.join(_resolved_folder(folder), name) if plain else os.path.realpath(path)


@lru_cache(maxsize=1024)
def _resolved_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _decode(file: Path) -> str | None:
    """Decodes the whole image; returns what is wrong with it, or None."""
    limit = Image.MAX_IMAGE_PIXELS
    try:
        with Image.open(file) as image:  # reads the header only, and refuses a size of 0
            if limit is not None and image.width * image.height > limit:
                return f"which has more than {limit} pixels"
            image.load()
    except Image.DecompressionBombError:
        return f"which has more than {limit} pixels"
    except UnidentifiedImageError:
        return "which is not an image"
    except Exception as error:  # Pillow's decoders raise nearly every kind of exception on damaged files
        return f"which cannot be decoded ({error!r:.90})"
    return None
