"""Command-line flags from groups of dataclass fields, and recipes: files of flags."""

import json
from argparse import ArgumentDefaultsHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import yaml
from transformers import HfArgumentParser

from reweighting.errors import UserError
from reweighting.terminal import printable

ALIASES = {"gradient_accumulation": "gradiant_accumulation"}  # the reference misspells it; a recipe may use either


def parse_groups(
    groups: Sequence[type],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    recipes: bool = True,
    inherited: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda flags: {},
) -> tuple[dict[str, Any], set[str]]:
    """Parse flags described by the fields of dataclasses.

    A field that is `bool` and true by default gets a `--no_` twin; `bool | None` gets one as well. With `recipes`,
    `--config FILE` (or `--recipe FILE`) reads more flags; those on the command line win.

    Args:
        groups: the dataclasses; their fields are made by `HfArg`.
        argv: the command line without the program's name.
        prog, description: for `--help`.
        recipes: whether `--config` exists.
        inherited: from {flag: value}, the defaults that follow; flags of the command line and of a recipe win.

    Returns:
        {flag: value} and the names of the flags that stand on the command line itself.

    Raises:
        UserError: if a recipe cannot be read or names an unknown flag.
        SystemExit: with code 2, from argparse, for unknown flags and choices.
    """
    parser = _parser(groups, prog, description)
    recipe: dict[str, Any] = {}
    if recipes:
        parser.add_argument("--config", "--recipe", help="JSON or YAML file of flags; those on the command line win")
        first = HfArgumentParser((), add_help=False, allow_abbrev=False)
        first.add_argument("--config", "--recipe")
        recipe_file = first.parse_known_args(argv)[0].config
        if recipe_file is not None:
            recipe = read_recipe(Path(recipe_file), groups)
            for action in parser._actions:
                if action.dest in recipe:
                    action.required = False
            parser.set_defaults(**recipe)
    flags = vars(parser.parse_args(argv))
    if more := inherited(flags):
        parser.set_defaults(**{name: value for name, value in more.items() if name not in recipe})
        flags = vars(parser.parse_args(argv))
    flags.pop("config", None)
    words = {word.split("=")[0] for word in argv}
    return flags, {action.dest for action in parser._actions if words & set(action.option_strings)}


def _parser(groups: Sequence[type], prog: str, description: str) -> HfArgumentParser:
    """The parser of all fields; `bool | None` flags get their `--no_` twin here, which HfArgumentParser lacks."""
    parser = HfArgumentParser(
        groups, prog=prog, description=description, allow_abbrev=False, formatter_class=ArgumentDefaultsHelpFormatter
    )
    for group in groups:
        for field in fields(group):
            if field.type == bool | None:
                parser.add_argument(f"--no_{field.name}", dest=field.name, action="store_false", default=None,
                                    help=f"the opposite of --{field.name}")  # fmt: skip
    return parser


def read_recipe(path: Path, groups: Sequence[type]) -> dict[str, Any]:
    """Read a JSON or YAML file of flags.

    Raises:
        UserError: if the file is unreadable, names an unknown flag, or gives a value of another type.
    """
    try:
        text = path.read_text(encoding="utf-8")
        settings = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"--config {path}: expected names and values, one flag each")
    types = {field.name: field.type for group in groups for field in fields(group)}
    values: dict[str, Any] = {}
    for key, value in settings.items():
        name = ALIASES.get(key, key)
        if name in values:
            raise UserError(f"--config {path}: {' and '.join(sorted({key, name}))} are the same flag")
        if name not in types:
            raise UserError(f"--config {path}: {printable(str(name)[:60])}: there is no such flag")
        try:
            values[name] = _as_type(value, types[name])
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"--config {path}: {name}: found {value!r:.60}: {error}") from error
    return values


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
