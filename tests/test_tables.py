"""Tables are plain text in a pipe, whatever stands in their cells, and fold on a narrow terminal."""

import io
import sys

import pytest

from reweighting.tables import new_table, print_table


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def table():
    table = new_table("a title")
    table.add_column("domain", overflow="fold")
    for number in range(12):
        table.add_column(f"number {number}", justify="right")
    table.add_row("[bold]图表[/bold] :smile:", *["12345.678 (9–10)"] * 12)
    return table


def test_in_a_pipe_nothing_is_cut_folded_coloured_or_taken_for_markup(table, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    print_table(table)
    out = capsys.readouterr().out
    (row,) = [line for line in out.splitlines() if "12345" in line]
    assert row.count("12345.678 (9–10)") == 12 and "[bold]图表[/bold] :smile:" in row
    assert out.startswith("a title") and "\x1b" not in out


@pytest.mark.parametrize("width", [40, 170, 500])
def test_a_terminal_folds_between_words_and_no_number_is_cut(table, monkeypatch, width):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", str(width))
    print_table(table)
    out = sys.stdout.getvalue()
    assert "…" not in out and out.count("12345.678") == out.count("(9–10)") == 12 and "\x1b" not in out
    assert max(map(len, out.splitlines())) <= max(width, 165)  # 12 numbers of 9 characters, 3 between columns, the name
