"""Figures of sweeps: lines, crossovers, heat maps and Pareto fronts. A view of a table in, a matplotlib Figure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from analysis import text
from analysis.crossovers import Crossing, Lead
from analysis.style import (
    COMPONENT_COLOURS,
    INK,
    MEASURED,
    MUTED,
    PAPER,
    SIMULATED,
    TEXT_PT,
    WIDE,
    axes,
    clean,
    legend,
)
from analysis.sweep_table import Axis, Shown, figure_label, hue_label, lower_is_better, outside_label
from sim.presets import SYSTEM

SMALL = TEXT_PT - 1
DOTTED = (0, (2, 3))
BEHIND: dict[str, Any] = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.0}
COLOURS = (
    MEASURED,
    SIMULATED,
    COMPONENT_COLOURS["gpu_experts_s"],
    COMPONENT_COLOURS["stall_s"],
    COMPONENT_COLOURS["head_s"],
    COMPONENT_COLOURS["dense_s"],
    INK,
    MUTED,
)
MARKERS = "osD^vPX"
"""Colours and markers in the order of an axis; together they tell 56 of its values apart."""

STYLES: tuple[dict[str, Any], ...] = (
    {"linestyle": "-", "linewidth": 2.2},
    {"linestyle": (0, (4, 3)), "linewidth": 1.5},
)
"""Of every second line: one that lies on its neighbour lets it show through."""

BESIDE: dict[str, Any] = {
    "color": MUTED,
    "linestyle": (0, (2, 2)),
    "linewidth": 1.0,
    "markersize": 4.5,
    "markerfacecolor": "none",
    "zorder": 1.5,
}
"""Of what is no part of the comparison."""

SHADES = LinearSegmentedColormap.from_list("shades", [PAPER, COMPONENT_COLOURS["dense_s"], MEASURED, INK])
MOST_WORDS = 150
"""Cells of a heat map that have their number written into them."""

MOST_TICKS = 12


def lines(view: Shown, stretches: Sequence[Lead] = (), doubts: Sequence[str] = ()) -> Figure:
    """The value over x, a line for each hue; between ``stretches``, a dotted line says who leads on either side. What
    does not compete is thin, dashed and grey.

    ``doubts`` are what has to be said of that, above the figure.
    """
    label, scale = figure_label(view.value)
    figure, ax = axes(WIDE, 3.9, x=view.x.label, y=label)
    places = _places(ax, view.x)
    curves, low, high = (view.curves(how) for how in ("mean", "min", "max"))
    beside = view.beside()
    for number, (name, curve) in enumerate(curves.items()):
        look = _look(number)
        reach = np.array([low[name], high[name]]) * scale
        if (reach[0] < reach[1]).any():
            ax.fill_between(places, *reach, color=look["color"], alpha=0.18, linewidth=0)
        line = STYLES[number % len(STYLES)] if view.x.numbers else {"linestyle": ""}
        ax.plot(places, np.array(curve) * scale, markersize=6, markerfacecolor="none", label=name, **line, **look)
    for number, (name, curve) in enumerate(beside.items()):
        line = BESIDE if view.x.numbers else {**BESIDE, "linestyle": ""}
        ax.plot(places, np.array(curve) * scale, label=name, marker=MARKERS[number % len(MARKERS)], **line)
    ax.set_ylim(0, _top({**high, **beside}) * scale)
    if len(curves) + len(beside) > 1:
        legend(ax, columns=5 if not beside else 4)
    _mark_leads(ax, stretches, view.x)
    _name(figure, view, doubts)
    return figure


def _top(curves: Mapping[str, Sequence[float]]) -> float:
    """Where the axis of values ends that begins at 0: above the highest one, so that its marker is whole."""
    highest = max((value for curve in curves.values() for value in curve if np.isfinite(value)), default=0.0)
    return 1.06 * highest if highest > 0 else 1.0


def _look(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def _places(ax: Axes, axis: Axis) -> Sequence[float]:
    """Where the values of an axis stand, with ticks at them: numbers at their place, words one beside the other."""
    if axis.numbers is None:
        ax.set_xticks(range(len(axis.values)), [str(value) for value in axis.values])
        ax.margins(x=0.08)
        return range(len(axis.values))
    if axis.log:
        ax.set_xscale("log", base=2)
    if axis.log or len(axis.numbers) <= MOST_TICKS:
        ticks = axis.numbers[:: 1 + (len(axis.numbers) - 1) // MOST_TICKS]
        ax.xaxis.set_major_locator(FixedLocator(ticks))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xticks(ticks, [f"{number:.3g}" for number in ticks])
    return axis.numbers


def _mark_leads(ax: Axes, stretches: Sequence[Lead], x: Axis) -> None:
    """A dotted line between two stretches, with where it is, and whose they are, beside it."""
    for row, (left, right) in enumerate(pairwise(stretches)):
        ax.axvline(left.end, color=MUTED, linewidth=0.9, linestyle=DOTTED)
        sides = [" = ".join(one.names) for one in (left, right)]
        ax.annotate(
            f"{sides[0]}  \N{LEFTWARDS ARROW}  {x.told(left.end)}  \N{RIGHTWARDS ARROW}  {sides[1]}",
            (left.end, 0.03 + 0.07 * row),
            xycoords=ax.get_xaxis_transform(),
            ha=_side(ax, left.end),
            fontsize=SMALL,
            color=INK,
            bbox=BEHIND,
        )


def _side(ax: Axes, x: float) -> str:
    """How words at ``x`` are aligned, so that they stay within the axes."""
    place = ax.transAxes.inverted().transform(ax.transData.transform((x, 0.0)))[0]
    return "left" if place < 0.25 else "right" if place > 0.75 else "center"


def crossovers(view: Shown, found: Sequence[Crossing], doubts: Sequence[str] = ()) -> Figure:
    """As :func:`lines`, with every crossing of two lines ringed, and where it is written above it."""
    figure = lines(view, doubts=doubts)
    (ax,) = figure.axes
    _, scale = figure_label(view.value)
    curves = view.curves()
    places = np.array(view.x.numbers)
    known = np.log(places) if view.x.log else places
    told = {view.x.told(one.x): one for one in reversed(found)}  # lines that are equal cross others in one place
    for number, one in enumerate(reversed(told.values())):
        curve = np.array(curves[one.below])
        finite = np.isfinite(curve)
        at = np.log(one.x) if view.x.log else one.x
        height = float(np.interp(at, known[finite], curve[finite])) * scale
        ax.plot([one.x], [height], marker="o", markersize=10, markerfacecolor="none", markeredgecolor=INK)
        ax.annotate(
            view.x.told(one.x),
            (one.x, height),
            xytext=(0, 9 if number % 2 == 0 else -16),
            textcoords="offset points",
            ha="center",
            fontsize=SMALL,
            color=INK,
            bbox=BEHIND,
        )
    return figure


def heatmap(view: Shown, doubts: Sequence[str] = ()) -> Figure:
    """The value by x and y as shades, with the numbers written into the cells of a small one; nothing ran in ``-``. A
    cell that does not compete has no shade, and its number in brackets.
    """
    assert view.y is not None, "a heat map has two axes"
    label, scale = figure_label(view.value)
    cells, beside = (_cells(view, rows) * scale for rows in (view.table.competing, view.table.outside))
    figure, ax = axes(WIDE, 1.5 + 0.42 * min(len(view.y.values), 14), x=view.x.label, y=view.y.label)
    ax.grid(False)
    image = ax.imshow(cells, cmap=SHADES, aspect="auto", origin="lower", interpolation="nearest")
    _name_cells(ax, view.x, view.y)
    if cells.size <= MOST_WORDS:
        _write_cells(ax, cells, beside)
    bar = figure.colorbar(image, ax=ax, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label(label, color=INK, fontsize=TEXT_PT)
    bar.ax.tick_params(colors=INK, labelsize=SMALL, color=MUTED, width=0.8, length=3)
    _name(figure, view, doubts)
    return figure


def _cells(view: Shown, rows: pd.DataFrame) -> np.ndarray:
    """Means of the value by y and x, nan where there is none: float64 [y, x]."""
    assert view.y is not None, "a heat map has two axes"
    table = rows.groupby([view.y.name, view.x.name])[view.value].mean().unstack()
    return table.reindex(index=list(view.y.values), columns=list(view.x.values)).to_numpy(float)


def _name_cells(ax: Axes, x: Axis, y: Axis) -> None:
    for axis, ticks in ((x, ax.xaxis), (y, ax.yaxis)):
        step = 1 + (len(axis.values) - 1) // (2 * MOST_TICKS)
        names = [f"{one:.3g}" for one in axis.numbers] if axis.numbers else [str(one) for one in axis.values]
        ticks.set_ticks(range(0, len(names), step), names[::step])
    ax.tick_params(length=0)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)


def _write_cells(ax: Axes, cells: np.ndarray, beside: np.ndarray) -> None:
    known = cells[np.isfinite(cells)]
    low, high = known.min(initial=np.inf), known.max(initial=-np.inf)
    for (row, column), value in np.ndenumerate(cells):
        dark = np.isfinite(value) and high > low and (value - low) / (high - low) > 0.55
        words, colour = text.number(value), PAPER if dark else INK
        if np.isfinite(beside[row, column]):
            words, colour = f"({text.number(float(beside[row, column]))})", MUTED
        ax.text(column, row, words, ha="center", va="center", fontsize=SMALL, color=colour)


def front(view: Shown, best: Sequence[int], doubts: Sequence[str] = ()) -> Figure:
    """Every point by its cost (x) and its value, those of ``hue`` in one colour, those that do not compete in grey;
    ``best`` ones are joined and named."""
    frame, cost = view.table.frame, view.x.name
    (x_label, x_scale), (y_label, y_scale) = figure_label(cost), figure_label(view.value)
    figure, ax = axes(WIDE, 4.2, x=x_label, y=y_label)
    clean(ax)
    x, y = frame[cost].to_numpy(float) * x_scale, frame[view.value].to_numpy(float) * y_scale
    step = "steps-post" if not lower_is_better(view.value) else "steps-pre"
    ax.plot(x[[*best]], y[[*best]], color=INK, linewidth=1.0, drawstyle=step, zorder=1)
    for name, role, here, look in _groups(view):
        label = name if role == SYSTEM else outside_label(name, role)
        ax.plot(x[here], y[here], label=label, **{"markerfacecolor": "none", **look, "linestyle": ""})
    for place in best:
        ax.annotate(
            point_name(view, place),
            (x[place], y[place]),
            xytext=(5, -4),
            textcoords="offset points",
            va="top",
            fontsize=SMALL,
            color=INK,
        )
    ax.margins(x=0.12, y=0.1)
    if len(ax.lines) > 2:
        legend(ax, columns=4 if len(view.table.outside) else 5)
    _name(figure, view, doubts)
    return figure


def _groups(view: Shown) -> list[tuple[str, str, np.ndarray, dict[str, Any]]]:
    """Points that look alike: what they are called, their role, which rows they are, and how they look."""
    frame = view.table.frame
    found, own, grey = [], 0, 0
    for value in view.hue.values if view.hue else (None,):
        name = view.value if view.hue is None else hue_label(view.hue, value)
        mine = np.ones(len(frame), bool) if view.hue is None else (frame[view.hue.name] == value).to_numpy()
        for role in dict.fromkeys(frame.role[mine]):
            if role == SYSTEM:
                look, own = {**_look(own), "markersize": 5.5}, own + 1
            else:
                look, grey = {**BESIDE, "marker": MARKERS[grey % len(MARKERS)]}, grey + 1
            found.append((name, str(role), mine & (frame.role == role).to_numpy(), look))
    return found


def point_name(view: Shown, place: int) -> str:
    """The values of all axes that tell a row from others."""
    row: Mapping[str, Any] = view.table.frame.iloc[place]
    return ", ".join(_told(axis, row[axis.name]) for axis in view.table.free())


def _told(axis: Axis, value: Any) -> str:
    return value if isinstance(value, str) else hue_label(axis, value)


def _name(figure: Figure, view: Shown, doubts: Sequence[str] = ()) -> None:
    """What all points share, what kind of figures they are, and how sure, above all axes, in lines that fit."""
    shared = ": ".join(part for part in (view.table.origin, view.table.title) if part)
    words = "\n".join(fill(line, 120) for line in (shared, *doubts))
    figure.suptitle(words, x=0.01, ha="left", fontsize=SMALL, color=MUTED)
