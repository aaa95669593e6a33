"""Figures of cache policies and of locality: tables in, a matplotlib Figure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from analysis import text
from analysis.metrics import gap_closed
from analysis.style import (
    COMPONENT_COLOURS,
    GRID,
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
from sim.replay.curves import Curve

SMALL = TEXT_PT - 1
DOTTED = (0, (2, 3))
DASHED = (0, (4, 2))
BEHIND: dict[str, Any] = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.0}
"""Behind words that may stand on a line."""

LEAST, BOUND = "lru", "belady"
"""What a policy is to beat, and the bound on what it can reach."""

LINE_COLOURS = {LEAST: MEASURED, BOUND: INK}
POINT_COLOURS = (
    COMPONENT_COLOURS["gpu_experts_s"],
    COMPONENT_COLOURS["stall_s"],
    COMPONENT_COLOURS["head_s"],
    SIMULATED,
    COMPONENT_COLOURS["dense_s"],
)
MARKERS = "osD^v"
"""Colours and markers of the policies that are drawn as points, in the order of the table; 25 pairs differ."""

LABELLED = (0.36, 0.7, 35)
"""Shares of the experts among which there is room for the name of a line, on either side: first, last, how many."""


def hit_curves(
    curves: pd.DataFrame,
    sampled: pd.DataFrame | None = None,
    marks: Mapping[str, float] | None = None,
    title: str = "",
) -> Figure:
    """Hit ratio by assignment (%) against capacity (% of all experts): a line a curve, points for what was replayed.

    Points are hollow, so that those of policies that hit alike show through each other. Shares of capacities in bytes
    are of the bytes of all experts. ``title`` names the model and the trace.

    ``curves`` are frames of ``sim.replay.curves.Curve`` of one scope, contract and phase; ``sampled`` has the same
    columns, and ``low`` and ``high`` where there are intervals. ``marks`` are capacities (shares of all experts) by
    what is written beside them, see :func:`marks_of`.
    """
    whole = "all experts" if curves["capacity_slots"].notna().any() else "the bytes of all experts"
    figure, ax = axes(WIDE, 3.7, x=f"cache (% of {whole}): {_setting(curves)}", y="hit ratio by assignment (%)")
    _name_figure(figure, title)
    for row, (label, share) in enumerate(sorted((marks or {}).items(), key=lambda mark: (mark[1], mark[0]))):
        _mark(ax, label, share * 100, 3.0 + 6 * row)
    _draw_lines(ax, curves)
    if sampled is not None and len(sampled):
        _draw_points(ax, sampled)
        legend(ax, columns=8)
    ax.set_xlim(0, 100)
    ax.set_ylim(0, 100)
    return figure


def _name_figure(figure: Figure, title: str) -> None:
    """What a figure is of, above all its axes."""
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=TEXT_PT + 1, color=INK)


def _mark(ax: Axes, label: str, percent: float, height: float) -> None:
    """A dotted line at a capacity, and what it is, on the side that has more room."""
    ax.axvline(percent, color=MUTED, linewidth=0.8, linestyle=DOTTED)
    side = 1 if percent <= 60 else -1
    ax.annotate(
        label,
        (percent, height),
        xytext=(4 * side, 0),
        textcoords="offset points",
        ha="left" if side > 0 else "right",
        fontsize=SMALL,
        color=MUTED,
        bbox=BEHIND,
    )


def marks_of(curve: Curve, gain: float | None = None, phase: str = "all") -> dict[str, float]:
    """Two capacities worth a mark in :func:`hit_curves`: twice the experts of a token, and ``curve.knee(gain, phase)``.

    They are shares of all experts; a text says how many slots that is, in a layer or on average over the layers.
    """
    experts, twice = curve.header.experts, min(2 * curve.header.top_k, curve.header.experts)
    knee = float(curve.shares()[curve.knee(gain, phase)])
    return {
        f"2 x top-k: {twice} slots a layer": twice / experts,
        f"knee of {curve.policy}: {knee * experts:.3g} slots a layer": knee,
    }


def _setting(curves: pd.DataFrame) -> str:
    """The scope, contract and phase of a frame, in words."""
    first = curves.iloc[0]
    pools = "one pool for all layers" if first["scope"] == "global" else "a pool for each layer"
    phase = "all passes" if first["phase"] == "all" else f"{first['phase']} only"
    return f"{pools}, {first['contract']} contract, {phase}"


def _line_label(policy: str, exact: bool) -> str:
    if not exact:
        return f"{policy} (heuristic: unequal experts)"
    return f"{policy} (hit-rate bound)" if policy == BOUND else policy


def _draw_lines(ax: Axes, curves: pd.DataFrame) -> None:
    """A line a policy, its name beside it where the lines are far apart: the upper's above, the others' below."""
    lines = {str(policy): rows for policy, rows in curves.groupby("policy", sort=True)}
    shares = np.linspace(*LABELLED)
    heights = {name: np.interp(shares, *_places(rows)) for name, rows in lines.items()}
    table = np.stack([*heights.values()])
    at = int(np.argmax(table.max(axis=0) - table.min(axis=0)))
    upper = max(heights, key=lambda name: float(heights[name][at]))
    for name, rows in lines.items():
        colour = LINE_COLOURS.get(name, MUTED)
        share, ratios = _places(rows)
        ax.plot(share * 100, ratios * 100, color=colour, linewidth=1.6, linestyle=DASHED if name == BOUND else "-")
        above = name == upper
        ax.annotate(
            _line_label(name, bool(rows["exact"].all())),
            (shares[at] * 100, heights[name][at] * 100),
            xytext=(-6, 5) if above else (8, -6),
            textcoords="offset points",
            ha="right" if above else "left",
            va="bottom" if above else "top",
            fontsize=TEXT_PT,
            color=colour,
            bbox=BEHIND,
        )


def _places(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Capacities and hit ratios, as shares, by capacity."""
    rows = rows.sort_values("capacity_share")
    return rows["capacity_share"].to_numpy(float), rows["hit_ratio_assignments"].to_numpy(float)


def _draw_points(ax: Axes, sampled: pd.DataFrame) -> None:
    cycle = len(POINT_COLOURS)
    for number, (name, rows) in enumerate(sampled.groupby("policy", sort=False)):
        share, ratios = _places(rows)
        ax.errorbar(
            share * 100,
            ratios * 100,
            yerr=_reach(rows.sort_values("capacity_share")),
            fmt=MARKERS[(number + number // cycle) % len(MARKERS)],
            color=LINE_COLOURS.get(str(name), POINT_COLOURS[number % cycle]),
            markersize=5.0,
            markerfacecolor="none",
            markeredgewidth=1.2,
            elinewidth=1.0,
            label=str(name),
        )


def _reach(rows: pd.DataFrame) -> np.ndarray | None:
    """How far the intervals go below and above the hit ratios, in percentage points: [2, n]; None without intervals."""
    if not {"low", "high"} <= set(rows.columns):
        return None
    middle, low, high = (rows[name].to_numpy(float) for name in ("hit_ratio_assignments", "low", "high"))
    return np.maximum(np.stack([middle - low, high - middle]) * 100, 0.0)


def policies_at(table: pd.DataFrame, title: str = "", *, bound: bool = True) -> Figure:
    """Policies at one capacity by hit ratio, best on top, and how much of the gap from lru to belady each closes.

    ``table`` has a row a policy with the columns of ``sim.replay.curves.points``, and ``low`` and ``high`` where there
    are intervals. Equal ratios are in the order of names. ``title`` names the model and the trace. ``bound`` is False
    where experts of unequal bytes share a pool: belady is no bound there, and is not called one.
    """
    table = table.assign(gap=gap_closed(table["policy"], table["hit_ratio_union"])).sort_values(
        "policy", kind="stable", ascending=False
    )
    table = table.sort_values("hit_ratio_assignments", kind="stable", ignore_index=True)
    share = text.percent(float(table["capacity_share"].iloc[0]))
    figure, ax = axes(WIDE, 0.27 * len(table) + 1.3, x=f"hit ratio by assignment (%), cache of {share} of all experts")
    _name_figure(figure, title)
    ratios, rows = table["hit_ratio_assignments"].to_numpy(float) * 100, np.arange(len(table))
    for name in (LEAST, BOUND):
        for ratio in ratios[table["policy"] == name]:
            ax.axvline(ratio, color=LINE_COLOURS[name], linewidth=0.9, linestyle=DOTTED)
    ax.errorbar(ratios, rows, xerr=_reach(table), fmt="none", ecolor=MUTED, elinewidth=1.4, capsize=2.5)
    colours = [LINE_COLOURS.get(name, POINT_COLOURS[0]) for name in table["policy"]]
    ax.scatter(ratios, rows, s=30, color=colours, zorder=3)
    ax.set_yticks(rows, [_line_label(name, True) if bound else name for name in table["policy"]])
    _write_gaps(ax, table)
    ranked = "; ranked by assignment, the gap is by union" if len(table) > 2 and table["gap"].notna().any() else ""
    ax.set_title(f"{_setting(table)}{ranked}", loc="left", fontsize=SMALL, color=MUTED)
    ax.set_ylim(-0.6, len(table) - 0.4)
    ax.tick_params(axis="y", length=0, labelsize=TEXT_PT)
    ax.grid(False, axis="y")
    return figure


def _write_gaps(ax: Axes, table: pd.DataFrame) -> None:
    """A column to the right of the axes."""
    known = table["gap"].notna()
    if known.any():
        ax.annotate(
            "gap closed\nby union", (1.01, 1), xycoords="axes fraction", va="bottom", fontsize=SMALL, color=MUTED
        )
    for row in np.flatnonzero(known & ~table["policy"].isin((LEAST, BOUND))):
        ax.annotate(
            text.percent(float(table["gap"].iloc[row]), signed=True),
            (1.01, float(row)),
            xycoords=ax.get_yaxis_transform(),
            va="center",
            fontsize=SMALL,
            color=INK,
        )


def locality(record: Mapping[str, Any], title: str = "") -> Figure:
    """Four looks at a trace, from the dict of ``traces.locality.locality``: what neighbours share, how many experts a
    window of one sequence and a batch of several need, and how well the best fixed set serves a window.

    Lines are means over the layers, bands go from the lowest to the highest layer, dashed lines are what uniform
    routing gives. ``title`` names the model and the trace.
    """
    figure = Figure(figsize=(WIDE, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0.0)
    _name_figure(figure, title)
    panels = figure.subplots(2, 2)
    for ax in panels.flat:
        clean(ax)
    _overlap(panels[0, 0], record)
    _sizes(panels[0, 1], record["working_set"], "window", record["experts"])
    _sizes(panels[1, 0], record["batch_union"], "batch", record["experts"])
    _srp(panels[1, 1], record["srp"])
    panels[0, 0].set_title("line: mean of the layers, band: all layers", loc="left", fontsize=SMALL, color=MUTED)
    return figure


def _name_axes(ax: Axes, x: str, y: str) -> None:
    ax.set_xlabel(x, color=INK, fontsize=TEXT_PT)
    ax.set_ylabel(y, color=INK, fontsize=TEXT_PT)


def _powers_of_two(ax: Axes, values: Sequence[int]) -> None:
    """A logarithmic axis that names every value, or every second one of many."""
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator([*values][:: 1 if len(values) < 8 else 2]))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    ax.xaxis.set_minor_locator(NullLocator())


def _known(entries: Sequence[Mapping[str, Any]], key: str) -> list[Mapping[str, Any]]:
    return [entry for entry in entries if entry[key] is not None]


def _line(ax: Axes, x: Sequence[float], entries: Sequence[Mapping[str, Any]], scale: float = 1.0) -> None:
    """The mean over layers as a line, and a band from the lowest to the highest."""
    layers = [[value * scale for value in entry["layers"] if value is not None] for entry in entries]
    ax.fill_between(x, [min(values) for values in layers], [max(values) for values in layers], color=GRID, linewidth=0)
    marker = "o" if len(entries) <= 16 else ""
    ax.plot(x, [entry["mean"] * scale for entry in entries], color=MEASURED, linewidth=1.6, marker=marker, markersize=4)


def _overlap(ax: Axes, record: Mapping[str, Any]) -> None:
    _name_axes(ax, "distance of two tokens (tokens)", "experts in common (%)")
    overlap = record["overlap"]
    entries = _known(overlap["lags"], "mean")
    if entries:
        _line(ax, [entry["lag"] for entry in entries], entries, 100)
    anywhere, chance = overlap["popularity"]["mean"], overlap["chance"]
    if anywhere is not None:
        _level(ax, "any two tokens", anywhere, above=anywhere >= chance)
    _level(ax, "chance", chance, above=anywhere is not None and anywhere < chance)
    _powers_of_two(ax, [1, 2, 4, 8, 16, 32, 64])
    ax.set_ylim(bottom=0)


def _level(ax: Axes, label: str, share: float, *, above: bool) -> None:
    ax.axhline(share * 100, color=MUTED, linewidth=1.0, linestyle=DASHED)
    ax.annotate(
        label,
        (0.02, share * 100),
        xycoords=ax.get_yaxis_transform(),
        xytext=(0, 3 if above else -3),
        textcoords="offset points",
        va="bottom" if above else "top",
        fontsize=SMALL,
        color=MUTED,
    )


def _sizes(ax: Axes, entries: Sequence[Mapping[str, Any]], name: str, experts: int) -> None:
    words = {"window": "window of one sequence (tokens)", "batch": "sequences in a batch"}
    _name_axes(ax, words[name], "distinct experts a layer")
    entries = _known(entries, "mean")
    x = [entry[name] for entry in entries]
    if entries:
        _line(ax, x, entries)
        ax.plot(x, [entry["uniform"] for entry in entries], color=MUTED, linewidth=1.0, linestyle=DASHED)
        middle = len(x) // 3
        ax.annotate(
            "uniform routing",
            (x[middle], entries[middle]["uniform"]),
            xytext=(-6, 4),
            textcoords="offset points",
            ha="right",
            fontsize=SMALL,
            color=MUTED,
        )
    _powers_of_two(ax, x or [1])
    ax.set_ylim(0, experts * 1.05)


def _srp(ax: Axes, entries: Sequence[Mapping[str, Any]]) -> None:
    _name_axes(ax, "window (tokens)", "best fixed set, SRP (%)")
    entries = _known(entries, "srp")
    for entry in entries:
        low, high = entry["low"], entry["high"]
        if low is not None:
            ax.plot([entry["window"]] * 2, [low * 100, high * 100], color=MEASURED, linewidth=1.4)
        ax.annotate(
            f"{entry['cache_size']:.1f} x top-k",
            (entry["window"], entry["srp"] * 100),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=SMALL,
            color=INK,
        )
    x = [entry["window"] for entry in entries]
    ax.set_title("beside the points: how many experts the set has", loc="left", fontsize=SMALL, color=MUTED)
    ax.plot(x, [entry["srp"] * 100 for entry in entries], color=MEASURED, linewidth=1.6, marker="o", markersize=4)
    _powers_of_two(ax, x or [1])
    ax.margins(x=0.2)
    ax.set_ylim(0, 100)
