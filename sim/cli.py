"""Sub-commands of the simulator: the catalogues of models, machines and systems."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.table import Table

from sim.presets import find_preset, preset, preset_names
from sim.printing import console_for
from sim.spec import BITS_PER_WEIGHT, HardwareSpec, ModelSpec, catalogue
from sim.spec.overrides import handy
from sim.systems import KINDS
from traces.errors import InputError

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", help="Your own number in place of one, as NAME=VALUE. Repeatable.")
]

models_app = typer.Typer(help="The catalogue of models: dimensions, bytes, and their sources.", no_args_is_help=True)
hardware_app = typer.Typer(
    help="The catalogue of machines: rates, fixed costs, and their sources.", no_args_is_help=True
)

systems_app = typer.Typer(help="Published systems: the policies that each one is made of.", no_args_is_help=True)


@systems_app.command("list")
def list_systems(as_json: AsJson = False) -> None:
    """List the published systems, and the policies that each one is made of.

    Example: moetwin systems list
    """
    presets = [preset(name) for name in preset_names()]
    if as_json:
        _print_json([one.model_dump() for one in presets])
        return
    table = _table("system", "evict, place, prefetch", "what it is")
    for one in presets:
        system = one.system
        pool = " (one pool)" if system.scope == "global" else ""
        told = one.summary + (" (simulated only)" if one.sim_only else "")
        table.add_row(one.name, f"{system.evict}{pool}, {system.place}, {system.prefetch}", told)
    console_for(table).print(table)


@systems_app.command("show")
def show_system(
    name: Annotated[str, typer.Argument(help="A name of `moetwin systems list`, or a TOML file.")],
    as_json: AsJson = False,
) -> None:
    """Show what one system is made of, the constants of its policies, its source, and what it leaves out of that.

    Examples:

      moetwin systems show hybrimoe

      moetwin systems show my_system.toml
    """
    found = find_preset(name)
    system = found.system
    constants = {
        f"{kind}.{constant}": value
        for kind in KINDS
        for constant, value in {**system.policy(kind).defaults, **system.options_of(kind)}.items()
    }
    record = {**system.model_dump(exclude={"options"}), **found.model_dump(exclude={"system"}), "options": constants}
    if as_json:
        _print_json(record)
        return
    table = _table("field", "value")
    for field, value in record.items():
        if isinstance(value, dict):
            for constant, number in value.items():
                table.add_row(f"{field} {constant}", _shown(number))
        else:
            table.add_row(field, _shown(value))
    console_for(table).print(table)


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
    console_for(table).print(table)


@models_app.command("show")
def show_model(
    name: Annotated[str, typer.Argument(help="A name of `moetwin models list`, or a TOML file.")],
    changes: Changes = None,
    as_json: AsJson = False,
) -> None:
    """Show every number of one model, and where it was read.

    Examples:

      moetwin models show olmoe-1b-7b

      moetwin models show deepseek-v2-lite --set expert_bits=4.5

      moetwin models show mine.toml
    """
    spec = catalogue.overridden_model(catalogue.find_model(name), catalogue.settings_of(changes or (), "set"))
    record = _model_record(spec)
    if as_json:
        _print_json(record)
        return
    table = _table("field", "value")
    for field, value in record.items():
        table.add_row(field, _shown(value))
    table.add_section()
    for quant in BITS_PER_WEIGHT:
        table.add_row(f"expert_bytes in {quant}", _shown(spec.with_experts_in(quant).expert_bytes))
    console_for(table).print(table)


@hardware_app.command("list")
def list_hardware(as_json: AsJson = False) -> None:
    """List the machines, and the parts that others can be composed of as gpu+cpu+link, with +host or +disk after it.

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
    console = console_for(table)
    console.print(table)
    for kind, names in parts.items():
        console.print(f"{kind}: {', '.join(names)}", markup=False)


@hardware_app.command("show")
def show_hardware(
    name: Annotated[
        str,
        typer.Argument(help="A machine or part of `moetwin hardware list`, gpu+cpu+link of its parts, or a TOML file."),
    ],
    changes: Changes = None,
    as_json: AsJson = False,
) -> None:
    """Show every number of one machine, or of a part, how to change it, and where it comes from. A part may be a TOML
    file.

    Examples:

      moetwin hardware show a6000-xeon5220r

      moetwin hardware show a6000

      moetwin hardware show rtx4090+xeon6330+pcie4-x16+nvme-pcie4

      moetwin hardware show rtx4090-pcie4 --set link.gb_per_s=12 --set regime=graph
    """
    record = _hardware_record(name, changes or ())
    if as_json:
        _print_json(record)
        return
    table = _table("part", "field", "value", "to change it")
    table.columns[1].no_wrap = table.columns[3].no_wrap = True
    for part, value in record.items():
        if value is None:
            continue
        fields = value if isinstance(value, dict) else {"": value}
        for field, number in fields.items():
            table.add_row(part, field, _shown(number), _setting(part, field, number))
        table.add_section()
    console_for(table).print(table)


def _hardware_record(name: str, changes: Sequence[str]) -> dict[str, Any]:
    """A machine, or else the parts of that name, by kind; raises :class:`InputError` for what is neither."""
    parts = {} if name in catalogue.hardware_names() else catalogue.find_parts(name)
    if parts:
        if changes:
            raise InputError(f"set must be left out for a part, which is changed in a machine, got {changes[0]}")
        return {kind: part.model_dump() for kind, part in parts.items()}
    spec = catalogue.overridden(catalogue.find_hardware(name, parts=True), catalogue.settings_of(changes, "set"))
    return spec.model_dump()


def _setting(part: str, field: str, value: object) -> str:
    """What ``--set`` is told to give a field the value that it has; empty for what cannot be set."""
    if field in ("name", "source") or (not field and part != "regime"):
        return ""
    name, scale = handy(field)
    shown = str(value).lower()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        shown = f"{value / scale:g}"
    return f"{part}.{name}={shown}" if field else f"{part}={shown}"


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
        f"{spec.cpu.reached_bytes_per_s / 1e9:.0f}",
        spec.link.name,
        f"{spec.link.reached_bytes_per_s / 1e9:.1f}",
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
