"""Command-line options that simulated and measured runs share, and what they mean."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.table import Table

from sim.constants import constant_of
from sim.memory import MemoryPlan
from sim.policies import PLACEMENT, PREFETCH
from sim.presets import Preset, find_preset, preset_names
from sim.printing import console_for
from sim.results import RunResult
from sim.spec import catalogue
from sim.systems import KINDS, Constant, SystemSpec, loads_beforehand, no_constant
from traces import store
from traces.errors import InputError, unknown_name
from traces.schema import Trace
from traces.shipped import find_trace

if TYPE_CHECKING:
    from sim.replay.calibration import TraceCalibration


def _listed(text: str | None) -> str | None:
    """Raises :class:`InputError` for an empty list of systems, which is not the same as none given."""
    if text is not None and not text.strip(" ,"):
        raise InputError(f"systems must be names with commas, or all, got {text!r}")
    return text


System = Annotated[
    str | None, typer.Option(help="A published system of `moetwin systems list`, or a TOML file of your own.")
]
Systems = Annotated[
    str | None, typer.Option(help="Several systems side by side: names with commas, or all.", callback=_listed)
]
Evict = Annotated[
    str | None,
    typer.Option(
        help="Who leaves the cache: lru, lfu, lfru, mrs... (`moetwin cache policies` lists all).", show_default="lru"
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(help="Another trace, for what is fitted (static, belady-imitator, slots by miss costs)."),
]
Place = Annotated[
    str | None,
    typer.Option(help=f"Where a missing expert runs: {', '.join(PLACEMENT)}.", show_default="fetch"),
]
Prefetch = Annotated[
    str | None, typer.Option(help=f"What is copied ahead: {', '.join(PREFETCH)}.", show_default="none")
]
PolicyFile = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE.py:CLASS", help="A policy of your own, of any kind. Repeatable."),
]
Option = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="KIND.NAME=VALUE",
        help="A policy's constant: evict.alpha=0.3, prefetch.depth=2. Repeatable.",
    ),
]
Scope = Annotated[
    str | None,
    typer.Option(help="layer: each layer has its own slots; global: all share one pool.", show_default="layer"),
]
Cache = Annotated[
    str | None,
    typer.Option(help="Experts that fit on the GPU: a share such as 25%, or slots.", show_default="25%"),
]
GpuMemory = Annotated[str | None, typer.Option(help="GPU memory to fit into, such as 8GiB, instead of --cache.")]
Synchronous = Annotated[bool, typer.Option("--synchronous", help="One operation at a time, demand only (for parity).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
AsJsonLines = Annotated[
    bool, typer.Option("--json", help="Print one JSON object instead of a table; with --systems JSON Lines, one each.")
]
Force = Annotated[bool, typer.Option("--force", help="Write into a folder, or over a file, that exists.")]


def system_of(
    system: str | None = None,
    *,
    policy_file: Sequence[str] = (),
    option: Sequence[str] = (),
    **changes: Any,
) -> Preset:
    """The system that the options describe: a published one or a file's, with ``changes`` of its fields.

    A change of None is none. Raises :class:`InputError` with the near names for an unknown policy, and for a prefetch
    that would not be run.
    """
    base = Preset(system=SystemSpec()) if system is None else find_preset(system)
    changes = {field: value for field, value in changes.items() if value is not None and value is not False}
    for text in policy_file:
        from sim.custom import kind_of

        kind = kind_of(text)
        if kind in changes:
            raise InputError(f"{kind} must be given once, got {changes[kind]} and {text}")
        changes[kind] = text
    if "evict" in changes and loads_beforehand(changes["evict"]):  # it brings the set that the cache starts with
        changes["starts_with"] = ""
    fields = base.system.model_dump() | changes
    fields["options"] = {kind: values for kind, values in fields["options"].items() if kind not in changes}
    if base.name and changes:
        fields["name"] = (
            f"{base.name} with {', '.join(f'{field} {value}' for field, value in changes.items() if value)}"
        )
    spec = _checked(fields)
    if option:
        spec = _checked(spec.model_dump() | {"options": _options(spec, option), "name": _named(spec.name, option)})
    if spec.synchronous and spec.prefetch != "none":
        raise InputError(f"prefetch must be none with synchronous (demand only), got {spec.prefetch}")
    kept = {
        name: {field: value for field, value in getattr(base, name).items() if field not in changes}
        for name in ("uncalibrated", "without_residuals")
    }
    return base.model_copy(update={"system": spec, **kept})


def _named(name: str, option: Sequence[str]) -> str:
    """The name of a published system with its constants changed; a system without a name tells them in its label."""
    told = ", ".join(" ".join(part.strip() for part in text.split("=", 1)) for text in option)
    return name and f"{name}{', ' if ' with ' in name else ' with '}{told}"


@dataclass(frozen=True)
class SystemOptions:
    """Which systems run: options that every command about systems takes."""

    system: System = None
    systems: Systems = None
    evict: Evict = None
    place: Place = None
    prefetch: Prefetch = None
    policy_file: PolicyFile = None
    option: Option = None
    scope: Scope = None
    synchronous: Synchronous = False

    def chosen(self) -> list[Preset]:
        """The systems that are to run: the one that the options describe, or all that ``systems`` lists.

        Raises :class:`InputError` for options that contradict each other.
        """
        own = {name: getattr(self, name) for name in ("evict", "place", "prefetch", "scope", "synchronous")}
        files, constants = self.policy_file or (), self.option or ()
        if self.systems is None:
            return [system_of(self.system, policy_file=files, option=constants, **own)]
        for name, value in {"system": self.system, "policy-file": files, "option": constants, **own}.items():
            if value:
                raise InputError(f"{name} must not be given together with systems, got {value}")
        return systems_of(self.systems)


def systems_of(names: str) -> list[Preset]:
    """The systems that are listed with commas, each once, in this order; ``all`` are the published ones."""
    wanted = preset_names() if names.strip() == "all" else [name.strip() for name in names.split(",") if name.strip()]
    found = [find_preset(name) for name in dict.fromkeys(wanted)]
    for name, count in Counter(preset.name for preset in found).items():
        if count > 1:
            raise InputError(f"systems must have different names, got {name} {count} times")
    return found


def _checked(fields: dict[str, Any]) -> SystemSpec:
    try:
        return SystemSpec(**fields)
    except ValidationError as error:
        cause = error.errors()[0].get("ctx", {}).get("error")
        raise cause if isinstance(cause, InputError) else InputError(catalogue.first_fault(error)) from error


def _options(spec: SystemSpec, texts: Sequence[str]) -> dict[str, dict[str, Constant]]:
    """The constants of ``spec`` with those that options such as ``evict.alpha=0.3`` set."""
    options = {kind: dict(values) for kind, values in spec.options.items()}
    for text in texts:
        path, equals, value = text.partition("=")
        kind, _, name = path.strip().partition(".")
        if not equals or not name:
            raise InputError(f"option must be KIND.NAME=VALUE, got {text!r}")
        if kind not in KINDS:
            raise unknown_name("option", kind, KINDS)
        defaults = spec.policy(kind).defaults
        if name not in defaults:
            raise no_constant(kind, getattr(spec, kind), name, defaults)
        options.setdefault(kind, {})[name] = constant_of(defaults[name], value.strip(), path.strip())
    return options


def calibration_of(name: str | None, judged: Trace | None, batch: int) -> TraceCalibration | None:
    """The calibration trace of that name, over ``batch`` lanes, for policies that are judged on another one.

    Raises :class:`InputError` when the two are the same, or of different dimensions.
    """
    if name is None:
        return None
    from sim.replay.calibration import TraceCalibration

    return TraceCalibration.of(read_trace(name, "calibration"), judged, batch)


def read_trace(name: str, field: str) -> Trace:
    """The trace that ``field`` names; says on stderr when its content was changed."""
    path = find_trace(name, field)
    trace = store.load(path)
    for note in store.notes_on(trace, path):
        typer.echo(f"note: {note}", err=True)
    return trace


OF_REQUESTS = frozenset({"throughput, idle time included", "time per output token of a request"})
"""Lines that say something of requests that wait for each other."""
COUNTS = frozenset({"decode_tokens", "late_hits", "misses", "misses_fetched", "cpu_experts"})
"""Headline figures that are whole numbers."""


def show_run(run: RunResult, *, as_json: bool, to_stderr: bool = False, extra: Mapping[str, Any] | None = None) -> None:
    """Prints the headline figures of a run, as a table or as one JSON object with ``extra`` added.

    The table goes ``to_stderr`` where standard output has the run's own text.
    """
    figures, extra = _figures(run), extra or {}
    if as_json:
        typer.echo(json.dumps({**run.info.model_dump(), **figures, **extra}))
        return
    system = SystemSpec(**run.info.system)
    title = f"{run.info.model}, {system.label()}, {run.info.source}"
    if run.info.synthetic:
        title += ", on synthetic routing"
    table = Table(title=title, box=None, show_header=False)
    one_at_a_time = run.info.workload.get("order") == "one-at-a-time"
    for label, value in _lines(figures):
        if not (one_at_a_time and label in OF_REQUESTS):
            table.add_row(label, value)
    if run.info.prefetched_bytes:
        table.add_row("prefetched, in all", f"{run.info.prefetched_bytes / 1e6:,.1f} MB")
    slots = f"{run.info.capacity_slots} slots of experts, {run.info.capacity_bytes / 1e6:,.1f} MB"
    table.add_row("cache", f"{slots}, and {run.info.staging_slots} staging slots")
    if run.info.source == "measured":
        table.add_row("machine", run.info.hardware)
    else:
        table.add_row("costs", run.info.costs or run.info.hardware)
    if run.info.slow_token_s is not None:
        slow = f"{run.info.slow_token_s * 1e3:.2f} ms a token, p50"
        table.add_row("where every piece of work takes its p90", slow)
    for label, value in extra.items():
        table.add_row(label, value)
    for note in run.info.notes:
        table.add_row("note", note)
    console_for(table, stderr=to_stderr).print(table)


def _figures(run: RunResult) -> dict[str, float | None]:
    return {
        name: int(value) if name in COUNTS and value is not None else value for name, value in run.headline().items()
    }


def show_runs(runs: Sequence[tuple[str, RunResult]], left_out: Mapping[str, str], *, as_json: bool) -> None:
    """Prints the headline figures of several systems, a row or one JSON object each, and who was left out, and why."""
    for name, reason in left_out.items():
        typer.echo(f"left out: {name}: {reason}", err=True)
    if as_json:
        for _, run in runs:
            show_run(run, as_json=True)
        return
    columns = ("system", "tokens/s", "ms a token, p50", "p99", "hit ratio", "MB fetched a token", "stalled")
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    table.columns[0].no_wrap = True
    for name, run in runs:
        shown = dict(_lines(_figures(run)))
        token_p50, _, token_p99 = shown["time per output token, p50 / p99"].removesuffix(" ms").partition(" / ")
        hits, stalled = shown["hit ratio, by distinct expert"], shown["share of time stalled"]
        bytes_mb = shown["bytes fetched on demand, a token"].removesuffix(" MB")
        table.add_row(name, shown["tokens a second"], token_p50, token_p99, hits, bytes_mb, stalled)
    console = console_for(table)
    console.print(table)
    held = {name: f"{run.info.capacity_slots} slots, {run.info.capacity_bytes / 1e6:,.1f} MB" for name, run in runs}
    console.print(f"experts held by each: {_by_each(held)}", soft_wrap=True)
    planned = {name: MemoryPlan(**run.info.memory).told() for name, run in runs if run.info.memory}
    if planned:
        console.print(f"memory planned for each: {_by_each(planned)}", soft_wrap=True)
    for line in notes_of(runs):
        console.print(line, soft_wrap=True, markup=False)


def _by_each(values: Mapping[str, str]) -> str:
    """What most of the named ones have (the first of equals), and those that have something else."""
    common, _ = Counter(values.values()).most_common(1)[0]
    others = [f"; {name} {value}" for name, value in values.items() if value != common]
    return f"{common}{''.join(others)}"


def notes_of(runs: Sequence[tuple[str, RunResult]]) -> list[str]:
    """The notes of several systems' runs, each once, behind the names of those that it is about."""
    about: dict[str, list[str]] = {}
    for name, run in runs:
        for note in run.info.notes:
            about.setdefault(note, []).append(name)
    return [f"{_all_or(names, len(runs))}: {note}" for note, names in about.items()]


def _all_or(names: Sequence[str], count: int) -> str:
    return "all" if len(names) == count > 1 else ", ".join(names)


def _lines(figures: dict[str, float | None]) -> list[tuple[str, str]]:
    def shown(name: str, pattern: str, scale: float = 1.0) -> str:
        value = figures[name]
        return "none decoded" if value is None else pattern.format(value * scale)

    token_p50, token_p99 = (shown(f"time_per_output_token_{part}_s", "{:.2f}", 1e3) for part in ("p50", "p99"))
    of_request = (shown(f"time_per_output_token_by_request_{part}_s", "{:.2f}", 1e3) for part in ("p50", "p99"))
    return [
        ("decode tokens", shown("decode_tokens", "{:,.0f}")),
        ("throughput, idle time included", shown("throughput_tokens_per_s", "{:,.1f} tokens/s")),
        ("time per output token of a request", f"{' / '.join(of_request)} ms"),
        ("tokens a second", shown("tokens_per_s", "{:,.1f}")),
        ("time per output token, p50 / p99", f"{token_p50} / {token_p99} ms"),
        ("time to first token, p50", shown("time_to_first_token_p50_s", "{:.2f} ms", 1e3)),
        ("hit ratio, by distinct expert", shown("hit_ratio_union", "{:.4f}")),
        ("late hits", shown("late_hits", "{:,.0f}")),
        ("misses", shown("misses", "{:,.0f}") + shown("misses_fetched", ", of which {:,.0f} fetched")),
        ("experts on the CPU, also resident ones", shown("cpu_experts", "{:,.0f}")),
        ("bytes fetched on demand, a token", shown("demand_bytes_per_token", "{:,.2f} MB", 1e-6)),
        ("share of time stalled", shown("stall_share", "{:.1%}")),
    ]
