"""Groups of options: what a command takes, and what it is handed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.testing import CliRunner, Result

from sim.grouped import grouped


@dataclass(frozen=True)
class Where:
    host: Annotated[str, typer.Option(help="The machine.")]
    port: Annotated[int, typer.Option("--port-number", min=1, help="Its port.")] = 80


@dataclass(frozen=True)
class Kept:
    names: Annotated[list[str] | None, typer.Option(help="Repeatable.")] = None
    quiet: bool = False


handed: list[tuple[Any, ...]] = []


@grouped
def connect(
    word: Annotated[str, typer.Argument(help="A word.")],
    where: Where,
    kept: Kept,
    times: Annotated[int, typer.Option(help="How often.")] = 1,
) -> None:
    """Connects."""
    handed.append((word, where, kept, times))


def call(*words: str) -> Result:
    app = typer.Typer()
    app.command()(connect)
    handed.clear()
    return CliRunner().invoke(app, list(words))


def test_fields_are_options_and_come_as_their_dataclass() -> None:
    words = ("hello", "--host", "here", "--port-number", "8", "--names", "a", "--names", "b", "--quiet", "--times", "2")
    assert call(*words).exit_code == 0
    assert handed == [("hello", Where("here", 8), Kept(["a", "b"], True), 2)]


def test_defaults_are_those_of_the_fields() -> None:
    assert call("hello", "--host", "here").exit_code == 0
    assert handed == [("hello", Where("here"), Kept(), 1)]


def test_a_field_without_default_is_required_and_rules_hold() -> None:
    assert call("hello").exit_code == 2
    assert call("hello", "--host", "here", "--port-number", "0").exit_code == 2
    assert handed == []


def test_help_tells_of_every_field() -> None:
    told = call("--help").output
    for text in ("Connects.", "--host", "The machine.", "--port-number", "--names", "--quiet", "--times", "A word."):
        assert text in told
    assert connect.__name__ == "connect"
