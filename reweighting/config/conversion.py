"""The flags of convert.py.

config = ConvertConfig.parse(["a.json", "--output", "rows.jsonl"])
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from reweighting.config.parsing import CommandConfig, flag
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
class ConvertConfig(CommandConfig):
    """All flags of convert.py."""

    summary: ClassVar[str] = "Convert answers of any known format to canonical rows, and report what is in them."
    first: ClassVar[str | None] = "inputs"

    conversion: ConversionConfig
    reading: ReadingConfig
