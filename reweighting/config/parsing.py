"""Command-line flags from groups of dataclass fields. Nothing here, or in the other modules of flags, loads torch."""

from argparse import ArgumentDefaultsHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from reweighting.config.recipe import read_recipe
from reweighting.data.sources import expand
from reweighting.errors import UserError

MAY_BE_BLANK = ("step_separator",)  # a blank line, for example


def flag(
    *,
    help: str,
    default: Any = MISSING,
    aliases: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
) -> Any:
    """Describe a field of a dataclass as a command-line flag of the field's name.

    Args:
        help: what `--help` and the command-line reference say.
        default: the value without the flag; without a default the flag is needed.
        aliases: further names, with their dashes.
        metadata: further arguments of `ArgumentParser.add_argument`.

    Returns:
        The field; declared as anything, since the field's annotation is the type of its value.
    """
    return HfArg(help=help, default=default, aliases=list(aliases) or None, metadata=dict(metadata or {}))


def parse_groups(
    groups: Sequence[Any],
    argv: Sequence[str],
    *,
    description: str,
    recipes: bool = True,
    inherited: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda flags: {},
) -> tuple[dict[str, Any], set[str]]:
    """Parse flags described by the fields of dataclasses.

    A field that is `bool` and true by default gets a `--no_` twin; `bool | None` gets one as well. With `recipes`,
    `--config FILE` (or `--recipe FILE`) reads more flags; those on the command line win.

    Args:
        groups: the dataclasses; their fields are made by `flag`.
        argv: the command line without the program's name.
        description: for `--help`, which takes the program's name from `sys.argv`.
        recipes: whether `--config` exists.
        inherited: from {flag: value}, the defaults that follow; flags of the command line and of a recipe win.

    Returns:
        {flag: value} and the names of the flags that stand on the command line itself.

    Raises:
        UserError: if a recipe cannot be read or names an unknown flag, or a text is empty.
        SystemExit: with code 2, from argparse, for unknown flags and choices.
    """
    parser = _parser(groups, description)
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
    _check_texts(flags)
    words = {word.split("=")[0] for word in argv}
    return flags, {action.dest for action in parser._actions if words & set(action.option_strings)}


class CommandConfig:
    """All flags of a command: the base of dataclasses whose fields are groups of flags.

    Attributes:
        summary: what the command does, for `--help`.
        first: the flag that takes what stands before the first flag.
        recipes: whether `--config` exists.
    """

    summary: ClassVar[str]
    first: ClassVar[str | None] = None
    recipes: ClassVar[bool] = False

    @classmethod
    def parse(cls, argv: Sequence[str]) -> Self:
        """Parse a command line.

        Args:
            argv: the command line without the program's name.

        Returns:
            The config.

        Raises:
            UserError: if a value is out of range.
            SystemExit: with code 2, from argparse, for unknown flags and choices.
        """
        if cls.first is not None and argv and not argv[0].startswith("-"):
            argv = [f"--{cls.first}", *argv]
        groups = groups_of(cls)
        flags, _ = parse_groups(tuple(groups.values()), argv, description=cls.summary, recipes=cls.recipes)
        return cls.from_flags(flags)

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> Self:
        """Build a config from {flag: value}; a missing flag takes its default, an unknown one is left out.

        Raises:
            TypeError: if a flag without a default is missing.
        """
        groups = {
            name: group(**{field.name: flags[field.name] for field in fields(group) if field.name in flags})
            for name, group in groups_of(cls).items()
        }
        return cls(**groups)

    def flags(self) -> dict[str, Any]:
        """Return {flag: value} over all groups."""
        return {name: value for group in vars(self).values() for name, value in vars(group).items()}

    def check_files(self) -> None:
        """Look for the files of rows.

        Raises:
            UserError: one of them is not there.
        """
        for name, value in self.flags().items():
            if name.endswith("_json_file") and isinstance(value, list):
                expand(value)


def groups_of(config: Any) -> dict[str, Any]:
    """Return the groups of flags that a `CommandConfig` has, by name."""
    return {field.name: field.type for field in fields(config)}


def _check_texts(flags: Mapping[str, Any]) -> None:
    """Raise UserError for an empty text, which as a path would be the working folder, and for one with a NUL."""
    for name, value in flags.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and "\0" in text:
                raise UserError(f"--{name}: found {text!r:.60}, allowed: text without a NUL character")
            if isinstance(text, str) and not (text if name in MAY_BE_BLANK else text.strip()):
                raise UserError(f"--{name}: found an empty value: name one, or leave the flag out")


def _parser(groups: Sequence[Any], description: str) -> HfArgumentParser:
    """The parser of all fields; `bool | None` flags get their `--no_` twin here, which HfArgumentParser lacks."""
    parser = HfArgumentParser(
        groups, description=description, allow_abbrev=False, formatter_class=ArgumentDefaultsHelpFormatter
    )
    for group in groups:
        for field in fields(group):
            if field.type == bool | None:
                parser.add_argument(f"--no_{field.name}", dest=field.name, action="store_false", default=None,
                                    help=f"the opposite of --{field.name}")  # fmt: skip
    return parser
