"""What a cache did in one layer, step by step: read from the executed-operation log, and drawn as a map."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from analysis.style import CELL_COLOURS, INK, MUTED, TEXT_PT, WIDE, axes

ABSENT, RESIDENT, HIT, COPIED, CPU = range(5)
"""Codes of :func:`residency_map`, by rising precedence; 1 to 4 are the keys of ``CELL_COLOURS``, in order."""

_Slots = dict[int, tuple[int, int]]


def residency_map(
    operations: pd.DataFrame, layer: int, experts: int, steps: range, *, capacity_slots: int
) -> np.ndarray:
    """Code uint8 [experts, len(steps)] of what happened to each expert of ``layer`` in each step.

    Slots are followed from the first operation of the log on, when all are empty: a copy takes its slot, an eviction
    frees it. Slots from ``capacity_slots`` on are staging slots: what passes through them never counts as resident.
    """
    cells = np.zeros((experts, len(steps)), dtype=np.uint8)
    groups: dict[int, list[Any]] = {}
    for row in operations[operations["step"] < steps.stop].itertuples(index=False):
        groups.setdefault(int(row.step), []).append(row)
    slots: _Slots = {}
    for step in range(min([*groups, steps.start]), steps.stop):
        column = _apply(slots, groups.get(step, []), layer, experts, capacity_slots)
        if step in steps:
            cells[:, step - steps.start] = column
    return cells


def _apply(slots: _Slots, operations: Iterable[Any], layer: int, experts: int, capacity_slots: int) -> np.ndarray:
    """Moves ``slots`` over one step, and returns that step's codes for ``layer``."""
    seen = dict.fromkeys(range(experts), ABSENT)
    for row in operations:
        if row.op == "copy" and row.slot < capacity_slots:
            slots[row.slot] = (row.layer, row.expert)
        elif row.op == "evict":
            slots.pop(row.slot, None)
        code = {"copy": COPIED, "gpu": HIT, "cpu": CPU}.get(row.op, ABSENT)
        if row.layer == layer:
            seen[row.expert] = max(seen[row.expert], code)
    for owner, expert in slots.values():
        if owner == layer:
            seen[expert] = max(seen[expert], RESIDENT)
    return np.array([seen[expert] for expert in range(experts)], dtype=np.uint8)


def _legend_entries() -> list[tuple[int, tuple[str, str]]]:
    return list(enumerate(CELL_COLOURS.items(), start=RESIDENT))


def residency(cells: np.ndarray, steps: range) -> Figure:
    """The map of :func:`residency_map` as a picture: an expert a row, a step a column, colour for what happened."""
    figure, ax = axes(WIDE, float(np.clip(0.13 * len(cells) + 0.9, 2.2, 5.5)), x="step (index)", y="expert")
    tints = {name: to_rgba(colour, 0.3 if code == RESIDENT else 1.0) for code, (name, colour) in _legend_entries()}
    colours = np.array([(0.0, 0.0, 0.0, 0.0), *tints.values()])
    extent = (steps.start - 0.5, steps.stop - 0.5, len(cells) - 0.5, -0.5)
    ax.imshow(colours[cells], aspect="auto", interpolation="none", extent=extent)
    ax.grid(False)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    used = [(name, tints[name]) for code, (name, _) in _legend_entries() if (cells == code).any()]
    ax.legend(
        handles=[Patch(facecolor=tint, label=name) for name, tint in used],
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=len(used) or 1,
        frameon=False,
        fontsize=TEXT_PT - 1,
        labelcolor=INK,
        borderaxespad=0.3,
        handlelength=1.1,
    )
    ax.spines[:].set_color(MUTED)
    return figure
