"""Command-line flags from groups of dataclass fields."""

from argparse import ArgumentDefaultsHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from reweighting.config.recipe import read_recipe


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
