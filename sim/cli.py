"""Sub-commands of the simulator: the catalogues of models and machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sim.spec import HardwareSpec, ModelSpec, catalogue

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
    spec = machine_of(name)
    if as_json:
        _print_json(spec.model_dump())
        return
    table = _table("part", "field", "value")
    for part, value in spec.model_dump().items():
        for field, number in value.items() if isinstance(value, dict) else [("", value)]:
            table.add_row(part, field, _shown(number))
        table.add_section()
    Console().print(table)


def machine_of(name: str) -> HardwareSpec:
    """The machine that a user names: a file of theirs, or one of the catalogue."""
    return catalogue.load_hardware_file(Path(name)) if name.endswith(".toml") else catalogue.hardware(name)


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
