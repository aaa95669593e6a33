"""The command line: one table of sub-commands, each imported only when it is used."""

from __future__ import annotations

import sys

USER_ERROR = 2
INTERRUPTED = 130

try:
    import os
    import platform
    import re
    import signal
    from collections.abc import Iterator
    from contextlib import contextmanager
    from dataclasses import dataclass, field
    from functools import partial, wraps
    from importlib import import_module
    from importlib.metadata import PackageNotFoundError, version
    from typing import TYPE_CHECKING, Annotated, Any

    import typer
    from typer.core import TyperCommand, TyperGroup
except KeyboardInterrupt:  # these take a tenth of a second, and nothing below would catch it
    print("error: interrupted", file=sys.stderr)
    sys.exit(INTERRUPTED)

if TYPE_CHECKING:  # a room is imported when one of its commands runs
    from traces.known import KnownModel

_parser: Any = import_module(typer.BadParameter.__module__)
"""Where the parser's errors live: click, or the copy of it that newer releases of typer carry."""


@dataclass(frozen=True)
class Entry:
    """A sub-command: where its Typer app or plain function lives, one line of help, commands it borrows, and what is
    called with the function's outcome, where another room goes on."""

    target: str
    help: str
    more: dict[str, Entry] = field(default_factory=dict)
    then: str = ""


ENTRIES: dict[str, Entry] = {
    "trace": Entry(
        "traces.cli:app",
        "Look at, check, generate and record routing traces.",
        {
            "record": Entry("real.cli:record", "Run a model on prompts, and write down what its routers chose."),
            "like": Entry("sim.cli_like:like", "Generate routing for any model that is like that of a recorded trace."),
        },
    ),
    "models": Entry("sim.cli:models_app", "The catalogue of models: dimensions, bytes, and their sources."),
    "hardware": Entry("sim.cli:hardware_app", "The catalogue of machines: rates, fixed costs, and their sources."),
    "cache": Entry("analysis.cli_cache:app", "Replay a trace under cache policies, without a clock."),
    "systems": Entry("sim.cli:systems_app", "Published systems: the policies that each one is made of."),
    "simulate": Entry("analysis.cli_simulate:simulate", "Replay a trace in simulated time, under one system or many."),
    "sweep": Entry("analysis.cli_sweep:app", "Run a grid of systems, machines and caches into one table, and plot it."),
    "timeline": Entry("analysis.cli_timeline:timeline", "Write runs as a timeline for a trace viewer."),
    "decode": Entry("real.cli_run:decode", "Decode prompts for real, with only part of the experts on the device."),
    "calibrate": Entry("real.cli_run:calibrate", "Measure this machine, and write its hardware profile."),
    "demo": Entry(
        "real.cli_demo:demo",
        "Run the whole twin on the small model that ships, and write a report.",
        then="analysis.demo:present",
    ),
    "compare": Entry("analysis.cli:compare", "Compare measured with simulated runs, and write a report."),
    "validate": Entry(
        "real.cli_validate:validate",
        "Calibrate, run, simulate and judge: how close the simulator comes here.",
        then="analysis.judging:judge",
    ),
}
"""Every sub-command, in the order in which the help lists them."""


def _load(entry: Entry, name: str) -> Any:
    """Imports an entry's target and builds the parser's command from it."""
    target = _imported(entry.target)
    if isinstance(target, typer.Typer):
        target.info.cls = Group
        group = typer.main.get_group(target)
        for extra, borrowed in entry.more.items():
            group.add_command(LazyCommand(borrowed, extra))
        return _strict(group)
    single = typer.Typer(add_completion=False)
    single.command(name)(_followed(target, entry.then) if entry.then else target)
    return _strict(typer.main.get_command(single))


def _imported(place: str) -> Any:
    module, attribute = place.split(":")
    return getattr(import_module(module), attribute)


def _followed(target: Any, then: str) -> Any:
    """The command ``target``, whose outcome is handed over to ``then``."""

    @wraps(target)
    def both(**options: Any) -> None:
        _imported(then)(target(**options))

    return both


EMPTY_MEANS_NONE = {"policies"}
"""What may be given as an empty word: no policy of the registry, beside those of a file."""


def _strict(command: Any) -> Any:
    """Lets ``command``, and those below it, refuse an empty word before it becomes a path, or passes for none given."""
    for one in command.params:
        if one.name not in EMPTY_MEANS_NONE:
            one.handle_parse_result = partial(_not_empty, one, one.handle_parse_result)
    for below in getattr(command, "commands", {}).values():
        _strict(below)
    return command


def _not_empty(one: Any, handle: Any, ctx: Any, given: Any, words: Any) -> Any:
    value = given.get(one.name)
    if "" in (value if isinstance(value, list | tuple) else [value]):
        from traces.errors import InputError

        raise InputError(f"{_field_of(one)} must hold something, got ''")
    return handle(ctx, given, words)


def _field_of(one: Any) -> str:
    """What messages call an option or an argument."""
    return str(max(one.opts, key=len).lstrip("-"))


class LazyCommand(TyperCommand):
    """Stands in for a sub-command in help texts; turns into the real one as soon as it has arguments to parse."""

    def __init__(self, entry: Entry, name: str) -> None:
        super().__init__(name, help=entry.help)
        self._entry = entry

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        command = _load(self._entry, str(info_name))
        return command.make_context(info_name, args, parent=parent, **extra)


class Group(TyperGroup):
    """A command that has sub-commands: an unknown one is told like any other unknown name."""

    def resolve_command(self, ctx: Any, args: Any) -> Any:
        if args[0] not in self.commands:
            from traces.errors import unknown_name

            raise unknown_name("command", args[0], self.commands)
        return super().resolve_command(ctx, args)


class Root(Group):
    """The top-level command: holds :data:`ENTRIES`, and turns a user's mistakes into one line and an exit code."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, entry in ENTRIES.items():
            self.add_command(LazyCommand(entry, name))

    def make_context(self, *args: Any, **extra: Any) -> Any:
        with _told_in_one_line():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        with _told_in_one_line():
            return super().invoke(ctx)


@contextmanager
def _told_in_one_line() -> Iterator[None]:
    """Turns a user's mistake, or an interrupt, into one line on stderr and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("error: interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except (ValueError, _parser.UsageError) as error:
        message = _user_message(error)
        if message is None:
            raise
        typer.echo(f"error: {' '.join(message.split())}", err=True)
        raise typer.Exit(USER_ERROR) from None


def _user_message(error: Exception) -> str | None:
    """What to tell of an error that the user's input caused; None for one that is the program's own, or no error."""
    from pydantic import ValidationError

    from traces.errors import InputError

    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, ValidationError):
        from sim.spec.catalogue import first_fault

        return first_fault(error)
    if isinstance(error, _parser.UsageError) and not isinstance(error, getattr(_parser, "NoArgsIsHelpError", ())):
        return _usage_message(error)
    return None


def _usage_message(error: Any) -> str:
    """What to tell of words that the parser refuses: a rule of the option or argument, or the parser's own words."""
    from sim.spec.catalogue import first_fault
    from traces.errors import unknown_name

    if isinstance(error, _parser.NoSuchOption):
        options = [one for one in error.ctx.command.get_params(error.ctx) if one.param_type_name == "option"]
        known = [name for one in options for name in (*one.opts, *one.secondary_opts)]
        return str(unknown_name("option", error.option_name, known))
    one = getattr(error, "param", None)
    if one is not None:
        field = _field_of(one)
        if isinstance(error, _parser.MissingParameter):
            return f"{field} must be given, got nothing"
        if error.__cause__ is not None and hasattr(error.__cause__, "errors"):
            _, _, rule = first_fault(error.__cause__).partition(" must ")
            return f"{field} must {rule}"
    if isinstance(error, _parser.BadOptionUsage):
        return f"{error.option_name.lstrip('-')} must have a value, got none"
    told = str(error.format_message()).rstrip(".")
    extra = re.fullmatch(r"Got unexpected extra argument(?:s|\(s\))? \((.*)\)", told, re.DOTALL)
    if extra is None:
        return told
    taken = [str(one.name).upper() for one in error.ctx.command.params if one.param_type_name == "argument"]
    alone = f"{' and '.join(taken)} alone" if taken else "no words"
    name = error.ctx.command_path.partition(" ")[2]
    return f"{name} must be given {alone}, got {extra[1]!r} as well"


def _known_models() -> dict[str, KnownModel]:
    """The catalogue by name, for commands of rooms that do not know it."""
    from sim.spec import catalogue
    from traces.known import KnownModel

    return {
        name: KnownModel(one.moe_layers, one.experts, one.top_k, one.expert_bytes, one.expert_bits, one.dtype)
        for name, one in ((name, catalogue.model(name)) for name in catalogue.model_names())
    }


app = typer.Typer(
    cls=Root,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "obj": _known_models},
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
    """The console script. Exits with 0, 2 (a mistake in the input) or 130 (interrupted, or asked to end)."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is half-written, and workers, go as on Ctrl-C
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
