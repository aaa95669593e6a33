"""The work of ``moetwin sweep``: what its sub-commands run, read, print and write."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from analysis import text
from analysis.cache_tables import PLOTS, check_out, write_figure
from analysis.crossovers import Crossing, Lead, crossings, leads, pareto
from analysis.sweep_table import Shown, SweepTable, View, figure_label, lower_is_better, shown
from sim.sweep.backends import backend_of
from sim.sweep.grid import Grid
from sim.sweep.point import Outcome
from sim.sweep.run import run_sweep
from sim.sweep.store import TABLE

__all__ = ["View", "plot", "run"]

FAILED = 1
"""Exit code of a sweep with a point that failed for no reason that its settings give."""

MOST_REASONS = 5


def run(grid: Path, out: Path, *, jobs: int, backend: str, scheduler: str | None, resume: bool, as_json: bool) -> None:
    """Runs a grid, or what of it is not known yet, and tells what came of it."""
    where = backend_of(backend, jobs=jobs, scheduler=scheduler)
    with _progress() as (begun, ended):
        table = run_sweep(Grid.load(grid), out, where, resume=resume, begun=begun, ended=ended)
    if as_json:
        typer.echo(table.to_json(orient="records", lines=True, double_precision=15), nl=False)
    else:
        _tell_run(table, out)
    if (table.status == "failed").any():
        raise typer.Exit(FAILED)


def _tell_run(table: pd.DataFrame, out: Path) -> None:
    console = Console(highlight=False)
    counts = Counter(table.status)
    told = ", ".join(f"{count:,} {status}" for status, count in counts.items())
    console.print(f"{len(table):,} points: {told}", markup=False)
    reasons = Counter(table.reason[table.status != "ok"])
    for reason, count in reasons.most_common(MOST_REASONS):
        console.print(f"{count:,} x {reason}", markup=False, soft_wrap=True)
    if len(reasons) > MOST_REASONS:
        console.print(f"and {len(reasons) - MOST_REASONS} more reasons, in the table")
    console.print(f"out: {out / TABLE}", markup=False, soft_wrap=True)


@contextmanager
def _progress() -> Iterator[tuple[Callable[[int, int], None], Callable[[Outcome], None]]]:
    """A bar over points, where stderr is a terminal, and the times that have passed and are left."""
    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("checking", total=None)
        others: Counter[str] = Counter()

        def begun(known: int, todo: int) -> None:
            bar.update(task, description="points", total=todo)
            if known:
                console.print(f"note: {known:,} runs are known, {todo:,} are left")

        def ended(outcome: Outcome) -> None:
            others.update([outcome.status])
            told = "".join(f", {others[status]:,} {status}" for status in ("refused", "failed") if others[status])
            bar.update(task, advance=1, description=f"points{told}")

        yield begun, ended


def plot(folder: Path, view: View, *, out: Path | None, as_json: bool, force: bool) -> None:
    """Tells what a sweep shows, and draws it where ``out`` is given."""
    check_out(out, PLOTS, force=force)
    picture = shown(SweepTable.load(folder), view)
    figure, words, records = _PICTURES[picture.kind](picture, out is not None)
    if out is not None:
        write_figure(figure, out)
    for name in dict.fromkeys((picture.value, picture.x.name)):
        if unknown := picture.table.unknown(name):
            typer.echo(f"note: {unknown}", err=True)
    if as_json:
        for record in records:
            typer.echo(json.dumps(record))
        return
    console = Console(highlight=False)
    for line in words:
        console.print(line, markup=False, soft_wrap=True)
    if picture.table.left_out:
        console.print(f"left out: {picture.table.left_out:,} points that did not run")
    if out is not None:
        console.print(f"out: {out}", markup=False, soft_wrap=True)


Picture = tuple[Any, list[str], list[dict[str, Any]]]
"""A figure (None unless it is wanted), what it says in words, and as records."""


def _lines(picture: Shown, draw: bool) -> Picture:
    found, stretches = _crossed(picture)
    words = _told_leads(stretches, picture) if stretches else _told_best(picture)
    figure = None
    if draw:
        from analysis.plots_sweep import lines

        figure = lines(picture, stretches)
    return figure, words, _records(found, picture)


def _crossovers(picture: Shown, draw: bool) -> Picture:
    found, stretches = _crossed(picture)
    words = [*_told_leads(stretches, picture), *(_told_crossing(one, picture) for one in found)]
    if not found:
        words.append(f"no two of {', '.join(picture.curves())} cross")
    figure = None
    if draw:
        from analysis.plots_sweep import crossovers

        figure = crossovers(picture, found)
    return figure, words, _records(found, picture)


def _heatmap(picture: Shown, draw: bool) -> Picture:
    figure = None
    if draw:
        from analysis.plots_sweep import heatmap

        figure = heatmap(picture)
    return figure, _told_best(picture), [_best(picture)]


def _pareto(picture: Shown, draw: bool) -> Picture:
    from analysis.plots_sweep import front, point_name

    frame, cost = picture.table.frame, picture.x.name
    best = pareto(frame[cost].tolist(), frame[picture.value].tolist(), lower=lower_is_better(picture.value))
    words = [f"{len(best)} of {len(frame)} points are beaten by no other, from the least {_label(cost)} on:"]
    records = []
    for place in best:
        row = frame.iloc[place]
        words.append(f"  {point_name(picture, place)}: {_shown(cost, row)}, {_shown(picture.value, row)}")
        records.append({**{axis.name: _plain(row[axis.name]) for axis in picture.table.axes.values()}})
        records[-1] |= {cost: float(row[cost]), picture.value: float(row[picture.value])}
    return front(picture, best) if draw else None, words, records


_PICTURES: dict[str, Callable[[Shown, bool], Picture]] = {
    "lines": _lines,
    "crossovers": _crossovers,
    "heatmap": _heatmap,
    "pareto": _pareto,
}


def _crossed(picture: Shown) -> tuple[list[Crossing], list[Lead]]:
    """Crossings and stretches of a picture of lines; none where x is words, or there is one line."""
    if picture.x.numbers is None or picture.hue is None or len(picture.x.numbers) < 2:
        return [], []
    x, curves = picture.x.numbers, picture.curves()
    lower = lower_is_better(picture.value)
    return (
        crossings(x, curves, log=picture.x.log, lower=lower),
        leads(x, curves, log=picture.x.log, lower=lower),
    )


def _records(found: Sequence[Crossing], picture: Shown) -> list[dict[str, Any]]:
    return [{"axis": picture.x.name, "value": picture.value, **asdict(one)} for one in found]


def _told_leads(stretches: Sequence[Lead], picture: Shown) -> list[str]:
    """Who leads where, as one sentence."""
    x = picture.x
    parts = []
    for place, one in enumerate(stretches):
        who = " and ".join(one.names) + (" alike" if len(one.names) > 1 else "")
        if len(stretches) == 1:
            parts.append(f"{who} from {x.told(one.start)} to {x.told(one.end)}")
        elif place == 0:
            parts.append(f"{who} below {x.told(one.end)}")
        elif place == len(stretches) - 1:
            parts.append(f"{who} above {x.told(one.start)}")
        else:
            parts.append(f"{who} from {x.told(one.start)} to {x.told(one.end)}")
    return [f"{_ranked(picture.value)}: {', '.join(parts)}"] if parts else []


def _told_crossing(one: Crossing, picture: Shown) -> str:
    x = picture.x
    return (
        f"{one.below} wins below {x.told(one.x)}, {one.above} above "
        f"(interpolated between {x.told(one.low)} and {x.told(one.high)})"
    )


def _best(picture: Shown) -> dict[str, Any]:
    """The place with the best value, over all axes that are shown."""
    value, names = picture.value, [axis.name for axis in (picture.x, picture.y, picture.hue) if axis is not None]
    names = [name for name in picture.table.axes if name in names]
    means = picture.table.frame.groupby(names, sort=False, as_index=False)[value].mean()
    place = means[value].idxmin() if lower_is_better(value) else means[value].idxmax()
    return {name: _plain(means[name][place]) for name in (*names, value)}


def _told_best(picture: Shown) -> list[str]:
    best = _best(picture)
    at = ", ".join(f"{name} {value}" for name, value in best.items() if name != picture.value)
    return [f"{_ranked(picture.value)}: {_shown(picture.value, best)} at {at}"]


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _ranked(figure: str) -> str:
    return f"{'lowest' if lower_is_better(figure) else 'highest'} {_label(figure)}"


def _label(figure: str) -> str:
    return figure_label(figure)[0].rpartition(" (")[0] or figure_label(figure)[0]


def _shown(figure: str, row: Any) -> str:
    """A figure of a row with its unit."""
    label, scale = figure_label(figure)
    unit = label.rpartition(" (")[2].removesuffix(")") if label.endswith(")") else ""
    return text.percent(float(row[figure])) if unit == "%" else text.number(float(row[figure]) * scale, unit)
