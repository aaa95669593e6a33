"""The command line: one table of sub-commands, each imported only when it is used."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

USER_ERROR = 2
INTERRUPTED = 130


@dataclass(frozen=True)
class Entry:
    """A sub-command: where its Typer app or plain function lives, one line of help, and commands it borrows."""

    target: str
    help: str
    more: dict[str, Entry] = field(default_factory=dict)


ENTRIES: dict[str, Entry] = {
    "trace": Entry(
        "traces.cli:app",
        "Look at, check, generate and record routing traces.",
        {"record": Entry("real.cli:record", "Run a model on prompts, and write down what its routers chose.")},
    ),
    "models": Entry("sim.cli:models_app", "The catalogue of models: dimensions, bytes, and their sources."),
    "hardware": Entry("sim.cli:hardware_app", "The catalogue of machines: rates, fixed costs, and their sources."),
    "simulate": Entry("sim.cli:simulate", "Replay a trace in simulated time."),
    "decode": Entry("real.cli:decode", "Decode prompts for real, with only part of the experts on the device."),
    "calibrate": Entry("real.cli:calibrate", "Measure this machine, and write its hardware profile."),
    "compare": Entry("analysis.cli:compare", "Compare a measured with a simulated run, and write a report."),
}
"""Every sub-command, in the order in which the help lists them."""


def _load(entry: Entry, name: str) -> Any:
    """Imports an entry's target and builds the parser's command from it."""
    module, attribute = entry.target.split(":")
    target = getattr(import_module(module), attribute)
    if isinstance(target, typer.Typer):
        group = typer.main.get_group(target)
        for extra, borrowed in entry.more.items():
            group.add_command(LazyCommand(borrowed, extra))
        return group
    single = typer.Typer(add_completion=False)
    single.command(name)(target)
    return typer.main.get_command(single)


class LazyCommand(TyperCommand):
    """Stands in for a sub-command in help texts; turns into the real one as soon as it has arguments to parse."""

    def __init__(self, entry: Entry, name: str) -> None:
        super().__init__(name, help=entry.help)
        self._entry = entry

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        command = _load(self._entry, str(info_name))
        return command.make_context(info_name, args, parent=parent, **extra)


class Root(TyperGroup):
    """The top-level command: holds :data:`ENTRIES`, and turns a user's mistakes into one line and an exit code."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, entry in ENTRIES.items():
            self.add_command(LazyCommand(entry, name))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("error: interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except ValueError as error:
            message = _user_message(error)
            if message is None:
                raise
            typer.echo(f"error: {message}", err=True)
            raise typer.Exit(USER_ERROR) from None


def _user_message(error: ValueError) -> str | None:
    """One line for an error that the user's input caused, None for one that is the program's own."""
    from pydantic import ValidationError

    from traces.errors import InputError

    if isinstance(error, InputError):
        return " ".join(str(error).split())
    if isinstance(error, ValidationError):
        from sim.spec.catalogue import first_fault

        return first_fault(error)
    return None


app = typer.Typer(
    cls=Root,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    typer.echo(f"moetwin {_installed('moetwin')} (Python {platform.python_version()}, torch {_installed('torch')})")
    raise typer.Exit


def _installed(distribution: str) -> str:
    """The version of an installed distribution, read without importing it."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


@app.callback()
def _root(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the versions, and leave."),
    ] = False,
) -> None:
    """A digital twin for running Mixture-of-Experts models in less GPU memory than they need.

    It simulates expert offloading on recorded routing traces, executes the same policies with torch, and compares
    the two.

    Examples: "moetwin models list", "moetwin hardware show a6000-xeon5220r", "moetwin trace info TRACE".
    """


def main() -> None:
    """The console script. Exits with 0, 2 (a mistake in the input) or 130 (interrupted)."""
    try:
        app(prog_name="moetwin")
    finally:
        _flush()


def _flush() -> None:
    """Flushes standard output, quietly when its reader has gone: the interpreter would complain on its way out."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
