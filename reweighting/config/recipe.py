"""Recipes: JSON or YAML files of flags. A file is small and flat, or refused, whatever a parser would make of it."""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import yaml
import yaml.composer

from reweighting.errors import UserError
from reweighting.files import regular_file
from reweighting.terminal import printable

ALIASES = {"gradient_accumulation": "gradiant_accumulation"}  # the reference misspells it; a recipe may use either
AS_JSON = ("mixture",)  # flags whose value is JSON on the command line, and a list of objects in a recipe
MAX_BYTES = 2**16  # all flags together take a few thousand
MAX_DEPTH = 10


def read_recipe(path: Path, groups: Sequence[Any]) -> dict[str, Any]:
    """Read a JSON or YAML file of flags.

    Args:
        path: the file; its name ends in `.json` if it is JSON.
        groups: the dataclasses whose fields are the flags.

    Returns:
        {flag: value}, each of its flag's type.

    Raises:
        UserError: if the file is unreadable or too large, names an unknown flag, or gives a value of another type.
    """
    settings = _parse(path)
    if not isinstance(settings, dict):
        raise UserError(f"--recipe {path}: expected names and values, one flag each")
    types = {field.name: field.type for group in groups for field in fields(group)}
    values: dict[str, Any] = {}
    for key, value in settings.items():
        name = ALIASES.get(key, key)
        if name in values:
            raise UserError(f"--recipe {path}: {' and '.join(sorted({key, name}))} are the same flag")
        if name not in types:
            raise UserError(f"--recipe {path}: {printable(str(name)[:60], one_line=True)}: there is no such flag")
        try:
            values[name] = json.dumps(value) if name in AS_JSON else _as_type(value, types[name])
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"--recipe {path}: {name}: found {value!r:.60}: {error!s:.100}") from error
    return values


def _parse(path: Path) -> Any:
    """The content of a recipe as plain values."""
    try:
        with open(regular_file(path), "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(f"--recipe {path}: is larger than {MAX_BYTES} bytes, which no file of flags is")
        text = content.decode()
        return json.loads(text) if path.suffix == ".json" else yaml.load(text, _FlatLoader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise UserError(f"--recipe {path}: cannot be read: {str(error.problem)[:100]}{line}") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        words = reason or (str(error).splitlines() or ["empty"])[0]
        raise UserError(f"--recipe {path}: cannot be read: {words[:100]}") from error


class _FlatLoader(yaml.SafeLoader):
    """YAML without deep nesting, and without aliases, with which a few lines become billions of values."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "a recipe has no use for aliases (*name)", mark)
        if self.depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, "a recipe has no use for nested values", mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _as_type(value: Any, wanted: Any) -> Any:
    """Return a recipe's value as the type of its flag. Raises ValueError or OverflowError if it cannot be one."""
    if isinstance(wanted, UnionType) or type(None) in get_args(wanted):  # `X | None`
        if value is None:
            return None
        wanted = next(kind for kind in get_args(wanted) if kind is not type(None))
    if get_origin(wanted) is Literal:
        if value not in get_args(wanted):
            raise ValueError(f"expected one of {', '.join(get_args(wanted))}")
        return value
    if get_origin(wanted) is list:
        return [_as_type(entry, get_args(wanted)[0]) for entry in (value if isinstance(value, list) else [value])]
    if wanted is bool or isinstance(value, bool):
        if wanted is not bool or not isinstance(value, bool):
            raise ValueError("expected true or false" if wanted is bool else f"expected {wanted.__name__}")
        return value
    if wanted is str:
        if not isinstance(value, str):
            raise ValueError("expected text")
        return value
    if value is None or isinstance(value, list | dict):
        raise ValueError("expected a number")
    if isinstance(value, int):  # of any size
        return wanted(value)
    number = float(value)  # YAML reads 5e-7 as a text, and 1 where 1.0 is meant
    if wanted is int and number != int(number):
        raise ValueError("expected a whole number")
    return wanted(number)
