"""The flags of convert.py.

config = parse_convert_config(["a.json", "b.json", "--output", "rows.jsonl"], description="Convert answers …")
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_type_hints

from reweighting.config.parsing import flag, parse_groups
from reweighting.config.reading import FILES, ReadingConfig
from reweighting.errors import UserError


@dataclass(frozen=True)
class ConversionConfig:
    """convert.py."""

    inputs: list[str] = flag(help=f"answers, of any known format; the flag's name may be left out: {FILES}")
    output: str | None = flag(
        default=None, help="the canonical rows, a .jsonl or .parquet file (default: only report what is in the inputs)"
    )
    image_root: str | None = flag(
        default=None,
        help="folder that image paths start from and may not leave (default: the input's, then the working one)",
    )
    sample: int = flag(default=0, help="print so many answers as they are read")

    def __post_init__(self) -> None:
        if self.output is not None and Path(self.output).suffix not in (".jsonl", ".parquet"):
            raise UserError(f"--output: found {self.output!r:.60}, allowed: a name that ends in .jsonl or .parquet")
        if self.sample < 0:
            raise UserError(f"--sample: found {self.sample}, allowed: a number of at least 0")


@dataclass(frozen=True)
class ConvertConfig:
    """All flags of convert.py."""

    conversion: ConversionConfig
    reading: ReadingConfig


def parse_convert_config(argv: Sequence[str], *, description: str) -> ConvertConfig:
    """Parse the command's flags; what stands before the first of them are the inputs.

    Args:
        argv: the command line without the program's name.
        description: for `--help`.

    Raises:
        UserError: if a value is out of range.
        SystemExit: with code 2, from argparse, for unknown flags and choices.
    """
    if argv and not argv[0].startswith("-"):
        argv = ["--inputs", *argv]
    groups = get_type_hints(ConvertConfig)
    flags, _ = parse_groups(tuple(groups.values()), argv, description=description, recipes=False)
    made = {name: group(**{f.name: flags[f.name] for f in fields(group)}) for name, group in groups.items()}
    return ConvertConfig(**made)
