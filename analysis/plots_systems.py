"""Systems side by side as a figure: where the time of a token goes, and what it costs in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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


def plot(records: Sequence[dict[str, Any]]) -> Figure:
    """Two panels from records of :func:`analysis.systems.side_by_side`, those without a decode token left out.

    Left the mean time of a decode token in ms by component, the quickest system on top, with a mark at the lower bound
    of its budget; right the bytes copied a token against the tokens a second.
    """
    shown = [record for record in ranked(records) if record["token_s"] is not None]
    figure = Figure(figsize=(13.0, max(3.2, 0.3 * len(shown) + 1.6)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0.0)
    bars, points = figure.subplots(1, 2, width_ratios=(3, 2))
    for ax in (bars, points):
        clean(ax)
    _bars(bars, shown)
    _points(points, shown)
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


def _points(ax: Axes, records: Sequence[dict[str, Any]]) -> None:
    """Bytes against tokens a second, numbered as the bars are."""
    drawn: list[tuple[int, float, float]] = []
    for row, record in enumerate(records):
        size = copied(record)
        if size is not None:
            at, speed = size / 2**20, 1.0 / record["token_s"]
            face = MEASURED if record["role"] == "system" else PAPER
            ax.plot([at], [speed], "o", markersize=6, color=MEASURED, markerfacecolor=face)
            drawn.append((row + 1, at, speed))
    most = max((at for _, at, _ in drawn), default=0.0) or 1.0
    ax.set_xlim(-0.03 * most, most * 1.12)
    ax.set_ylim(0, max((speed for *_, speed in drawn), default=1.0) * 1.08)
    _name_points(ax, drawn)
    ax.set_xlabel("copied a decode token, prefetches included (MiB)", color=INK, fontsize=TEXT_PT)
    ax.set_ylabel("decode tokens a second", color=INK, fontsize=TEXT_PT)
    hollow = any(record["role"] != "system" for record in records)
    title = "numbers as on the left" + ("; hollow: outside the comparison" if hollow else "")
    ax.set_title(title, loc="left", fontsize=SMALL, color=MUTED)


def _name_points(ax: Axes, drawn: Sequence[tuple[int, float, float]]) -> None:
    """The numbers of the bars beside the points; points that fall together share a label."""
    width, height = ax.get_xlim()[1], ax.get_ylim()[1]
    clusters: list[list[tuple[int, float, float]]] = []
    for point in drawn:
        for cluster in clusters:
            _, at, speed = cluster[0]
            if abs(at - point[1]) < 0.16 * width and abs(speed - point[2]) < 0.025 * height:
                cluster.append(point)
                break
        else:
            clusters.append([point])
    for cluster in clusters:
        ax.annotate(
            _ranges([row for row, *_ in cluster]),
            (max(at for _, at, _ in cluster), cluster[0][2]),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
            color=INK,
        )


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
