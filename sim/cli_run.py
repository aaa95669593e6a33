"""`moetwin simulate`: one run in simulated time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from sim import options
from sim.costs import Costs, RooflineCosts, TableCosts
from sim.profile import ProfileCosts
from sim.results import check_folder
from sim.run import simulate as simulate_run
from sim.spec import ModelSpec, catalogue
from sim.spec.catalogue import REFERENCE_MACHINE
from sim.spec.compute_table import ComputeTable
from sim.spec.profile import Profile
from sim.target import budget_of, model_for, workload_of
from traces.errors import InputError
from traces.shipped import find_trace
from traces.store import load as load_trace

Model = Annotated[str | None, typer.Option(help="A model of the catalogue, or a TOML file; else the trace's own.")]
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
    typer.Option("--compute-table", help="Measured layer times (tokens, activated_experts, time_us) for GPU experts."),
]


def simulate(
    trace: Annotated[str, typer.Argument(help="A trace file, or the name of one that ships.", show_default=False)],
    evict: options.Evict = "lru",
    calibration: options.Calibration = None,
    place: options.Place = "fetch",
    prefetch: options.Prefetch = "none",
    scope: options.Scope = "layer",
    cache: options.Cache = None,
    gpu_memory: options.GpuMemory = None,
    model: Model = None,
    quant: Annotated[str | None, typer.Option(help="Format of the experts: fp32, bf16, int8, int4...")] = None,
    hardware: Hardware = None,
    link_gb_per_s: Annotated[float | None, typer.Option(help="Bandwidth of the link.")] = None,
    hardware_set: HardwareSet = None,
    compute_table: ComputeTableFile = None,
    profile: Annotated[
        Path | None, typer.Option(help="Measured costs of `moetwin calibrate`, not a catalogue.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences decoded together, in lock-step.")] = 1,
    synchronous: options.Synchronous = False,
    events: Annotated[bool, typer.Option(help="Keep a row for every piece of work, for timelines.")] = True,
    out: Annotated[Path | None, typer.Option(help="Folder for the result's tables.")] = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Replay a trace in simulated time: what is fetched, and how long it takes.

    Examples:

      moetwin simulate mixed --cache 25% --evict lfu

      moetwin simulate mixed --place cpu-on-miss --hardware rtx4090+epyc9374f+pcie5-x16 --out runs/cpu

      moetwin simulate mixed --evict mrs --link-gb-per-s 12 --hardware-set regime=graph

      moetwin simulate mixed --profile here.toml --prefetch next-router --json
    """
    system = options.system_of(evict=evict, place=place, prefetch=prefetch, scope=scope, synchronous=synchronous)
    machine = _Machine(hardware, link_gb_per_s, hardware_set or [], compute_table, profile)
    if out is not None:
        check_folder(out, force=force)
    recorded = load_trace(find_trace(trace))
    spec = model_for(recorded, model, quant)
    workload, context = workload_of(recorded, spec, batch)
    budget = budget_of(spec, lanes=batch, context=context, cache=cache, gpu_memory=gpu_memory, scope=scope)
    name, costs = machine.costs(spec)
    fitted = options.calibration_of(calibration, workload.trace, batch)
    with _progress(len(workload)) as progress:
        run = simulate_run(
            workload, system, budget, costs, hardware=name, calibration=fitted, events=events, progress=progress
        )
    extra = {} if out is None else {"result": str(run.save(out, force=force))}
    options.show_run(run, as_json=as_json, **extra)


class _Machine:
    """The machine as it was asked for; raises :class:`InputError` for what contradicts each other."""

    def __init__(
        self,
        hardware: str | None,
        link_gb_per_s: float | None,
        changes: Sequence[str],
        table: Path | None,
        profile: Path | None,
    ) -> None:
        link = [] if link_gb_per_s is None else [f"link.gb_per_s={link_gb_per_s}"]
        self._changes = catalogue.settings_of([*link, *changes])
        self._hardware, self._table, self._profile = hardware, table, profile
        given = {"hardware": hardware, "hardware-set": self._changes or None, "compute-table": table}
        for field, value in given.items():
            if profile is not None and value is not None:
                raise InputError(f"{field} must not be given together with profile, got {value} and {profile}")

    def costs(self, spec: ModelSpec) -> tuple[str, Costs]:
        """Its name, and what work of ``spec`` takes on it."""
        if self._profile is not None:
            measured = Profile.load(self._profile)
            _check_format(spec, measured.model)
            return measured.name, ProfileCosts(measured, spec)
        machine = catalogue.overridden(catalogue.find_hardware(self._hardware or REFERENCE_MACHINE), self._changes)
        if self._table is None:
            return machine.name, RooflineCosts(spec, machine)
        return machine.name, TableCosts(spec, machine, ComputeTable.load(self._table))


def _check_format(spec: ModelSpec, measured: ModelSpec) -> None:
    """Raises :class:`InputError`, with the way out, when weights were ``measured`` in another format than ``spec``'s.

    A calibration measures all weights in one format, so that following both hints always ends.
    """
    for field, way in (
        ("dtype", f"calibrate with --dtype {spec.dtype}"),
        ("expert_bits", f"simulate with --quant {measured.dtype}"),
    ):
        wanted, got = getattr(spec, field), getattr(measured, field)
        if wanted != got:
            raise InputError(f"profile must be measured with {field} {wanted}, as in the model, got {got} ({way})")


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[], None]]:
    """A progress bar over forward passes, where stderr is a terminal, redrawn at most once in a while."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task, done = bar.add_task("simulating", total=steps), 0

        def advance() -> None:
            nonlocal done
            done += 1
            if not done % 64:
                bar.update(task, completed=done)

        yield advance
