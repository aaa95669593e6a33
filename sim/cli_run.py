"""`moetwin simulate`: one run in simulated time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from sim import options
from sim.cli import machine_of
from sim.costs import Costs, RooflineCosts
from sim.profile import ProfileCosts
from sim.results import check_folder
from sim.run import simulate as simulate_run
from sim.spec import ModelSpec
from sim.spec.catalogue import REFERENCE_MACHINE
from sim.spec.profile import Profile
from sim.target import budget_of, model_for, workload_of
from traces.errors import InputError
from traces.shipped import find_trace
from traces.store import load as load_trace


def simulate(
    trace: Annotated[str, typer.Argument(help="A trace file, or the name of one that ships.", show_default=False)],
    evict: options.Evict = "lru",
    place: options.Place = "fetch",
    prefetch: options.Prefetch = "none",
    scope: options.Scope = "layer",
    cache: options.Cache = None,
    gpu_memory: options.GpuMemory = None,
    model: Annotated[
        str | None, typer.Option(help="A model of the catalogue, or a TOML file; else the trace's own.")
    ] = None,
    quant: Annotated[str | None, typer.Option(help="Format of the experts: fp32, bf16, int8, int4...")] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            help="A machine of `moetwin hardware list`, gpu+cpu+link, or a TOML file.",
            show_default=REFERENCE_MACHINE,
        ),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Measured costs of `moetwin calibrate`, not a catalogue.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences decoded together, in lock-step.")] = 1,
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

      moetwin simulate mixed --profile here.toml --prefetch next-router --json
    """
    system = options.system_of(evict=evict, place=place, prefetch=prefetch, scope=scope, synchronous=synchronous)
    if profile is not None and hardware is not None:
        raise InputError(f"hardware must not be given together with profile, got {hardware} and {profile}")
    if out is not None:
        check_folder(out, force=force)
    recorded = load_trace(find_trace(trace))
    spec = model_for(recorded, model, quant)
    workload, context = workload_of(recorded, spec, batch)
    budget = budget_of(spec, lanes=batch, context=context, cache=cache, gpu_memory=gpu_memory, scope=scope)
    machine, costs = _costs(spec, hardware, profile)
    with _progress(len(workload)) as progress:
        run = simulate_run(workload, system, budget, costs, hardware=machine, events=events, progress=progress)
    extra = {} if out is None else {"result": str(run.save(out, force=force))}
    options.show_run(run, as_json=as_json, **extra)


def _costs(spec: ModelSpec, hardware: str | None, profile: Path | None) -> tuple[str, Costs]:
    if profile is not None:
        measured = Profile.load(profile)
        return measured.name, ProfileCosts(measured, spec)
    machine = machine_of(hardware or REFERENCE_MACHINE)
    return machine.name, RooflineCosts(spec, machine)


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr over forward passes, redrawn at most once in a while."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task, done = bar.add_task("simulating", total=steps), 0

        def advance() -> None:
            nonlocal done
            done += 1
            if not done % 64:
                bar.update(task, completed=done)

        yield advance
