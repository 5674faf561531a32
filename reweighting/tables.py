"""Tables as text: drawn by rich, readable on a terminal and in a pipe."""

import sys

from rich import box
from rich.console import Console
from rich.table import Table

UNLIMITED = 10_000  # columns, where no terminal limits the width


def new_table(title: str) -> Table:
    """Start a table whose title stands above it on the left; numbers go into columns with `justify="right"`."""
    return Table(title=title, title_justify="left", title_style="", header_style="", box=box.SIMPLE_HEAD,
                 show_edge=False, pad_edge=False)  # fmt: skip


def print_table(table: Table) -> None:
    """Print a table to the standard output.

    On a terminal a cell that does not fit is folded. Elsewhere the table is as wide as its cells, without colours, so
    that no number is cut or broken.
    """
    terminal = sys.stdout.isatty()
    console = Console(
        file=sys.stdout, width=None if terminal else UNLIMITED, markup=False, highlight=False, emoji=False
    )
    console.print(table)
