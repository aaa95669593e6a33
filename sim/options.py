"""Command-line options that simulated and measured runs share, and what they mean."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from sim.results import RunResult
from sim.spec import catalogue
from sim.systems import SystemSpec
from traces import store
from traces.errors import InputError
from traces.schema import Trace
from traces.shipped import find_trace

if TYPE_CHECKING:
    from sim.replay.calibration import TraceCalibration


def _not_empty(text: str | None) -> str | None:
    """Raises :class:`InputError` for an empty capacity, which is not the same as none given."""
    if text is not None and not text.strip():
        raise InputError(f"cache must be a number of slots or a percentage, got {text!r}")
    return text


Evict = Annotated[
    str, typer.Option(help="Who leaves the cache: lru, lfu, lfru, mrs... (`moetwin cache policies` lists all).")
]
Calibration = Annotated[
    str | None,
    typer.Option(help="Another trace, for policies that are fitted (static, belady-imitator)."),
]
Place = Annotated[str, typer.Option(help="Where a missing expert runs: fetch, or cpu-on-miss.")]
Prefetch = Annotated[str, typer.Option(help="What is copied ahead: none, or next-router.")]
Scope = Annotated[str, typer.Option(help="layer: each layer has its own slots; global: all share one pool.")]
Cache = Annotated[
    str | None,
    typer.Option(
        help="Experts that fit on the GPU: a share such as 25%, or slots.", show_default="25%", callback=_not_empty
    ),
]
GpuMemory = Annotated[str | None, typer.Option(help="GPU memory to fit into, such as 8GiB, instead of --cache.")]
Synchronous = Annotated[bool, typer.Option("--synchronous", help="One operation at a time, demand only (for parity).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Force = Annotated[bool, typer.Option("--force", help="Write into a folder, or over a file, that exists.")]


def system_of(**choice: Any) -> SystemSpec:
    """The system that the options describe.

    Raises :class:`InputError` with the near names for an unknown policy, and for a prefetch that would not be run.
    """
    try:
        system = SystemSpec(**choice)
    except ValidationError as error:
        cause = error.errors()[0].get("ctx", {}).get("error")
        raise cause if isinstance(cause, InputError) else InputError(catalogue.first_fault(error)) from error
    if system.synchronous and system.prefetch != "none":
        raise InputError(f"prefetch must be none with synchronous (demand only), got {system.prefetch}")
    return system


def calibration_of(name: str | None, judged: Trace | None, batch: int) -> TraceCalibration | None:
    """The calibration trace of that name, over ``batch`` lanes, for policies that are judged on another one.

    Raises :class:`InputError` when the two are the same, or of different dimensions.
    """
    if name is None:
        return None
    from sim.replay.calibration import TraceCalibration  # numba is imported with it

    return TraceCalibration.of(store.load(find_trace(name)), judged, batch)


COUNTS = frozenset({"decode_tokens", "late_hits", "misses", "cpu_experts"})
"""Headline figures that are whole numbers."""


def show_run(run: RunResult, *, as_json: bool, **extra: str) -> None:
    """Prints the headline figures of a run, as a table or as one JSON object with ``extra`` added."""
    figures = {
        name: int(value) if name in COUNTS and value is not None else value for name, value in run.headline().items()
    }
    if as_json:
        typer.echo(json.dumps({**run.info.model_dump(), **figures, **extra}))
        return
    system = SystemSpec(**run.info.system)
    table = Table(title=f"{run.info.model}, {system.label()}, {run.info.source}", box=None, show_header=False)
    for label, value in _lines(figures):
        table.add_row(label, value)
    slots = f"{run.info.capacity_slots} slots of experts, {run.info.capacity_bytes / 1e6:,.1f} MB"
    table.add_row("cache", f"{slots}, and {run.info.staging_slots} staging slots")
    table.add_row("costs" if run.info.source == "simulated" else "machine", run.info.costs or run.info.hardware)
    for label, value in extra.items():
        table.add_row(label, value)
    for note in run.info.notes:
        table.add_row("note", note)
    Console(highlight=False).print(table)


def _lines(figures: dict[str, float | None]) -> list[tuple[str, str]]:
    def shown(name: str, pattern: str, scale: float = 1.0) -> str:
        value = figures[name]
        return "none decoded" if value is None else pattern.format(value * scale)

    token_p50, token_p99 = (shown(f"time_per_output_token_{part}_s", "{:.2f}", 1e3) for part in ("p50", "p99"))
    return [
        ("decode tokens", shown("decode_tokens", "{:,.0f}")),
        ("tokens a second", shown("tokens_per_s", "{:,.1f}")),
        ("time per output token, p50 / p99", f"{token_p50} / {token_p99} ms"),
        ("time to first token, p50", shown("time_to_first_token_p50_s", "{:.2f} ms", 1e3)),
        ("hit ratio, by distinct expert", shown("hit_ratio_union", "{:.4f}")),
        ("late hits", shown("late_hits", "{:,.0f}")),
        ("misses", shown("misses", "{:,.0f}") + shown("cpu_experts", ", of which {:,.0f} on the CPU")),
        ("bytes fetched a token", shown("demand_bytes_per_token", "{:,.2f} MB", 1e-6)),
        ("share of time stalled", shown("stall_share", "{:.1%}")),
    ]
