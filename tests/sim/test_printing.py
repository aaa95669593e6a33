"""Tables on narrow consoles: nothing of them is cut."""

from __future__ import annotations

import pytest
from rich.table import Table

from sim.printing import console_for


def shown(table: Table, capsys: pytest.CaptureFixture[str]) -> str:
    console_for(table).print(table)
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")


def test_cells_that_must_not_wrap_widen_the_console(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(box=None)
    for name in ("size", "time"):
        table.add_column(name, no_wrap=True)
    table.add_row("1.62 MiB, in all copies", "34.5 ms a token")
    assert shown(table, capsys).splitlines()[1].strip() == "1.62 MiB, in all copies  34.5 ms a token"


def test_words_that_are_too_long_are_broken_and_others_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("path", "sentence", box=None)
    table.add_row("/a/folder/with/a/long/name", "of several words, which may stand below each other")
    text = shown(table, capsys)
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    first = "".join(line.split("  ")[0].strip() for line in text.splitlines()[1:])
    assert first.startswith("/a/folder/with/a/long/name")
    assert len(text.splitlines()) > 3


def test_a_wide_console_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert console_for(Table("one")).width == 200
