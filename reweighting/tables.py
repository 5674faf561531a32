"""Tables as text: drawn by rich, readable on a terminal and in a pipe."""

import sys

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

UNLIMITED = 10_000  # columns, where no terminal limits the width


def new_table(title: str) -> Table:
    """Start a table whose title stands above it on the left; numbers go into columns with `justify="right"`."""
    return Table(title=title, title_justify="left", title_style="", header_style="", box=box.SIMPLE_HEAD,
                 show_edge=False, pad_edge=False)  # fmt: skip


def print_table(table: Table) -> None:
    """Print a table to the standard output, without colours.

    On a terminal a cell that does not fit is folded between words. Elsewhere the table is as wide as its cells.
    """
    console = Console(file=sys.stdout, color_system=None, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = UNLIMITED
    # rich would cut words, numbers too, on a terminal that is too narrow for them; this leaves it to the terminal.
    words = Measurement.get(console, console.options.update(width=UNLIMITED), table).minimum
    console.width = max(console.width, words)
    console.print(table)
