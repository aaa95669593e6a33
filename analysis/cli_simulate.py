"""`moetwin simulate`: one run in simulated time, or several systems side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from analysis import text
from analysis.heartbeat import Heartbeat
from sim import options
from sim.grouped import grouped
from sim.presets import Preset
from sim.printing import console_for
from sim.results import RunResult, check_folder, write_folder
from sim.scenario import MOST_SEED, Prepared, Scenario, alongside
from sim.spec import catalogue
from sim.spec.catalogue import REFERENCE_MACHINE
from traces.errors import InputError, unknown_name
from traces.limits import MOST_BATCH

if TYPE_CHECKING:
    from sim.bounds import Bounds

SYSTEMS_PLOT = "systems.png"
DEFAULT_CACHE = "25%"
BATCHINGS = ("lock-step", "continuous")

Model = Annotated[str | None, typer.Option(help="A model of the catalogue, or a TOML file; else the trace's own.")]
ModelSet = Annotated[
    list[str] | None, typer.Option(metavar="NAME=VALUE", help="Change one number of the model: expert_bits=4.5.")
]
Hardware = Annotated[
    str | None,
    typer.Option(
        help="A machine of `moetwin hardware list`, gpu+cpu+link, or a TOML file.", show_default=REFERENCE_MACHINE
    ),
]
HardwareSet = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="Change one number of the machine: link.gb_per_s=12, regime=graph."),
]
ComputeTableFile = Annotated[
    Path | None,
    typer.Option(
        "--compute-table",
        help="Measured layer times for GPU experts: a table of tokens, activated_experts and time_us, and, if it says "
        "so, the model and the quant that it was measured with.",
    ),
]
ProfileFile = Annotated[
    Path | None, typer.Option("--profile", help="Measured costs of `moetwin calibrate`, not a catalogue.")
]
HostMemory = Annotated[
    str | None,
    typer.Option(help="Host memory for experts, such as 32GiB; what it does not hold is read from disk."),
]
Context = Annotated[
    int | None, typer.Option(min=1, help="Tokens of KV cache to make room for; else the trace's longest sequence.")
]
StandIn = Annotated[
    float | None,
    typer.Option(help="Make up look-ahead of this recall, for a trace that has none; marks results as synthetic."),
]
Batching = Annotated[
    str, typer.Option(help="lock-step: a batch ends together; continuous: a lane that ends takes the next request.")
]
PrefillChunk = Annotated[int, typer.Option(min=0, help="Most prompt tokens of a forward pass; 0: whole prompts.")]
ArrivalsOption = Annotated[
    str | None,
    typer.Option(
        "--arrivals",
        help="poisson, or a CSV of times (arrival_s, or Azure's TIMESTAMP, not its tokens); else all are there.",
    ),
]
Rate = Annotated[float | None, typer.Option(help="Requests a second; recorded arrivals are stretched to it.")]


@dataclass(frozen=True)
class Room:
    """The memory there is, and what is fitted to beforehand."""

    calibration: options.Calibration = None
    cache: options.Cache = None
    gpu_memory: options.GpuMemory = None
    host_memory: HostMemory = None
    context: Context = None


@dataclass(frozen=True)
class Machine:
    """The model, and what it runs on."""

    model: Model = None
    model_set: ModelSet = None
    quant: Annotated[str | None, typer.Option(help="Format of the experts: fp32, bf16, int8, int4...")] = None
    hardware: Hardware = None
    link_gb_per_s: Annotated[float | None, typer.Option(help="Bandwidth of the link.")] = None
    hardware_set: HardwareSet = None
    compute_table: ComputeTableFile = None
    profile: ProfileFile = None

    def fields(self) -> dict[str, Any]:
        """The same as a :class:`Scenario` takes it; raises :class:`InputError` for what is no setting."""
        fields = asdict(self)
        link_gb_per_s = fields.pop("link_gb_per_s")
        link = [] if link_gb_per_s is None else [f"link.gb_per_s={link_gb_per_s}"]
        fields["model_set"] = catalogue.settings_of(self.model_set or (), "model-set")
        fields["hardware_set"] = catalogue.settings_of([*link, *(self.hardware_set or ())])
        return fields


@dataclass(frozen=True)
class RequestOptions:
    """How the trace's sequences share forward passes, and when they come."""

    batch: Annotated[int, typer.Option(min=1, max=MOST_BATCH, help="Sequences decoded together, in lock-step.")] = 1
    batching: Batching = "lock-step"
    prefill_chunk: PrefillChunk = 0
    arrivals: ArrivalsOption = None
    rate_per_s: Rate = None


@grouped
def simulate(
    trace: Annotated[str, typer.Argument(help="A trace file, or the name of one that ships.", show_default=False)],
    of_system: options.SystemOptions,
    room: Room,
    machine: Machine,
    requests: RequestOptions,
    lookahead_recall: StandIn = None,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of what is drawn at random.")] = 0,
    events: Annotated[bool, typer.Option(help="Keep a row for every piece of work, for timelines.")] = True,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the result's tables; of --systems, one each in it.")
    ] = None,
    force: options.Force = False,
    as_json: options.AsJsonLines = False,
) -> None:
    """Replay a trace in simulated time: what is fetched, and how long it takes.

    Examples:

      moetwin simulate mixed --cache 25% --evict lfu

      moetwin simulate mixed --system hybrimoe --link-gb-per-s 12 --hardware-set regime=graph

      moetwin simulate mixed --systems all --calibration code --cache 25% --out runs/

      moetwin simulate mixed --system hybrimoe --option prefetch.depth=1 --policy-file my.py:MyCache

      moetwin simulate mixed --batch 4 --batching continuous --arrivals poisson --rate-per-s 8 --prefill-chunk 32

      moetwin simulate mixed --profile here.toml --prefetch next-router --json
    """
    chosen = of_system.chosen()
    if requests.batching not in BATCHINGS:
        raise unknown_name("batching", requests.batching, BATCHINGS)
    given = {**asdict(room), **machine.fields(), **asdict(requests)}
    scenario = Scenario(trace=trace, system=chosen[0], lookahead_recall=lookahead_recall, seed=seed, **given)
    if of_system.systems is None:
        _simulate_one(scenario, events=events, out=out, force=force, as_json=as_json)
        return
    _simulate_all(scenario, chosen, events=events, out=out, force=force, as_json=as_json)


def _simulate_one(scenario: Scenario, *, events: bool, out: Path | None, force: bool, as_json: bool) -> None:
    if out is not None:
        check_folder(out, force=force)
    from sim.bounds import lower_bound, regret_of

    prepared = scenario.prepare()
    with _progress(prepared.steps) as progress:
        run = prepared.run(events=events and out is not None, operations=out is not None, progress=progress)
        bounds = None if prepared.workload is None else lower_bound(prepared)
    _keep(bounds, run)
    regret = regret_of(run, bounds)
    extra = regret if as_json else {**_told_bound(regret), "memory": prepared.memory.told()}
    saved = {} if out is None else {"result": str(run.save(out, force=force))}
    options.show_run(run, as_json=as_json, extra={**extra, **saved})


def _keep(bounds: Bounds | None, run: RunResult) -> None:
    """Notes in a result what it is bound by."""
    if bounds is not None:
        run.info = run.info.model_copy(update={"bounds_s": bounds.told_s})


def _told_bound(regret: Mapping[str, float | None]) -> dict[str, str]:
    """The bound of a decode token, and how far above it the run is, as a row of its table."""
    bound_s, beyond_s, share = (regret[name] for name in ("bound_token_s", "regret_token_s", "regret"))
    if bound_s is None or beyond_s is None or share is None:
        return {}
    above = f"{text.number(beyond_s * 1e3, 'ms')} ({text.percent(share)}) above it on average"
    return {"least for a token, by bound": f"{text.number(bound_s * 1e3, 'ms')}; {above}"}


def _simulate_all(
    scenario: Scenario, systems: Sequence[Preset], *, events: bool, out: Path | None, force: bool, as_json: bool
) -> None:
    """Runs the systems one after the other; those that cannot run are named, with the reason."""
    from analysis.systems import Entry, side_by_side, systems_plot, systems_table, verdicts
    from sim.bounds import lower_bounds

    if out is not None:
        check_folder(out, force=force)
    ready, left_out = _prepared(alongside(scenario, systems))
    prepared = [one for _, one in ready]
    known = all(one.workload is not None for one in prepared)
    bounds: Sequence[Bounds | None] = lower_bounds(prepared) if known else [None] * len(prepared)
    entries = []
    with _progress(_steps(prepared)) as progress:
        for (preset, one), bound in zip(ready, bounds, strict=True):
            run = one.run(events=events, progress=progress)
            _keep(bound, run)
            entries.append(Entry(preset, run, one.costs, bound))
    records = side_by_side(entries)
    for name, reason in left_out.items():
        typer.echo(f"left out: {name}: {reason}", err=True)
    notes = {entry.name: entry.run.info.notes for entry in entries}

    title = _title(scenario, entries[0].run, prepared[0])

    def write(folder: Path) -> None:
        for entry in entries:
            entry.run.save(folder / entry.name)
        systems_plot(records, folder / SYSTEMS_PLOT, title)

    if out is not None:
        write_folder(out, write, force=force)
    if as_json:
        for record in records:
            typer.echo(json.dumps({**record, "notes": notes[record["system"]]}))
        return
    tables = systems_table(records, title)
    console = console_for(*[table for table in tables.renderables if isinstance(table, Table)])
    console.print(tables)
    for line in (*verdicts(records), *options.notes_of([(entry.name, entry.run) for entry in entries])):
        console.print(line, soft_wrap=True, markup=False)
    if out is not None:
        console.print(f"results: {out}, and side by side in {out / SYSTEMS_PLOT}", soft_wrap=True)


def _title(scenario: Scenario, run: RunResult, prepared: Prepared) -> str:
    """What all systems ran, on what, and within what."""
    model = prepared.model
    room = f"{scenario.gpu_memory} of GPU memory" if scenario.gpu_memory else scenario.cache or DEFAULT_CACHE
    if not scenario.gpu_memory:
        room += " of the experts on the GPU" if room.endswith("%") else " experts a layer on the GPU"
    parts = [
        f"{run.info.source}{', synthetic routing' if run.info.synthetic else ''}: {model.name}",
        f"experts in {scenario.quant or f'{model.expert_bits:g} bits'}",
        f"on {prepared.hardware}",
        room,
    ]
    return ", ".join([*parts, *([f"batch {scenario.batch}"] if scenario.batch > 1 else [])])


def _prepared(scenarios: Sequence[Scenario]) -> tuple[list[tuple[Preset, Prepared]], dict[str, str]]:
    """What can run, and why the others cannot; raises :class:`InputError` when nothing can."""
    ready, left_out = [], {}
    for scenario in scenarios:
        try:
            ready.append((scenario.system, scenario.prepare()))
        except InputError as error:
            left_out[scenario.system.name] = str(error)
    if not ready:
        raise InputError("; ".join(left_out.values()))
    return ready, left_out


def _steps(prepared: Sequence[Prepared]) -> int | None:
    counts = [one.steps for one in prepared]
    return None if None in counts else sum(count for count in counts if count is not None)


@contextmanager
def _progress(steps: int | None) -> Iterator[Callable[[], None]]:
    """A progress bar over forward passes, where stderr is a terminal, redrawn at most once in a while; else lines.

    ``steps`` is None where nobody knows how many there will be.
    """
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task, done = bar.add_task("simulating", total=steps), 0
        beat = Heartbeat("forward passes", lambda text: typer.echo(text, err=True))

        def advance() -> None:
            nonlocal done
            done += 1
            if not done % 64:
                bar.update(task, completed=done)
                if not console.is_terminal:
                    beat.done(done, steps)

        yield advance
