"""The work of ``moetwin sweep``: what its sub-commands run, read, print and write."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from analysis import text
from analysis.crossovers import Crossing, Lead, crossings, leads, pareto
from analysis.files import PLOTS, check_out, write_figure
from analysis.heartbeat import Heartbeat
from analysis.sweep_fairness import MEMORY, memory_line, told_of_memory, told_outside
from analysis.sweep_spread import JUDGED, judged, told_of_best, told_of_leads
from analysis.sweep_table import Axis, Shown, SweepTable, View, figure_label, lower_is_better, shown
from sim.presets import SYSTEM
from sim.sweep.backends import backend_of
from sim.sweep.grid import Grid
from sim.sweep.point import Outcome
from sim.sweep.run import run_sweep
from sim.sweep.store import TABLE

__all__ = ["View", "plot", "run"]

FAILED = 1
"""Exit code of a sweep with a point that failed for no reason that its settings give."""

MOST_REASONS = 5
NOBODY, FEW = "no point competes", "fewer than two lines compete"
NUMBER = re.compile(r"(?<![\w.+-])\d[\d,]*(?:\.\d+)?(?![\w-])")
"""A number in a note, and not in a name."""


def run(grid: Path, out: Path, *, jobs: int, backend: str, scheduler: str | None, resume: bool, as_json: bool) -> None:
    """Runs a grid, or what of it is not known yet, and tells what came of it."""
    where = backend_of(backend, jobs=jobs, scheduler=scheduler, tell=lambda text: typer.echo(f"note: {text}", err=True))
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
    ran = table[table.status == "ok"]
    competing = ran[ran.role == SYSTEM]
    memory = [memory_line(competing)] if len(competing) else []
    for line in (*memory, *told_outside(table), *_notes(ran.notes)):
        console.print(line, markup=False, soft_wrap=True)
    if table.synthetic.any():
        console.print(f"{int(table.synthetic.sum()):,} of {len(table):,} points: on synthetic routing")
    console.print(f"out: {out / TABLE}", markup=False, soft_wrap=True)


@contextmanager
def _progress() -> Iterator[tuple[Callable[[int, int], None], Callable[[Outcome], None]]]:
    """A bar over points, where stderr is a terminal, and the times that have passed and are left; else lines."""
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
        beat, left = Heartbeat("points", lambda text: typer.echo(text, err=True)), 0

        def begun(known: int, todo: int) -> None:
            nonlocal left
            left = todo
            bar.update(task, description="points", total=todo)
            if known:
                console.print(f"note: {known:,} runs are known, {todo:,} are left")

        def ended(outcome: Outcome) -> None:
            others.update([outcome.status])
            told = "".join(f", {others[status]:,} {status}" for status in ("refused", "failed") if others[status])
            bar.update(task, advance=1, description=f"points{told}")
            if not console.is_terminal:
                beat.done(others.total(), left)

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
            typer.echo(json.dumps({**record, "synthetic": bool(picture.table.frame.synthetic.any())}))
        return
    console = Console(highlight=False)
    synthetic = [picture.table.origin] if picture.table.frame.synthetic.any() else []
    for line in (*words, *synthetic, *_notes(picture.table.frame.notes)):
        console.print(line, markup=False, soft_wrap=True)
    if out is not None:
        console.print(f"out: {out}", markup=False, soft_wrap=True)


Picture = tuple[Any, list[str], list[dict[str, Any]]]
"""A figure (None unless it is wanted), what it says in words, and as records."""


def _lines(picture: Shown, draw: bool) -> Picture:
    found, stretches = _crossed(picture)
    words, doubts = (_told_leads(stretches, picture) if stretches else _told_best(picture)), _doubts(picture, stretches)
    figure = None
    if draw:
        from analysis.plots_sweep import lines

        figure = lines(picture, stretches, doubts)
    return figure, [*words, *doubts], _records(found, picture)


def _crossovers(picture: Shown, draw: bool) -> Picture:
    found, stretches = _crossed(picture)
    words = [*_told_leads(stretches, picture), *(_told_crossing(one, picture) for one in found)]
    if not found:
        curves = picture.curves()
        words.append(f"no two of {', '.join(curves)} cross" if len(curves) > 1 else FEW)
    figure, doubts = None, _doubts(picture, stretches)
    if draw:
        from analysis.plots_sweep import crossovers

        figure = crossovers(picture, found, doubts)
    return figure, [*words, *doubts], _records(found, picture)


def _heatmap(picture: Shown, draw: bool) -> Picture:
    figure, doubts = None, _doubts(picture, ())
    if draw:
        from analysis.plots_sweep import heatmap

        figure = heatmap(picture, [line.replace("outside", "in brackets, outside", 1) for line in doubts])
    best = _best(picture)
    return figure, [*_told_best(picture), *doubts], [best] if best else []


def _doubts(picture: Shown, stretches: Sequence[Lead]) -> list[str]:
    """Who cannot be told from whom, of those that the words and the picture call the best; what makes them fair; and
    what a line of several seeds is."""
    free = {axis.name for axis in picture.table.free()} - {axis.name for axis in _axes(picture)}
    banded = picture.kind in ("lines", "crossovers") and "seed" in free
    bands = ["lines are means over seeds, bands go from the least to the most"] if banded else []
    return [*_spread(picture, stretches), *bands, *_fairness(picture)]


def _fairness(picture: Shown) -> list[str]:
    memory = [] if MEMORY in (picture.value, picture.x.name) else told_of_memory(picture)
    left_out = picture.table.left_out
    missing = [f"left out: {left_out:,} points that did not run"] if left_out else []
    return [*memory, *told_outside(picture.table.frame), *missing]


def _spread(picture: Shown, stretches: Sequence[Lead]) -> list[str]:
    if picture.value != JUDGED:
        return [f"how sure this is, is known of the {_label(JUDGED)} alone"]
    if stretches:
        return told_of_leads(picture)
    names = [axis.name for axis in _axes(picture)]
    if not names:
        return []
    parts = picture.table.competing.groupby(names, sort=False)
    rows = {_at(dict(zip(names, at, strict=True))): part for at, part in parts if part[picture.value].notna().any()}
    best = _best(picture)
    return told_of_best(rows, _at({name: best[name] for name in names})) if best else []


def _pareto(picture: Shown, draw: bool) -> Picture:
    from analysis.plots_sweep import front, point_name

    frame, cost = picture.table.frame, picture.x.name
    competing = frame.role == SYSTEM
    values = frame[picture.value].where(competing)
    best = pareto(frame[cost].tolist(), values.tolist(), lower=lower_is_better(picture.value))
    told = f"{len(best)} of {competing.sum()} points are beaten by no other, from the least {_label(cost)} on:"
    words = [told if best else NOBODY]
    records = []
    alike = [_alike(picture, *pair) for pair in pairwise(best)]
    for place, same in zip(best, [False, *alike], strict=False):
        row, told = frame.iloc[place], ", not distinguishable from the one before" if same else ""
        words.append(f"  {point_name(picture, place)}: {_shown(cost, row)}, {_shown(picture.value, row)}{told}")
        records.append({**{axis.name: _plain(row[axis.name]) for axis in picture.table.axes.values()}})
        records[-1] |= {cost: float(row[cost]), picture.value: float(row[picture.value])}
    if None in alike:
        words.append("whether neighbours can be told apart is not known of all: too few sequences, or others")
    fairness = _fairness(picture)
    return front(picture, best, fairness) if draw else None, [*words, *fairness], records


def _alike(picture: Shown, one: int, other: int) -> bool | None:
    """Whether two points are not distinguishable; None where nobody can say."""
    frame = picture.table.frame
    found = judged([frame.iloc[[one]], frame.iloc[[other]]]) if picture.value == JUDGED else None
    return None if found is None else found.alike(0, 1)


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


def _notes(notes: pd.Series[str]) -> list[str]:
    """What the runs' own notes say, and of how many points; notes that differ in their numbers are one."""
    counts, first = Counter[str](), dict[str, str]()
    for note in (note for one in notes for note in one.split("; ") if note):
        merged = NUMBER.sub("\N{HORIZONTAL ELLIPSIS}", note)
        counts[merged] += 1
        first[merged] = note if first.setdefault(merged, note) == note else merged
    told = [f"{count:,} of {len(notes):,} points: {first[note]}" for note, count in counts.most_common(MOST_REASONS)]
    more = len(counts) - MOST_REASONS
    return [*told, *([f"and {more} more notes, in the table"] if more > 0 else [])]


def _told_crossing(one: Crossing, picture: Shown) -> str:
    x = picture.x
    return (
        f"{one.below} wins below {x.told(one.x)}, {one.above} above "
        f"(interpolated between {x.told(one.low)} and {x.told(one.high)})"
    )


def _best(picture: Shown) -> dict[str, Any]:
    """The place with the best value, over all axes that are shown; empty where nothing competes."""
    value, names = picture.value, [axis.name for axis in _axes(picture)]
    known = picture.table.competing[picture.table.competing[value].notna()]
    if not len(known):
        return {}
    means = known.groupby(names, sort=False, as_index=False)[value].mean()
    place = means[value].idxmin() if lower_is_better(value) else means[value].idxmax()
    return {name: _plain(means[name][place]) for name in (*names, value)}


def _axes(picture: Shown) -> list[Axis]:
    """The axes that are shown, in the order of the grid."""
    shown_axes = [axis.name for axis in (picture.x, picture.y, picture.hue) if axis is not None]
    return [axis for name, axis in picture.table.axes.items() if name in shown_axes]


def _told_best(picture: Shown) -> list[str]:
    best = _best(picture)
    if not best:
        return [f"{_ranked(picture.value)}: {NOBODY}"]
    at = _at({name: value for name, value in best.items() if name != picture.value})
    return [f"{_ranked(picture.value)}: {_shown(picture.value, best)} at {at}"]


def _at(place: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_plain(value)}" for name, value in place.items())


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
