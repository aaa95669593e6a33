"""Tables of a benchmark, kept as JSON, printed, and put into the page that tells of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from traces.errors import InputError

BEGIN, END = "```text\n", "\n```\n"


def empty_table(title: str, name: str, *figures: str) -> Table:
    """A table without rows: what each row is, and its figures."""
    table = Table(title=title, box=None, pad_edge=False)
    table.add_column(name)
    for figure in figures:
        table.add_column(figure, justify="right")
    return table


def publish(
    figures: dict[str, Any], benchmark: str, shown: Callable[[Any], str], *, out: Path | None, page: Path | None
) -> None:
    """Prints ``figures`` as ``shown`` tells them; ``out`` keeps them as JSON, ``page`` gets what is printed."""
    text = json.dumps(figures, indent=1)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    printed = shown(json.loads(text))
    if page is not None:
        refresh(page, benchmark, printed)
    print(printed)


def refresh(page: Path, benchmark: str, printed: str) -> None:
    """Replaces, in ``page``, the first block of text that follows the command of ``benchmark``.

    Raises :class:`InputError` where the page has no such command, or no block after it.
    """
    told = page.read_text(encoding="utf-8")
    command = told.find(f"    python -m benchmarks.{benchmark} ")
    begin = told.find(BEGIN, command)
    end = told.find(END, begin)
    if min(command, begin, end) < 0:
        raise InputError(f"page must have the command of {benchmark} and a block of text after it, got {page}")
    page.write_text(told[: begin + len(BEGIN)] + printed + told[end:], encoding="utf-8")
