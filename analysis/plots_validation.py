"""Figures of a validation: predicted against measured, the error by component, and the ranking of the systems."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.style import GRID, INK, MEASURED, MUTED, PAPER, SIMULATED, TEXT_PT, WIDE, axes, legend
from analysis.validation import named

SMALL = TEXT_PT - 1
MARKERS = "osD^vPX<>*hd"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c959f", "#24292f")


def predicted_against_measured(rows: pd.DataFrame, bar: float) -> Figure:
    """Mean decode token of every point in ms: measured to the right, simulated up; ``bar`` is the shaded share."""
    figure, ax = axes(5.6, 4.4, x="measured time of a decode token (ms)", y="simulated (ms)")
    names = list(dict.fromkeys(rows.system))
    for place, name in enumerate(names):
        own = rows[rows.system == name]
        ax.scatter(
            own.measured_ms,
            own.simulated_ms,
            s=34,
            marker=MARKERS[place % len(MARKERS)],
            color=COLOURS[place % len(COLOURS)],
            edgecolor=PAPER,
            linewidth=0.6,
            label=name,
            zorder=3,
        )
    both = rows[["measured_ms", "simulated_ms"]].to_numpy(float)
    ends = np.array([both.min() * 0.88, both.max() * 1.08])
    ax.plot(ends, ends, color=INK, linewidth=0.9)
    ax.fill_between(ends, ends * (1 - bar), ends * (1 + bar), color=GRID, linewidth=0, zorder=0)
    ax.set_xlim(*ends)
    ax.set_ylim(*ends)
    ax.set_title(f"shaded: within {bar:.0%}", loc="left", fontsize=SMALL, color=MUTED)
    ax.legend(loc="upper left", frameon=False, fontsize=SMALL, labelcolor=INK, borderaxespad=0.2, handletextpad=0.2)
    return figure


def error_by_component(components: pd.DataFrame) -> Figure:
    """Simulated minus measured by component and system, as a share of the measured token: one row a component."""
    critical = components[components.critical]
    labels = list(dict.fromkeys(critical.label))
    names = list(dict.fromkeys(critical.system))
    figure, ax = axes(WIDE, 0.9 + 0.42 * len(labels), x="simulated minus measured (% of the measured token)")
    rows = np.arange(len(labels))
    for place, name in enumerate(names):
        own = critical[critical.system == name].groupby("label").of_token.mean().reindex(labels).to_numpy(float) * 100
        offset = (place - (len(names) - 1) / 2) * 0.7 / max(len(names), 1)
        ax.plot(
            own,
            rows + offset,
            MARKERS[place % len(MARKERS)],
            color=COLOURS[place % len(COLOURS)],
            markersize=4.5,
            label=name,
        )
    ax.axvline(0, color=INK, linewidth=0.9)
    ax.set_yticks(rows, labels)
    ax.invert_yaxis()
    legend(ax, columns=4)
    return figure


def ranking(rows: pd.DataFrame) -> Figure:
    """Every point by its measured time, quickest first: both clocks in ms, with the noise of the repeats as a line."""
    ordered = rows.sort_values("measured_ms", kind="stable")
    figure, ax = axes(WIDE, 0.9 + 0.2 * len(ordered), x="time of a decode token (ms)")
    place = np.arange(len(ordered))
    spread = ordered.noise.fillna(0.0).to_numpy(float) * ordered.measured_ms.to_numpy(float)
    ax.hlines(
        place, ordered.measured_ms, ordered.measured_ms + spread, color=MEASURED, linewidth=3.2, alpha=0.35, zorder=2
    )
    ax.plot(
        ordered.measured_ms, place, "o", color=MEASURED, markersize=5, label="measured (line: repeat noise)", zorder=3
    )
    ax.plot(ordered.simulated_ms, place, "D", color=SIMULATED, markersize=4, label="simulated", zorder=3)
    several = rows.model.nunique() > 1
    names = [
        f"{row.system} at {named(row.cache, row.workload)}" + (f", {row.model}" if several else "")
        for row in ordered.itertuples(index=False)
    ]
    ax.set_yticks(place, names)
    ax.invert_yaxis()
    legend(ax, columns=2)
    return figure
