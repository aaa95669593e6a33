"""The command line: one table of sub-commands, each imported only when it is used."""

from __future__ import annotations

import sys

USER_ERROR = 2
INTERRUPTED = 130

try:
    import os
    import platform
    import re
    from collections.abc import Iterator
    from contextlib import contextmanager
    from dataclasses import dataclass, field
    from functools import partial, wraps
    from importlib import import_module
    from importlib.metadata import PackageNotFoundError, version
    from pathlib import Path
    from typing import TYPE_CHECKING, Annotated, Any

    import typer
    from typer.core import TyperCommand, TyperGroup
except KeyboardInterrupt:  # these take a tenth of a second, and nothing below would catch it
    print("error: interrupted", file=sys.stderr)
    sys.exit(INTERRUPTED)

if TYPE_CHECKING:  # a room is imported when one of its commands runs
    from real.decode import Machine
    from sim.costs import Costs
    from sim.systems import Budget, SystemSpec
    from traces.known import KnownModel
    from traces.schema import Trace

DEMO = Path("moetwin-demo")

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
    "demo": Entry("moetwin:demo", "Run the whole twin on the small model that ships, and write a report."),
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


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report, the trace, the profile and both runs.")] = DEMO,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto for a GPU where there is one.")] = "auto",
    repeats: Annotated[int, typer.Option(min=2, help="Measured runs; each token's fastest one counts.")] = 7,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that holds other files.")] = False,
) -> None:
    """Run the whole twin on the small model that ships: decode, record, calibrate, simulate, compare, report.

    A real model decodes real prompts with a quarter of its experts on the device; the same policy objects then run in
    simulated time on what was recorded, with costs measured on this machine.

    Examples:

      moetwin demo

      moetwin demo --device cuda --out demo-gpu
    """
    from sim.results import check_folder, write_folder

    check_folder(out, force=force)
    twin = _run_twin(device, repeats)
    write_folder(out, twin.write, force=force)
    twin.show(out)


class _Twin:
    """Both runs of the demo and what belongs to them."""

    def __init__(self, **parts: Any) -> None:
        self.parts = parts

    def write(self, folder: Path) -> None:
        """Writes everything that the demo made into ``folder``."""
        from analysis.report import render_markdown, write_report
        from analysis.timeline import write_perfetto
        from traces.store import save

        parts = self.parts
        measured, simulated = parts["measured"], parts["simulated"]
        save(parts["trace"], folder / "trace.safetensors")
        parts["profile"].save(folder / "profile.toml")
        measured.save(folder / "measured")
        simulated.save(folder / "simulated")
        write_perfetto(folder / "timeline.perfetto.json", [measured, simulated])
        (folder / "report.md").write_text(render_markdown(parts["comparison"]), encoding="utf-8")
        write_report(
            folder / "report.html",
            comparison=parts["comparison"],
            measured=measured,
            simulated=simulated,
            trace=parts["trace"],
            samples=parts["samples"],
            facts=parts["facts"],
        )

    def show(self, out: Path) -> None:
        """Prints the outcome, what it was run on, and where the report is."""
        from rich.console import Console

        from analysis.cli import outcome_table
        from analysis.report import verdict

        console = Console(highlight=False)
        console.print(outcome_table(self.parts["comparison"]))
        console.print(verdict(self.parts["comparison"]))
        console.print(f"device: {self.parts['facts']['device']}")
        console.print(f"report: {(out / 'report.html').resolve()}", soft_wrap=True)


def _run_twin(device: str, repeats: int) -> _Twin:
    from analysis.compare import compare
    from real.calibrate import calibrate
    from real.cli_run import machine_of
    from real.decode import replay
    from real.jobs import predicted_costs
    from real.progress import bar, status
    from sim.profile import ProfileCosts
    from sim.run import simulate
    from sim.systems import SystemSpec, parse_capacity
    from traces.workload import one_at_a_time

    system = SystemSpec()
    with machine_of("moetwin-small", device=device) as machine:
        spec = machine.loaded.spec
        budget, rough = parse_capacity("25%", layers=spec.moe_layers, experts=spec.experts), predicted_costs(spec)
        trace, samples = _decoded(machine, system, budget, rough)
        workload = one_at_a_time(trace)
        with bar("measuring", repeats * len(workload)) as advance:
            runs = [replay(machine, workload, system, budget, rough, progress=advance) for _ in range(repeats)]
        with status("calibrating this machine") as say:
            profile = calibrate(machine, name=machine.hardware, progress=say)
    simulated = simulate(workload, system, budget, ProfileCosts(profile, spec), hardware=profile.name)
    return _Twin(
        trace=trace,
        profile=profile,
        measured=runs[0],
        simulated=simulated,
        comparison=compare(runs[0], simulated, repeats=runs[1:], calibration_mean_s=profile.token_s),
        samples=samples,
        facts={"device": _device_line(machine.device.name, machine.hardware), **profile.machine},
    )


def _decoded(machine: Machine, system: SystemSpec, budget: Budget, costs: Costs) -> tuple[Trace, list[tuple[str, str]]]:
    """The routing of one prompt of every domain that ships, sampled with seed 0; each prompt with its continuation."""
    from real.decode import decode
    from real.generate import Sampler
    from real.progress import bar
    from real.record import encode
    from traces.prompts import SHIPPED_PROMPTS, digest, load_prompts

    every = load_prompts(SHIPPED_PROMPTS)
    prompts = list({prompt.domain: prompt for prompt in reversed(every)}.values())[::-1]
    encoded = [tokens[:48] for tokens in encode(machine.loaded, prompts)]
    with bar("decoding", len(prompts) * 40) as advance:
        _, trace, tokens = decode(
            machine,
            encoded,
            system,
            budget,
            costs,
            max_new_tokens=40,
            sampler=Sampler(temperature=0.8),
            progress=advance,
            domains=tuple(prompt.domain for prompt in prompts),
            prompts_digest=digest(prompts),
        )
    return trace, [(machine.text(start), machine.text(new)) for start, new in zip(encoded, tokens, strict=True)]


def _device_line(name: str, hardware: str) -> str:
    return f"GPU {hardware}" if name == "cuda" else "no GPU was found or asked for: the CPU played its role"


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
