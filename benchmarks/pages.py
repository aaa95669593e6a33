"""Puts what a benchmark prints into the page that tells of it."""

from __future__ import annotations

from pathlib import Path

from traces.errors import InputError

BEGIN, END = "```text\n", "\n```\n"


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
