"""Sub-commands of the simulator: one simulated run, and the catalogues of models and machines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from sim import options
from sim.costs import Costs, RooflineCosts
from sim.profile import ProfileCosts
from sim.results import check_folder
from sim.run import simulate as simulate_run
from sim.spec import HardwareSpec, ModelSpec, catalogue
from sim.spec.profile import Profile
from sim.target import budget_of, model_for, workload_of
from traces.shipped import find_trace
from traces.store import load as load_trace

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

models_app = typer.Typer(help="The catalogue of models: dimensions, bytes, and their sources.", no_args_is_help=True)
hardware_app = typer.Typer(
    help="The catalogue of machines: rates, fixed costs, and their sources.", no_args_is_help=True
)


@models_app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """List the models that can be simulated by name.

    Example: moetwin models list
    """
    specs = [catalogue.model(name) for name in catalogue.model_names()]
    if as_json:
        _print_json([_model_record(spec) for spec in specs])
        return
    table = _table("model", "MoE layers", "experts", "top-k", "expert MB", "outside experts GB", "parameters B")
    for spec in specs:
        table.add_row(
            spec.name,
            f"{spec.moe_layers} of {spec.layers}",
            str(spec.experts),
            str(spec.top_k),
            f"{spec.expert_bytes / 1e6:.1f}",
            f"{spec.dense_bytes / 1e9:.2f}",
            f"{spec.total_elements / 1e9:.1f}",
        )
    Console().print(table)


@models_app.command("show")
def show_model(
    name: Annotated[str, typer.Argument(help="A name of `moetwin models list`.")],
    as_json: AsJson = False,
) -> None:
    """Show every number of one model, and where it was read.

    Example: moetwin models show olmoe-1b-7b
    """
    record = _model_record(catalogue.model(name))
    if as_json:
        _print_json(record)
        return
    table = _table("field", "value")
    for field, value in record.items():
        table.add_row(field, _shown(value))
    Console().print(table)


@hardware_app.command("list")
def list_hardware(as_json: AsJson = False) -> None:
    """List the machines, and the parts that others can be composed of as gpu+cpu+link.

    Example: moetwin hardware list
    """
    machines = [catalogue.hardware(name) for name in catalogue.hardware_names()]
    parts = {kind: catalogue.part_names(kind) for kind in catalogue.PART_KINDS}
    if as_json:
        _print_json({"machines": [machine.model_dump() for machine in machines], "parts": parts})
        return
    table = _table("machine", "GPU GB", "GPU GB/s", "CPU GB/s", "link", "link GB/s")
    for spec in machines:
        table.add_row(spec.name, *_machine_cells(spec))
    console = Console()
    console.print(table)
    for kind, names in parts.items():
        console.print(f"{kind}: {', '.join(names)}", highlight=False, markup=False)


@hardware_app.command("show")
def show_hardware(
    name: Annotated[
        str, typer.Argument(help="A name of `moetwin hardware list`, gpu+cpu+link of its parts, or a TOML file.")
    ],
    as_json: AsJson = False,
) -> None:
    """Show every number of one machine, and where it comes from.

    Examples: moetwin hardware show a6000-xeon5220r

    moetwin hardware show rtx4090+xeon6330+pcie4-x16
    """
    spec = _machine(name)
    if as_json:
        _print_json(spec.model_dump())
        return
    table = _table("part", "field", "value")
    for part, value in spec.model_dump().items():
        for field, number in value.items() if isinstance(value, dict) else [("", value)]:
            table.add_row(part, field, _shown(number))
        table.add_section()
    Console().print(table)


def simulate(
    trace: Annotated[str, typer.Argument(help="A trace file, or the name of one that ships.", show_default=False)],
    evict: options.Evict = "lru",
    place: options.Place = "fetch",
    prefetch: options.Prefetch = "none",
    scope: options.Scope = "layer",
    cache: options.Cache = None,
    gpu_memory: options.GpuMemory = None,
    model: Annotated[str | None, typer.Option(help="A model of `moetwin models list`; else the trace's own.")] = None,
    quant: Annotated[str | None, typer.Option(help="Format of the experts: fp32, bf16, int8, int4...")] = None,
    hardware: Annotated[
        str, typer.Option(help="A machine of `moetwin hardware list`, gpu+cpu+link, or a TOML file.")
    ] = "rtx4090-epyc9374f",
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


def _costs(spec: ModelSpec, hardware: str, profile: Path | None) -> tuple[str, Costs]:
    if profile is not None:
        measured = Profile.load(profile)
        return measured.name, ProfileCosts(measured, spec)
    machine = _machine(hardware)
    return machine.name, RooflineCosts(spec, machine)


def _machine(name: str) -> HardwareSpec:
    return catalogue.load_hardware_file(Path(name)) if name.endswith(".toml") else catalogue.hardware(name)


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


def _model_record(spec: ModelSpec) -> dict[str, Any]:
    derived = {
        "expert_bytes": spec.expert_bytes,
        "dense_bytes": spec.dense_bytes,
        "kv_bytes_per_token": spec.kv_bytes_per_token,
        "total_elements": spec.total_elements,
    }
    return {**spec.model_dump(), **derived}


def _machine_cells(spec: HardwareSpec) -> list[str]:
    return [
        f"{spec.gpu.memory_bytes / 1e9:.0f}",
        f"{spec.gpu.bytes_per_s / 1e9:.0f}",
        f"{spec.cpu.bytes_per_s / 1e9:.0f}",
        spec.link.name,
        f"{spec.link.bytes_per_s / 1e9:.1f}",
    ]


def _table(*columns: str) -> Table:
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    table.columns[0].no_wrap = True
    return table


def _shown(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value).replace("[", r"\[")
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2))
