"""Tables on a terminal, a file or a pipe, of which no number is ever cut."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

MOST = 10_000
"""Columns of a console that everything fits."""


def console_for(*tables: Table, stderr: bool = False) -> Console:
    """A console that is wide enough for every word of ``tables``, and for whole cells of columns that must not wrap.

    Where it has to be wider than the terminal, that wraps its lines; without one it has 80 columns or more. Columns
    that wrap break words that are too long, so that the end of a path is not lost.
    """
    console = Console(highlight=False, stderr=stderr)
    for table in tables:
        for column in table.columns:
            column.overflow = "fold"
        console.width = max(console.width, _least_width(table, console))
    return console


def _least_width(table: Table, console: Console) -> int:
    roomy = console.options.update(width=MOST)
    width = Measurement.get(console, roomy, table).minimum
    for column in table.columns:
        if column.no_wrap:
            cells = [Measurement.get(console, roomy, cell) for cell in (column.header, *column.cells)]
            width += max(cell.maximum for cell in cells) - max(cell.minimum for cell in cells)
    return width
