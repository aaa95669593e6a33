"""Systems side by side as a figure: where the time of a token goes, and what it costs in bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from analysis import text
from analysis.style import COMPONENT_COLOURS, INK, MEASURED, MUTED, PAPER, TEXT_PT, clean
from analysis.systems_table import copied, label, ranked

SMALL = TEXT_PT - 1
BAR_COLOURS: dict[str, str] = {
    "dense": COMPONENT_COLOURS["dense_s"],
    "GPU experts": COMPONENT_COLOURS["gpu_experts_s"],
    "CPU wait": "#e69f00",
    "transfer wait": COMPONENT_COLOURS["stall_s"],
    "host": COMPONENT_COLOURS["host_s"],
    "head": COMPONENT_COLOURS["head_s"],
    "other": COMPONENT_COLOURS["other_s"],
}
BOUND_LINE = "lower bound of its budget"
MARKER_PT = 6.0
SAME_PT = 1.0
"""Points whose centres are less than this apart, about a line's width, are one to the eye."""

SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
"""Where the label of a point may stand, the best first: right, left, above, below, and the corners."""

GAPS_PT = (2.5, 12.0, 22.0, 34.0, 48.0)
"""Between a point and its label; from the second on, a line joins them."""

Point: TypeAlias = tuple[float, float]
"""MiB a token, and tokens a second."""


def plot(records: Sequence[dict[str, Any]], title: str = "") -> Figure:
    """Two panels from records of :func:`analysis.systems.side_by_side`, those without a decode token left out.

    Left the mean time of a decode token in ms by component, the quickest system on top, with a mark at the lower bound
    of its budget; right the bytes copied a token against the tokens a second. The ``title`` says what was run on what.
    """
    shown = [record for record in ranked(records) if record["token_s"] is not None]
    figure = Figure(figsize=(13.0, max(3.2, 0.3 * len(shown) + 1.6)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0.0)
    bars, points = figure.subplots(1, 2, width_ratios=(3, 2))
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=TEXT_PT, color=INK)
    for ax in (bars, points):
        clean(ax)
    _bars(bars, shown)
    _name_points(points, _points(points, shown))
    return figure


def _bars(ax: Axes, records: Sequence[dict[str, Any]]) -> None:
    rows, left = np.arange(len(records)), np.zeros(len(records))
    most_ms = max((record["token_s"] for record in records), default=0.0) * 1e3
    for part, colour in BAR_COLOURS.items():
        widths = np.array([max(record["components_s"][part], 0.0) * 1e3 for record in records])
        if widths.sum() > 1e-3 * most_ms:
            ax.barh(rows, widths, left=left, height=0.7, color=colour, label=part, edgecolor=PAPER, linewidth=0.5)
        left = left + widths
    _marks(ax, records, left)
    ax.set_yticks(rows, [f"{label(record)}  {row + 1}" for row, record in enumerate(records)])
    ax.set_xlim(0, float(left.max(initial=0.0)) * 1.12 or 1.0)
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.tick_params(axis="y", length=0, labelsize=TEXT_PT)
    ax.set_xlabel("mean time of a decode token (ms)", color=INK, fontsize=TEXT_PT)
    if records:
        _legend(ax, columns=5)


def _marks(ax: Axes, records: Sequence[dict[str, Any]], totals: np.ndarray) -> None:
    """The total at the end of each bar, its interval, and the bound as a line across it."""
    for row, (record, total) in enumerate(zip(records, totals, strict=True)):
        low, high = record["token_low_s"], record["token_high_s"]
        end = total if high is None else max(total, high * 1e3)
        if low is not None:
            ax.plot([low * 1e3, high * 1e3], [row, row], color=INK, linewidth=1.0, solid_capstyle="butt")
        ax.annotate(
            text.number(record["token_s"] * 1e3),
            (end, row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
            color=INK,
        )
    bounds = [(row, record["bound_token_s"]) for row, record in enumerate(records) if record["bound_token_s"]]
    if bounds:
        places, values = zip(*bounds, strict=True)
        rows, bounds_ms = np.array(places), np.array(values) * 1e3
        ax.vlines(bounds_ms, rows - 0.5, rows + 0.5, color="black", linewidth=1.4, label=BOUND_LINE)


def _points(ax: Axes, records: Sequence[dict[str, Any]]) -> dict[int, Point]:
    """Bytes against tokens a second; returns the points by the number of their bar."""
    drawn: dict[int, Point] = {}
    for row, record in enumerate(records):
        size = copied(record)
        if size is not None:
            at, speed = size / 2**20, 1.0 / record["token_s"]
            face = MEASURED if record["role"] == "system" else PAPER
            ax.plot([at], [speed], "o", markersize=MARKER_PT, color=MEASURED, markerfacecolor=face)
            drawn[row + 1] = (at, speed)
    most = max((at for at, _ in drawn.values()), default=0.0) or 1.0
    ax.set_xlim(-0.03 * most, most * 1.12)
    ax.set_ylim(0, max((speed for _, speed in drawn.values()), default=1.0) * 1.08)
    ax.set_xlabel("copied a decode token, prefetches included (MiB)", color=INK, fontsize=TEXT_PT)
    ax.set_ylabel("decode tokens a second", color=INK, fontsize=TEXT_PT)
    hollow = any(record["role"] != "system" for record in records)
    title = "numbers as on the left" + ("; hollow: outside the comparison" if hollow else "")
    ax.set_title(title, loc="left", fontsize=SMALL, color=MUTED)
    return drawn


def _name_points(ax: Axes, drawn: Mapping[int, Point]) -> None:
    """The numbers of the bars beside the points, clear of each other and nearer to their own point than to others.

    Points that coincide share a label. The most crowded are served first, and a label goes to the first of
    :data:`GAPS_PT` and :data:`SIDES` that is free.
    """
    figure: Any = ax.figure
    figure.draw_without_rendering()  # from here on the layout is final, and places are known in points
    scale = 72.0 / figure.dpi
    groups = _coinciding({row: ax.transData.transform(point) * scale for row, point in drawn.items()})
    centres = [place for _, place in groups]
    crowd = [sum(abs(place - other).max() < GAPS_PT[-1] for other in centres) for place in centres]
    room = Bbox(ax.get_window_extent().get_points() * scale)
    taken: list[Bbox] = []
    for index in sorted(range(len(groups)), key=lambda index: -crowd[index]):
        rows, centre = groups[index]
        words = ax.annotate(_ranges(rows), (0, 0), ha="center", va="center", fontsize=SMALL, color=INK)
        size = words.get_window_extent().size * scale
        words.remove()
        others = [_around(place, MARKER_PT + 2 * GAPS_PT[0]) for place in centres if place is not centre]
        gap_pt, offset = _free(centre, size, [*others, *taken], room)
        taken.append(_around(centre + offset, size + 2.0))
        _write(ax, _ranges(rows), drawn[rows[0]], offset, joined=gap_pt > GAPS_PT[0])


def _coinciding(placed: Mapping[int, Any]) -> list[tuple[list[int], Any]]:
    """Groups of numbers whose places, in points, are the same to the eye, each with the place of its first."""
    groups: list[tuple[list[int], Any]] = []
    for row, place in placed.items():
        for rows, centre in groups:
            if np.hypot(*(place - centre)) < SAME_PT:
                rows.append(row)
                break
        else:
            groups.append(([row], place))
    return groups


def _free(centre: Any, size: Any, taken: Sequence[Bbox], room: Bbox) -> tuple[float, Any]:
    """The gap, and the offset of a label of this size from its point, that hits least of what is taken; in points."""
    found = []
    for gap_pt, side in product(GAPS_PT, SIDES):
        offset = np.array(side) * (size / 2 + (MARKER_PT / 2 + gap_pt) / np.hypot(*side))
        box = _around(centre + offset, size)
        inside = room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0 and box.y1 <= room.y1
        hits = box.count_overlaps(taken) + (0 if inside else 100)
        found.append((hits, gap_pt, offset))
        if not hits:
            break
    _, gap_pt, offset = min(found, key=lambda one: one[0])
    return gap_pt, offset


def _around(centre: Any, size: Any) -> Bbox:
    half = np.broadcast_to(size, 2) / 2
    return Bbox([centre - half, centre + half])


def _write(ax: Axes, words: str, point: Point, offset: Any, *, joined: bool) -> None:
    line = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 0, "shrinkB": MARKER_PT / 2}
    label = ax.annotate(
        words,
        point,
        xytext=tuple(offset),
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize=SMALL,
        color=INK,
        arrowprops=line if joined else None,
    )
    label.set_in_layout(False)  # it would move the point that it was placed beside


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in few words: 1, 4-6."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _legend(ax: Axes, *, columns: int) -> None:
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=columns,
        frameon=False,
        fontsize=SMALL,
        labelcolor=INK,
        handlelength=1.1,
        columnspacing=1.3,
    )
