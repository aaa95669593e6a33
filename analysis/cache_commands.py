"""The work of ``moetwin cache``: what its sub-commands read, replay, print and write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import typer

from analysis import cache_tables as tables
from analysis import text
from analysis.cache_curves import Curves, Unit, frame_rows, measure, settings_at, with_intervals
from analysis.cache_options import Request, Session, capacities_of, name_of, one_of, phases_of
from analysis.cache_progress import progress_bar
from analysis.cache_study import cells, is_bound, run_all
from analysis.files import PLOTS, check_out, write_figure
from analysis.shuffled import order_gain
from sim.policies import EVICTION
from sim.replay.curves import ONE_PASS, Curve
from sim.replay.result import Replay
from sim.replay.settings import Contract
from traces import store
from traces.errors import InputError
from traces.locality import locality
from traces.shipped import find_trace

__all__ = ["Request", "draw_curves", "list_policies", "replay_trace", "tell_locality"]


def replay_trace(
    request: Request,
    *,
    capacity: str | None,
    size: str | None,
    phases: str,
    as_json: bool,
    out: Path | None,
    force: bool,
) -> None:
    """Replays a trace under every policy and capacity that are asked for, and shows what came of it."""
    check_out(out, (*tables.TABLES, *PLOTS), force=force)
    session = Session.of(request)
    wanted = phases_of(phases, session.feed.trace)
    settings = capacities_of(capacity, size, session)
    if out is not None and out.suffix in PLOTS and len(settings) * len(wanted) > 1:
        raise InputError(f"out must be a table for more than one capacity or phase (see cache curve), got {out}")
    _tell(session.notes)
    with progress_bar(len(session.feed.plan) * len(session.choices) * len(settings)) as progress:
        runs = [*run_all(session.feed, session.choices, settings, calibration=session.calibration, progress=progress)]
    found = list(cells(runs, session.choices, wanted, np.random.default_rng(request.seed)))
    rows = [row for cell in found for row in cell.rows]
    bound = is_bound(settings[0], session.feed.trace.header.expert_bytes)
    if out is not None and out.suffix in tables.TABLES:
        tables.write_rows(rows, out)
    elif out is not None:
        _draw_policies(runs[0], wanted[0], request.seed, out, title=session.name, bound=bound)
    if as_json:
        tables.echo_rows(rows)
        return
    tables.print_replays(found, title=_title(session), bound=bound, phases=wanted != ["all"])
    _say(out)


def _draw_policies(replays: Sequence[Replay], phase: str, seed: int, out: Path, *, title: str, bound: bool) -> None:
    from analysis.plots_cache import policies_at

    table = with_intervals(replays, phase, np.random.default_rng(seed))
    write_figure(policies_at(table, title, bound=bound), out)


def _say(out: Path | None) -> None:
    if out is not None:
        typer.echo(f"out: {out}")


def _title(session: Session) -> str:
    """What was replayed, and how: what a figure needs beside it to be compared with another."""
    feed, settings, header = session.feed, session.settings, session.feed.trace.header
    batch = feed.plan.batch
    groups = "sequences, one at a time" if batch == 1 else f"lock-step batches of {batch} sequences"
    pool = "one pool for all layers" if settings.scope == "global" else "a pool each layer"
    order = f" ({settings.order})" if settings.contract == "serial" else ""
    return (
        f"{session.name}: {header.layers} layers x {header.experts} experts, top-{header.top_k}; "
        f"{len(feed.trace):,} tokens in {len(feed.plan):,} passes, {feed.plan.groups:,} {groups}\n"
        f"{pool}, {settings.contract} contract{order}, cache {_CACHES[settings.sequences]}, "
        f"{feed.warmup_steps:,} passes of warm-up not counted, seed {settings.seed}"
    )


_CACHES = {"carry": "carried across sequences", "fresh": "empty at each sequence"}


def _tell(notes: Sequence[str]) -> None:
    for note in notes:
        typer.echo(f"note: {note}", err=True)


def draw_curves(
    request: Request,
    *,
    capacity: str,
    unit: str,
    phase: str,
    as_json: bool,
    out: Path | None,
    force: bool,
) -> None:
    """Finds the hits of LRU and Belady at every capacity, and of other policies at the capacities named."""
    check_out(out, (*tables.TABLES, *PLOTS), force=force)
    session = Session.of(request)
    counted = one_of("unit", unit, Unit)
    wanted = phases_of(phase, session.feed.trace)
    if len(wanted) > 1:
        raise InputError(f"phase must be one of all, prefill and decode, got {phase}")
    settings = settings_at(capacity, counted, session)
    if out is not None and out.suffix in PLOTS and all(one.name not in ONE_PASS for one in session.choices):
        raise InputError(f"policies must have {' or '.join(ONE_PASS)} among them for a plot, got {request.policies}")
    _tell(session.notes)
    with progress_bar(len(session.feed.plan) * len(session.choices) * len(settings)) as progress:
        found = measure(session, settings, counted, wanted[0], progress)
    exact, sampled = found.exact(), found.sampled(np.random.default_rng(request.seed))
    rows = frame_rows(exact, session) + frame_rows(sampled, session)
    if out is not None and out.suffix in tables.TABLES:
        tables.write_rows(rows, out)
    elif out is not None:
        _draw_curves(found, exact, sampled, out, session.name)
    if as_json:
        tables.echo_rows(rows)
        return
    _print_curves(session, found)
    _say(out)


def _draw_curves(
    found: Curves, exact: pd.DataFrame | None, sampled: pd.DataFrame | None, out: Path, title: str
) -> None:
    from analysis.plots_cache import hit_curves, marks_of

    marks = marks_of(found.lines[0], phase=found.phase)
    write_figure(hit_curves(exact, sampled, marks, title), out)


def _print_curves(session: Session, found: Curves) -> None:
    columns = {setting.capacity.label: found.at(place) for place, setting in enumerate(found.settings)}
    bound = all(line.exact for line in found.lines)
    table = tables.curve_table(columns, [choice.name for choice in session.choices], bound=bound)
    console = tables.console(table)
    tables.print_lines(console, _title(session))
    console.print(table)
    if found.lines:
        knees = "; ".join(_knee(line, found.phase) for line in found.lines)
        experts = session.feed.trace.header.experts
        tables.print_lines(
            console,
            f"knees: {knees}",
            f"beyond its knee a policy gains, on average, less than 1/{experts} of the hit "
            "ratio from one more slot in every layer",
        )
    tables.print_lines(console, *(f"{line.policy}: {line.note}" for line in found.lines if line.note))


def _knee(line: Curve, phase: str) -> str:
    place = line.knee(phase=phase)
    share = text.percent(line.shares()[place])
    return f"{line.policy} at {line.capacities[place]:,} {line.unit} of a pool ({share} of all)"


def tell_locality(trace: str, *, contract: str, seed: int, as_json: bool, out: Path | None, force: bool) -> None:
    """Shows what popularity and order of a trace's routing promise, and what order is worth to LRU."""
    judged = one_of("contract", contract, Contract)
    check_out(out, PLOTS, force=force)
    loaded = store.load(find_trace(trace))
    rng, name = np.random.default_rng(seed), name_of(loaded, trace)
    with progress_bar(6 * loaded.header.layers, "windows, layer by layer") as progress:
        record = locality(loaded, rng=rng, progress=lambda done, total: progress("windows, layer by layer", 1))
    with progress_bar(2 * len(loaded), "LRU, as recorded and shuffled") as progress:
        lru = order_gain(
            loaded, rng=rng, contract=judged, progress=lambda passes: progress("LRU, as recorded and shuffled", passes)
        )
    record = {"trace_digest": loaded.digest, "seed": seed, "contract": judged, **record, "lru": lru}
    if out is not None:
        from analysis.plots_cache import locality as draw_locality

        write_figure(draw_locality(record, name), out)
    if as_json:
        typer.echo(json.dumps(record, allow_nan=False))
    else:
        tables.print_locality(record, name)
        _say(out)


def list_policies(*, as_json: bool) -> None:
    """Lists the registered eviction policies: what leaves, what they need, constants, and sources."""
    rows = [tables.policy_row(name, kind) for name, kind in EVICTION.items()]
    if as_json:
        tables.echo_rows(rows)
    else:
        table = tables.policy_table(rows)
        tables.console(table).print(table)
