"""Checks of one row against its model, in the words of our messages."""

import difflib
from functools import lru_cache
from typing import Any, TypeVar, get_args

from pydantic import BaseModel
from pydantic_core import ValidationError

from reweighting.data.row_files import short_repr

OUR_MESSAGES = ("one_per_candidate", "accuracy", "steps")  # error types whose text is whole
SET_BY_LOADER = ("image_files", "index", "candidate_steps")  # fields that are not read from the file

AnyModel = TypeVar("AnyModel", bound=BaseModel)


FieldProblems = dict[str, tuple[str, str]]  # {field: (kind, text)}; problems of one field and kind can share a line


def check_fields(row_type: type[AnyModel], raw: Any, found: dict[str, Any]) -> tuple[AnyModel | None, FieldProblems]:
    """Check a row of our own formats, misspelt names of fields included.

    Args:
        row_type: the model of the row.
        raw: what stands in the file.
        found: values of the fields that the file does not give.

    Returns:
        The row, or None, and what is wrong with it.
    """
    fields = file_fields(row_type)
    if not isinstance(raw, dict):
        return None, {"the row": ("type", f"found {short_repr(raw)}, allowed: {_object_of(row_type)}")}
    misspelt = _misspelt(row_type, tuple(raw))
    problems = {
        short_repr(key)[1:-1]: ("unknown", f"unknown field, did you mean {name}?") for key, name in misspelt.items()
    }
    try:
        row = row_type.model_validate({name: raw[name] for name in fields if name in raw} | found)
    except ValidationError as invalid:
        for error in invalid.errors(include_url=False):
            if error["type"] != "missing" or error["loc"][0] not in misspelt.values():
                _add(problems, row_type, error)
        return None, problems
    return row, problems


def check_row(row_type: type[AnyModel], raw: Any) -> tuple[AnyModel | None, FieldProblems]:
    """Check a row of another format.

    Returns:
        The row, or None and what is wrong with it.
    """
    problems: FieldProblems = {}
    try:
        return row_type.model_validate(raw), problems
    except ValidationError as invalid:
        for error in invalid.errors(include_url=False):
            _add(problems, row_type, error)
    return None, problems


def _add(problems: FieldProblems, row_type: type[BaseModel], error: Any) -> None:
    """Add one of pydantic's errors. A field of several types has one for each type: the first one tells it all."""
    place, model, description = "", row_type, ""
    for part in error["loc"]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif model is not None:
            field = next((field for name, field in model.model_fields.items() if part in (name, field.alias)), None)
            if field is None:  # the name of one of several types
                break
            place += f".{part}" if place else part
            description = field.description or description
            model = _model_in(field.annotation)
    described = _described(error, description if place else _object_of(row_type))
    problems.setdefault(place or "the row", (error["type"], described))


def _object_of(row_type: type[BaseModel]) -> str:
    """What a row must be, in words that follow "allowed:"."""
    return f"an object with the fields {', '.join(name for name, needed in file_fields(row_type).items() if needed)}"


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model in a type such as `list[Step] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def _described(error: Any, allowed: str) -> str:
    """One of pydantic's errors in our words."""
    if error["type"] in OUR_MESSAGES:
        return error["msg"]
    if error["type"] == "missing":
        return f"missing, allowed: {allowed}"
    if error["type"] == "value_error":  # from a validator of ours, whose text is what is allowed, or half of a pair
        reason = error["ctx"]["error"]
        allowed = (allowed or "text") if isinstance(reason, UnicodeError) else str(reason)
    value = error["input"]
    # Named in words, since the character may stand where a long text is cut.
    broken = isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value)
    note = " (with half of a surrogate pair in it)" if broken else ""
    return f"found {short_repr(value)}{note}, allowed: {allowed}"


@lru_cache(maxsize=64)  # nearly all rows of a file have the same keys
def _misspelt(row_type: type[BaseModel], keys: tuple[str, ...]) -> dict[str, str]:
    """Unknown keys that look like an absent field, with that field's name."""
    fields = file_fields(row_type)
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
def file_fields(row_type: type[BaseModel]) -> dict[str, bool]:
    """The fields read from the file, and whether each is required."""
    fields = row_type.model_fields.items()
    return {name: field.is_required() for name, field in fields if name not in SET_BY_LOADER}
