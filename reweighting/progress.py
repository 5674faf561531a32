"""Where a long command is: a bar on a terminal, a line now and then where the output is piped into a file."""

import sys
import time
from typing import Any

from tqdm import tqdm

from reweighting.terminal import printable

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Count units of work and show how far it is, how fast, and how long it will take.

    Args:
        total: units in all.
        initial: units that were done before this process started.
        unit: what is counted, in the singular.
        disable: show nothing, as on every process but rank 0.
        file: where to show it, like a text file; None for stderr.
    """

    def __init__(self, total: int, initial: int = 0, unit: str = "step", disable: bool = False, file: Any = None):
        self.total, self.count, self.initial, self.unit = total, initial, initial, unit
        self.file: Any = sys.stderr if file is None else file
        self._lines = not disable and not self.file.isatty()
        self._bar = tqdm(total=total, initial=initial, unit=unit, dynamic_ncols=True, file=self.file,
                         disable=disable or self._lines)  # fmt: skip
        self._started = self._last_line = time.monotonic()
        self._values: dict[str, str] = {}

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._lines and self.count > self.initial:
            self._write_line()

    def update(self, units: int = 1) -> None:
        """Count units that are done."""
        self.count += units
        self._bar.update(units)
        if self._lines and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._write_line()

    def show(self, **values: str) -> None:
        """Show these values, by name, beside the count."""
        self._values = {name: printable(value, one_line=True) for name, value in values.items()}
        self._bar.set_postfix(self._values)

    def write(self, text: str) -> None:
        """Print a line of its own, above the bar."""
        tqdm.write(printable(text), file=self.file)

    def _write_line(self) -> None:
        self._last_line = time.monotonic()
        rate = (self.count - self.initial) / max(self._last_line - self._started, 1e-9)
        left = (
            f", {(self.total - self.count) / rate / 60:.1f} minutes left"
            if 0 < rate and self.count < self.total
            else ""
        )
        values = "".join(f", {name} {value}" for name, value in self._values.items())
        self.file.write(f"{self.unit} {self.count} of {self.total}, {rate:.2f} a second{left}{values}\n")
        self.file.flush()
