"""The two timelines of one decode step, laid over each other on a common time axis."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from analysis.style import GRID, INK, MEASURED, MUTED, SIMULATED, TEXT_PT, WIDE, axes
from sim.results import RunResult
from traces.errors import InputError

RESOURCES = ("host", "gpu", "link", "link-back", "cpu", "disk")
"""Rows from top to bottom; another resource that a run names comes after these."""

PALE_KINDS = frozenset({"dense", "head", "plan"})
"""Kinds of event that every system has; they are drawn pale, so that experts and copies stand out."""

PREFETCH = "prefetch"
_HALF = 0.38


def step_events(run: RunResult, step: int) -> pd.DataFrame:
    """Events of one step with ``start_ms`` and ``length_ms`` since the step began; empty when none were recorded."""
    rows = run.tokens[run.tokens["step"] == step]
    if rows.empty:
        raise InputError(f"step must be a step of the {run.info.source} run, got {step}")
    events = run.events[run.events["step"] == step].copy()
    events["start_ms"] = (events["start_s"].astype(float) - float(rows["start_s"].min())) * 1e3
    events["length_ms"] = (events["end_s"].astype(float) - events["start_s"].astype(float)) * 1e3
    return events


def timeline_overlay(measured: RunResult, simulated: RunResult, step: int) -> Figure:
    """One step on both clocks: a row a resource, measured above and simulated below, layer starts as thin lines.

    Raises InputError when the step, or its events, are missing from one of the runs.
    """
    sides = {"measured": (measured, MEASURED), "simulated": (simulated, SIMULATED)}
    events = {clock: step_events(run, step) for clock, (run, _) in sides.items()}
    for clock, table in events.items():
        if table.empty:
            raise InputError(f"events of step {step} must be recorded, got none in the {clock} run")
    resources = _resources(events.values())
    figure, ax = axes(WIDE, 0.62 * len(resources) + 1.0, x=f"time since the start of step {step} (ms)")
    end_ms = max(float((table["start_ms"] + table["length_ms"]).max()) for table in events.values())
    for half, (clock, (run, colour)) in enumerate(sides.items()):
        _draw_events(ax, events[clock], resources, half, colour)
        _draw_layers(ax, run, step, len(resources), half, end_ms)
    _label_rows(ax, resources, end_ms)
    _kind_legend(ax, events.values())
    return figure


def _resources(tables: Iterable[pd.DataFrame]) -> list[str]:
    found = {str(name) for table in tables for name in table["resource"]}
    return [name for name in RESOURCES if name in found] + sorted(found - set(RESOURCES))


def _draw_events(ax: Axes, events: pd.DataFrame, resources: list[str], half: int, colour: str) -> None:
    """Adds one collection a style of kind; ``half`` 0 is the upper half of a row."""
    row = events["resource"].map({name: place for place, name in enumerate(resources)})
    for alpha, hatch, mask in (
        (0.38, "", events["kind"].isin(PALE_KINDS)),
        (0.95, "", ~events["kind"].isin(PALE_KINDS | {PREFETCH})),
        (0.6, "////", events["kind"] == PREFETCH),
    ):
        boxes = [
            Rectangle((start, place - _HALF + half * _HALF), length, _HALF)
            for start, length, place in zip(
                events.loc[mask, "start_ms"], events.loc[mask, "length_ms"], row[mask], strict=True
            )
        ]
        if boxes:
            ax.add_collection(
                PatchCollection(boxes, facecolor=colour, alpha=alpha, hatch=hatch, edgecolor="none", linewidth=0)
            )


def _draw_layers(ax: Axes, run: RunResult, step: int, rows: int, half: int, end_ms: float) -> None:
    layers = run.layers[run.layers["step"] == step].sort_values("layer")
    begin = float(run.tokens.loc[run.tokens["step"] == step, "start_s"].min())
    starts = (layers["start_s"].to_numpy(float) - begin) * 1e3
    for place in range(rows):
        low = place - _HALF + half * _HALF
        ax.vlines(starts, low, low + _HALF, color=MUTED, linewidth=0.7)
    if half == 0 and starts.size:
        shown = starts[np.concatenate(([True], np.diff(starts) > 0.018 * end_ms))] if starts.size <= 64 else starts[:1]
        names = dict(zip(starts.tolist(), layers["layer"].tolist(), strict=True))
        for start in shown.tolist():
            ax.text(start, -_HALF - 0.04, f" {names[start]}", fontsize=TEXT_PT - 2, color=MUTED, va="bottom")
        ax.text(0, -_HALF - 0.24, " layer", fontsize=TEXT_PT - 2, color=MUTED, va="bottom")


def _label_rows(ax: Axes, resources: list[str], end_ms: float) -> None:
    ax.set_xlim(0, end_ms * 1.005)
    ax.set_ylim(len(resources) - 1 + _HALF + 0.12, -_HALF - 0.42)
    ax.set_yticks(range(len(resources)), resources)
    ax.tick_params(axis="y", length=0, labelsize=TEXT_PT)
    ax.grid(False, axis="y")
    for place in range(len(resources)):
        ax.axhline(place, color=GRID, linewidth=0.6, zorder=0)
        for half, (clock, colour) in enumerate((("measured", MEASURED), ("simulated", SIMULATED))):
            ax.text(
                1.006,
                place + (half - 0.5) * _HALF,
                clock,
                transform=ax.get_yaxis_transform(),
                fontsize=TEXT_PT - 2,
                color=colour,
                va="center",
            )


def _kind_legend(ax: Axes, tables: Iterable[pd.DataFrame]) -> None:
    kinds = {str(kind) for table in tables for kind in table["kind"]}
    groups: tuple[tuple[list[str], dict[str, Any]], ...] = (
        (sorted(kinds & PALE_KINDS), {"alpha": 0.38}),
        (sorted(kinds - PALE_KINDS - {PREFETCH}), {"alpha": 0.95}),
        (sorted(kinds & {PREFETCH}), {"alpha": 0.6, "hatch": "////"}),
    )
    handles = [Patch(facecolor=MUTED, label=", ".join(names), **look) for names, look in groups if names]
    ax.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=3,
        frameon=False,
        fontsize=TEXT_PT - 1,
        labelcolor=INK,
        borderaxespad=0.2,
        handlelength=1.1,
    )
